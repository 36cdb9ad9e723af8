"""The mean of LoRA's products: exact where it fits the rank, the nearest that does where not.

Shape letters: R rank, D sizes of a projection.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from cloud_aggregator.aggregation.mean import mean_of_tensors
from cloud_aggregator.aggregation.product import factors, mean_of_products
from messaging.layout import Layout, Tensors, TensorSpec, Vector

QUERY, VALUE = "transformer.h.1.attn.c_attn.query", "transformer.h.0.attn.c_attn.value"
BIAS = "adapters.0.mlp.up.bias"

Matrix = npt.NDArray[np.float64]


def layout_of(rank: int, inputs: int, outputs: int, *, sites: int = 1) -> Layout:
    """Return a bias of three and the factors of LoRA modules of one size."""
    specs = [TensorSpec(name=BIAS, shape=(3,))]
    for path in (QUERY, VALUE)[:sites]:
        a, b = (rank, inputs), (outputs, rank)
        specs.append(TensorSpec(name=f"{path}.lora_A.weight", shape=a, scale_axis=0))
        specs.append(TensorSpec(name=f"{path}.lora_B.weight", shape=b, scale_axis=1))
    return Layout(tuple(specs))


def held(a: object, b: object, path: str = QUERY, bias: float = 0.0) -> Tensors:
    """Return what a device has after training."""
    return {
        BIAS: np.full(3, bias, np.float32),
        f"{path}.lora_A.weight": np.array(a, np.float32),
        f"{path}.lora_B.weight": np.array(b, np.float32),
    }


def product(tensors: Tensors, path: str = QUERY) -> Matrix:
    """Return B A in float64."""
    a, b = tensors[f"{path}.lora_A.weight"], tensors[f"{path}.lora_B.weight"]
    return b.astype(np.float64) @ a.astype(np.float64)


def next_state(state: Vector, clients: list[tuple[Tensors, int]], layout: Layout) -> Tensors:
    """Return the aggregated tensors of clients that hold all of the layout."""
    updates = [(layout.pack(tensors) - state, examples) for tensors, examples in clients]
    return layout.unpack(mean_of_products(state, updates, layout))


def test_a_mean_that_fits_the_rank_is_exact_and_not_the_product_of_the_means() -> None:
    layout = layout_of(1, 2, 2)
    state = layout.pack(held([[1.0, 1.0]], [[0.0], [0.0]]))
    one = held([[1.0, 0.0]], [[2.0], [4.0]])  # B A = [[2, 0], [4, 0]]
    three = held([[0.0, 2.0]], [[1.0], [2.0]])  # B A = [[0, 2], [0, 4]]
    clients = [(one, 1), (three, 3)]
    # (1*[[2, 0], [4, 0]] + 3*[[0, 2], [0, 4]]) / 4, of rank 1
    exact = [[0.5, 1.5], [1.0, 3.0]]
    # factors are rounded to float32: two roundings of 2**-24 of at most 3
    np.testing.assert_allclose(product(next_state(state, clients, layout)), exact, atol=1e-6)

    # mean(B) = [1.25, 2.5], mean(A) = [0.25, 1.5]
    updates = [(layout.pack(tensors) - state, examples) for tensors, examples in clients]
    by_tensor = layout.unpack(mean_of_tensors(state, updates, layout))
    assert product(by_tensor).tolist() == [[0.3125, 1.875], [0.625, 3.75]]


def test_of_a_mean_beyond_the_rank_the_larger_part_is_kept() -> None:
    layout = layout_of(1, 2, 2)
    state = layout.pack(held([[1.0, 1.0]], [[0.0], [0.0]]))
    clients = [
        (held([[1.0, 0.0]], [[6.0], [0.0]]), 1),
        (held([[0.0, 1.0]], [[0.0], [4.0]]), 1),
    ]
    # the mean is diag(3, 2), whose nearest matrix of rank 1 is diag(3, 0)
    after = next_state(state, clients, layout)
    np.testing.assert_allclose(product(after), [[3.0, 0.0], [0.0, 0.0]], atol=1e-6)


def random_clients(layout: Layout, seed: int, count: int = 3) -> list[tuple[Tensors, int]]:
    rng = np.random.default_rng(seed)
    return [
        (layout.unpack(rng.standard_normal(layout.size).astype(np.float32)), 3 * i + 1)
        for i in range(count)
    ]


@pytest.mark.parametrize(
    ("rank", "inputs", "outputs"), [(1, 5, 4), (2, 5, 4), (2, 4, 7), (3, 6, 6)]
)
def test_the_error_is_the_tail_of_the_singular_values(rank: int, inputs: int, outputs: int) -> None:
    """No matrix of rank R is nearer: Eckart and Young. The values are from the Gram matrix."""
    layout = layout_of(rank, inputs, outputs)
    clients = random_clients(layout, seed=rank)
    after = next_state(np.zeros(layout.size, np.float32), clients, layout)
    total = sum(examples for _, examples in clients)
    mean = sum(examples * product(tensors) for tensors, examples in clients) / total
    values = np.sqrt(np.linalg.eigvalsh(mean @ mean.T).clip(0))[::-1]
    tail = np.sqrt(np.sum(values[rank:] ** 2))
    assert tail > 0.05  # the example has something to lose
    # float32 factors: 2**-24 of each of R terms of the product; norms here are below 10
    assert np.linalg.norm(mean - product(after)) == pytest.approx(tail, abs=1e-5)
    assert np.linalg.matrix_rank(product(after), tol=1e-4) == rank


def test_a_module_that_needs_no_other_factors_keeps_them() -> None:
    """One client whose A has orthogonal rows of one length: A is already as near as it can be."""
    layout = layout_of(2, 3, 2)
    only = held([[0.0, 2.0, 0.0], [-2.0, 0.0, 0.0]], [[1.0, -3.0], [0.5, 2.0]])
    after = next_state(np.zeros(layout.size, np.float32), [(only, 5)], layout)
    for name in (f"{QUERY}.lora_A.weight", f"{QUERY}.lora_B.weight"):
        np.testing.assert_allclose(after[name], only[name], atol=1e-6)  # a rounding of float32


def test_the_new_a_has_the_size_of_the_mean_a_and_no_turn_of_it_lies_nearer() -> None:
    layout = layout_of(3, 8, 6)
    clients = random_clients(layout, seed=2)
    after = next_state(np.zeros(layout.size, np.float32), clients, layout)
    a = after[f"{QUERY}.lora_A.weight"].astype(np.float64)
    total = sum(examples for _, examples in clients)
    mean_a = sum(n * t[f"{QUERY}.lora_A.weight"].astype(np.float64) for t, n in clients) / total
    assert np.linalg.norm(a) == pytest.approx(np.linalg.norm(mean_a), rel=1e-6)
    distance = np.linalg.norm(a - mean_a)
    rng = np.random.default_rng(0)
    for _ in range(200):
        turn, _r = np.linalg.qr(rng.standard_normal((3, 3)))
        assert np.linalg.norm(turn @ a - mean_a) >= distance - 1e-6


def test_what_is_no_lora_is_averaged_as_ever() -> None:
    layout = layout_of(1, 2, 2)
    state = layout.pack(held([[1.0, 1.0]], [[0.0], [0.0]], bias=0.5))
    clients = [
        (held([[1.0, 0.0]], [[2.0], [4.0]], bias=2.0), 1),
        (held([[0.0, 2.0]], [[1.0], [2.0]], bias=6.0), 3),
    ]
    assert next_state(state, clients, layout)[BIAS].tolist() == [5.0] * 3  # (1*2 + 3*6) / 4


def test_a_module_is_averaged_over_its_holders_and_stays_where_there_is_none() -> None:
    layout = layout_of(1, 2, 2, sites=2)
    begin = {
        **held([[1.0, 1.0]], [[0.0], [0.0]]),
        **held([[0.1, 0.3]], [[0.7], [0.9]], VALUE),
    }
    state = layout.pack(begin)
    first = layout.first(3)
    short = first.pack(held([[1.0, 0.0]], [[2.0], [4.0]])) - state[: first.size]
    both = {**held([[3.0, 0.0]], [[2.0], [4.0]]), **held([[2.0, 0.0]], [[1.0], [0.0]], VALUE)}

    after = layout.unpack(
        mean_of_products(state, [(short, 3), (layout.pack(both) - state, 1)], layout)
    )
    # of the first (3*[[2, 0], [4, 0]] + 1*[[6, 0], [12, 0]]) / 4, of the second its only holder's
    np.testing.assert_allclose(product(after), [[3.0, 0.0], [6.0, 0.0]], atol=2e-6)
    np.testing.assert_allclose(product(after, VALUE), [[2.0, 0.0], [0.0, 0.0]], atol=1e-6)

    alone = layout.unpack(mean_of_products(state, [(short, 3)], layout))
    for factor in ("lora_A", "lora_B"):
        name = f"{VALUE}.{factor}.weight"
        assert alone[name].tobytes() == begin[name].tobytes()


def test_modules_that_nobody_moved_stay_zero_with_an_a_of_the_usual_size() -> None:
    layout = layout_of(2, 3, 3)
    begin = held([[0.5, 0.0, 0.1], [0.0, -0.5, 0.2]], np.zeros((3, 2)))
    state = layout.pack(begin)
    after = next_state(state, [(begin, 1), (begin, 2)], layout)
    assert not after[f"{QUERY}.lora_B.weight"].any()
    a = f"{QUERY}.lora_A.weight"
    assert np.linalg.norm(after[a]) == pytest.approx(np.linalg.norm(begin[a]), rel=1e-6)


def test_a_mean_a_of_zero_leaves_finite_factors() -> None:
    """Two devices with opposite A: their mean has no size to go by, and their products have."""
    layout = layout_of(1, 2, 2)
    state = layout.pack(held([[1.0, 1.0]], [[0.0], [0.0]]))
    clients = [
        (held([[1.0, 0.0]], [[2.0], [4.0]]), 1),
        (held([[-1.0, 0.0]], [[-2.0], [-4.0]]), 1),
    ]
    after = next_state(state, clients, layout)
    np.testing.assert_allclose(product(after), [[2.0, 0.0], [4.0, 0.0]], atol=1e-6)


@pytest.mark.parametrize(("inputs", "outputs"), [(2, 5), (5, 2), (1, 1)])
def test_a_projection_narrower_than_the_rank_keeps_its_product(inputs: int, outputs: int) -> None:
    rng = np.random.default_rng(inputs)
    wanted = rng.standard_normal((outputs, inputs))
    like = rng.standard_normal((3, inputs)).astype(np.float32)
    a, b = factors(wanted, like=like)
    assert (a.shape, b.shape) == ((3, inputs), (outputs, 3))
    np.testing.assert_allclose(b.astype(np.float64) @ a, wanted, atol=1e-6)  # as above


def test_updates_are_taken_once_and_in_order_and_the_same_give_the_same_bits() -> None:
    layout = layout_of(2, 5, 4)
    state = np.zeros(layout.size, np.float32)
    updates = [(layout.pack(tensors), n) for tensors, n in random_clients(layout, seed=9)]
    taken: list[int] = []

    def one_by_one() -> object:
        for update, n in updates:
            taken.append(n)
            yield update, n

    once = mean_of_products(state, one_by_one(), layout)  # type: ignore[arg-type]
    assert taken == [1, 4, 7]
    assert once.dtype == np.float32
    assert mean_of_products(state, updates, layout).tobytes() == once.tobytes()
