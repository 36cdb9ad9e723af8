"""Packed training steps, against autograd on padded batches of the library's model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from device_profiles.errors import InputError
from device_profiles.modules import (
    adapter_tensors,
    initial_adapters,
    initial_lora,
    lora_sites,
    lora_tensors,
)
from edge_client.data.batches import make_batch
from edge_client.data.instructions import load_instructions
from edge_client.data.packing import Packed, pack
from edge_client.data.prompts import Encoded, encode_example
from edge_client.peft.flat_state import joined, named
from edge_client.peft.packed_model import PackedModel
from edge_client.peft.tuned_model import TunedModel
from messaging.layout import Layout, Tensors
from quantization.backends.dense import Fp32Matrix
from quantization.base_model import load_base
from quantization.frozen_gpt2 import FrozenBase, load_frozen
from quantization.identity import BaseIdentity, identify
from tests.conftest import VOCABULARY
from tests.edge_client.conftest import ADAPTER_SIZE, EXAMPLES, RANK, random_tensors

PLACEMENTS = ["qkv", "wide"]


@pytest.fixture(scope="module")
def tiny(identity: BaseIdentity) -> FrozenBase:
    return load_frozen(identity)


@pytest.fixture(scope="module")
def mini() -> FrozenBase:
    return load_frozen(identify("mini"))


@pytest.fixture(scope="module")
def examples(tiny: FrozenBase) -> list[Encoded]:
    """Return five examples of different lengths; two kinds of prompt, which share beginnings."""
    return [encode_example(e, tiny.tokenizer, 128) for e in EXAMPLES]


def in_double(value: Any) -> Any:
    """Return frozen weights in double precision."""
    if isinstance(value, Tensor):
        return value.double()
    if isinstance(value, Fp32Matrix):
        return Fp32Matrix(value.dense().double())
    if isinstance(value, tuple):
        return tuple(in_double(part) for part in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = {f.name: in_double(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **parts)
    return value


def doubled(base: FrozenBase) -> FrozenBase:
    return dataclasses.replace(base, weights=in_double(base.weights))


def make(base: FrozenBase, count: int = 36, placement: str = "qkv", **changes: int) -> PackedModel:
    sizes = {"adapter_size": ADAPTER_SIZE, "lora_rank": RANK, **changes}
    return PackedModel(base, placement=placement, lora_count=count, **sizes)


def filled(model: PackedModel, spread: float = 0.3, seed: int = 0) -> Tensors:
    """Put tensors without a zero on a model, and return them."""
    rng = np.random.default_rng(seed)
    tensors = {
        n: rng.normal(0, spread, tuple(t.shape)).astype(np.float32)
        for n, t in model.trainable().items()
    }
    model.put(tensors)
    return tensors


def run(model: PackedModel, batch: Packed, **how: bool) -> tuple[float, dict[str, Tensor]]:
    """Return the mean loss and copies of its gradients."""
    count = len(batch.targets)
    loss = float(model.loss_gradient(batch, weight=1 / count, **how)) / count
    return loss, {n: g.double().clone() for n, g in model.gradients().items()}


def by_autograd(
    identity: BaseIdentity,
    like: PackedModel,
    tensors: Tensors,
    examples: Sequence[Encoded],
    *,
    count: int,
    placement: str,
    **changes: int,
) -> tuple[float, dict[str, Tensor]]:
    """Return the same of the library's model on a padded batch, in double precision."""
    sizes = {"adapter_size": ADAPTER_SIZE, "lora_rank": RANK, **changes}
    plain = TunedModel(load_base(identity), placement=placement, lora_count=count, **sizes)
    plain.put(tensors)
    plain.model.double()
    padded = make_batch(examples, 7)
    logits = plain.logits_at(padded.tokens, padded.places)
    loss = torch.nn.functional.cross_entropy(logits, padded.targets)
    parameters = plain.trainable()
    assert list(parameters) == list(like.trainable())
    gradients = torch.autograd.grad(loss, list(parameters.values())) if parameters else ()
    return loss.item(), dict(zip(parameters, gradients, strict=True))


def furthest(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Return the largest error, in terms of the largest entry of each tensor."""
    assert list(found) == list(expected)
    assert all(float(e.abs().max()) > 0 for e in expected.values())
    return max(
        float((found[n].double() - e.double()).abs().max() / e.abs().max())
        for n, e in expected.items()
    )


# -- against the library's model -------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 12, 24, 36])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_loss_and_every_gradient_are_those_of_autograd_on_padded_batches(
    tiny: FrozenBase, identity: BaseIdentity, examples: list[Encoded], placement: str, count: int
) -> None:
    model = make(tiny, count, placement)
    tensors = filled(model)
    loss, gradients = run(model, pack(examples))
    expected, wanted = by_autograd(
        identity, model, tensors, examples, count=count, placement=placement
    )
    assert loss == pytest.approx(expected, rel=1e-6)
    # This base's weights and modules are large, and amplify the rounding of fp32 on their way
    # through 12 blocks: autograd in fp32 is off by 5e-5 here, the packed pass by half of it.
    assert furthest(gradients, wanted) < 1e-4


@pytest.mark.parametrize("count", [0, 12, 24, 36])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_loss_and_every_gradient_agree_on_the_bundled_base(
    mini: FrozenBase, placement: str, count: int
) -> None:
    sizes = {"adapter_size": 10, "lora_rank": 16}
    chosen = load_instructions("kit").examples[:3]
    encoded = [encode_example(e, mini.tokenizer, 96) for e in chosen]
    model = make(mini, count, placement, **sizes)
    tensors = filled(model, spread=0.05)
    loss, gradients = run(model, pack(encoded))
    expected, wanted = by_autograd(
        mini.identity, model, tensors, encoded, count=count, placement=placement, **sizes
    )
    assert loss == pytest.approx(expected, rel=1e-6)
    assert furthest(gradients, wanted) < 1e-5  # sums of a few hundred products of 6e-8 each


# In double both agree to 1e-13 of the largest entry; 1e-10 leaves room for other processors.
# Counts that leave the lowest blocks without LoRA, without adapters too, and no block with any.
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize(
    ("placement", "count", "adapter_size"),
    [
        ("qkv", 36, ADAPTER_SIZE),
        ("wide", 36, ADAPTER_SIZE),
        ("qkv", 5, 0),
        ("qkv", 17, 0),
        ("wide", 12, 0),
        ("wide", 30, 0),
        ("wide", 17, ADAPTER_SIZE),
        ("qkv", 0, ADAPTER_SIZE),
        ("qkv", 0, 0),
    ],
)
def test_in_double_precision_nothing_is_left_between_the_two(
    *,
    tiny: FrozenBase,
    identity: BaseIdentity,
    examples: list[Encoded],
    placement: str,
    count: int,
    adapter_size: int,
    share: bool,
) -> None:
    model = make(doubled(tiny), count, placement, adapter_size=adapter_size)
    tensors = filled(model)
    loss, gradients = run(model, pack(examples, share=share))
    expected, wanted = by_autograd(
        identity,
        model,
        tensors,
        examples,
        count=count,
        placement=placement,
        adapter_size=adapter_size,
    )
    assert loss == pytest.approx(expected, rel=1e-12)
    assert not wanted or furthest(gradients, wanted) < 1e-10


def test_logits_are_those_of_the_library_at_the_places_that_predict(
    tiny: FrozenBase, identity: BaseIdentity, examples: list[Encoded]
) -> None:
    model = make(tiny)
    plain = TunedModel(
        load_base(identity),
        adapter_size=ADAPTER_SIZE,
        placement="qkv",
        lora_count=36,
        lora_rank=RANK,
    )
    plain.put(filled(model))
    padded = make_batch(examples, 7)
    with torch.no_grad():
        expected = plain.logits_at(padded.tokens, padded.places)
    # fp32 rounding over 12 blocks of logits of size 1 to 10
    torch.testing.assert_close(
        model.logits(pack(examples)), expected, rtol=0, atol=2e-5 * float(expected.abs().max())
    )


def test_any_gradient_of_the_hidden_states_is_carried_back(
    tiny: FrozenBase, examples: list[Encoded]
) -> None:
    # the directional derivative along a random change of all that trains, in double
    model = make(doubled(tiny), 13)
    filled(model)
    batch = pack(examples)
    rng = torch.Generator().manual_seed(0)
    trace = model.forward(batch)
    outward = torch.randn(trace.hidden.shape, generator=rng, dtype=torch.float64)
    model.backward(trace, outward)
    values = model.parameter()
    direction = torch.randn(values.shape, generator=rng, dtype=torch.float64)
    along = float(values.grad @ direction) if values.grad is not None else 0.0
    middle, step = values.detach().clone(), 1e-6
    sides = []
    for sign in (1, -1):
        values.data.copy_(middle + sign * step * direction)
        sides.append(float((outward * model.hidden(batch)).sum()))
    # a central difference is off by step^2 times the third derivative, and by rounding / step
    assert (sides[0] - sides[1]) / (2 * step) == pytest.approx(along, rel=1e-5)


# -- what must not matter --------------------------------------------------------------------------


def test_the_loss_of_an_example_does_not_depend_on_what_else_is_in_the_batch(
    tiny: FrozenBase, examples: list[Encoded]
) -> None:
    model = make(tiny)
    filled(model)
    alone = [float(model.score(pack([e]))[0]) for e in examples]
    for chosen in ([0, 1], [4, 2, 0], [3, 3, 1], [0, 1, 2, 3, 4], [4, 3, 2, 1, 0]):
        together = float(model.score(pack([examples[i] for i in chosen]))[0])
        # rounding: the same products in other shapes
        assert together == pytest.approx(sum(alone[i] for i in chosen), rel=1e-6)


def test_the_order_of_a_batch_and_what_it_shares_matter_to_rounding_only(
    tiny: FrozenBase, examples: list[Encoded]
) -> None:
    model = make(doubled(tiny))
    filled(model)
    loss, gradients = run(model, pack(examples))
    for other in (pack(examples[::-1]), pack(examples, share=False)):
        again, found = run(model, other)
        assert again == pytest.approx(loss, rel=1e-12)
        assert furthest(found, gradients) < 1e-10  # rounding in double, amplified by the base


@pytest.mark.parametrize("count", [0, 13, 36])
def test_a_checkpointed_step_has_the_same_bits(
    tiny: FrozenBase, examples: list[Encoded], count: int
) -> None:
    model = make(tiny, count)
    filled(model)
    loss, gradients = run(model, pack(examples))
    again, found = run(model, pack(examples), checkpoint=True)
    assert again == loss
    assert all(torch.equal(found[n], g) for n, g in gradients.items())


def test_gradients_of_parts_add_up_to_the_gradient_of_the_whole(
    tiny: FrozenBase, examples: list[Encoded]
) -> None:
    model = make(doubled(tiny))
    filled(model)
    whole = pack(examples)
    loss, gradients = run(model, whole)
    weight = 1 / len(whole.targets)
    nats = 0.0
    for i, part in enumerate((examples[:2], examples[2:3], examples[3:])):
        nats += float(model.loss_gradient(pack(part), weight=weight, add=i > 0))
    assert weight * nats == pytest.approx(loss, rel=1e-12)
    found = {n: g.clone() for n, g in model.gradients().items()}
    assert furthest(found, gradients) < 1e-10  # rounding in double, amplified by the base


def test_the_shortest_examples_there_are_train(tiny: FrozenBase, identity: BaseIdentity) -> None:
    model = make(doubled(tiny), 36)
    tensors = filled(model)
    shortest = [
        Encoded(tokens=np.array([5, 6]), response_start=1),
        Encoded(tokens=np.array([5, 9, 3]), response_start=1),
        Encoded(tokens=np.array([5, 6]), response_start=1),
    ]
    loss, gradients = run(model, pack(shortest))
    expected, wanted = by_autograd(identity, model, tensors, shortest, count=36, placement="qkv")
    assert loss == pytest.approx(expected, rel=1e-12)
    assert furthest(gradients, wanted) < 1e-10


def test_examples_as_long_as_the_base_has_positions_train(tiny: FrozenBase) -> None:
    model = make(tiny, 12)
    filled(model)
    tokens = np.arange(tiny.identity.positions) * 7 % VOCABULARY
    loss, gradients = run(model, pack([Encoded(tokens=tokens, response_start=2)]))
    assert np.isfinite(loss)
    assert all(torch.isfinite(g).all() for g in gradients.values())


# -- the base --------------------------------------------------------------------------------------


class _ProductsOnly:
    """A frozen matrix that can do what a training step may ask for, and nothing else; it counts."""

    def __init__(self, held: Any) -> None:
        self._held = held
        self.outputs, self.inputs, self.nbytes = held.outputs, held.inputs, held.nbytes
        self.backward_products = 0

    def times(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        product: Tensor = self._held.times(x, bias)
        return product

    def times_transposed(self, g: Tensor) -> Tensor:
        self.backward_products += 1
        product: Tensor = self._held.times_transposed(g)
        return product

    def rows(self, index: Tensor) -> Tensor:
        found: Tensor = self._held.rows(index)
        return found


def restricted(base: FrozenBase) -> tuple[FrozenBase, list[_ProductsOnly]]:
    """Return a base of such matrices, and these: block by block in their order, then the head."""
    matrices = []

    def wrapped(matrix: Any) -> Any:
        matrices.append(_ProductsOnly(matrix))
        return matrices[-1]

    def bare(projection: Any) -> Any:
        return dataclasses.replace(projection, matrix=wrapped(projection.matrix))

    blocks = tuple(
        dataclasses.replace(
            block,
            qkv=bare(block.qkv),
            attention_out=bare(block.attention_out),
            mlp_in=bare(block.mlp_in),
            mlp_out=bare(block.mlp_out),
        )
        for block in base.weights.blocks
    )
    embedding = wrapped(base.weights.embedding)
    weights = dataclasses.replace(base.weights, blocks=blocks, embedding=embedding)
    return dataclasses.replace(base, weights=weights), matrices


def test_a_step_asks_a_frozen_matrix_for_products_and_rows_only(
    tiny: FrozenBase, examples: list[Encoded]
) -> None:
    model, plain = make(restricted(tiny)[0]), make(tiny)
    filled(model)
    filled(plain)
    one, other = run(model, pack(examples)), run(plain, pack(examples))
    assert one[0] == other[0]
    assert all(torch.equal(one[1][n], g) for n, g in other[1].items())


# Of each block: qkv, attention_out, mlp_in, mlp_out.
@pytest.mark.parametrize(
    ("placement", "count", "adapter_size", "first_block", "there"),
    [
        ("qkv", 36, ADAPTER_SIZE, 0, [0, 1, 1, 1]),
        ("qkv", 12, 0, 0, [0, 1, 1, 1]),
        ("qkv", 11, ADAPTER_SIZE, 0, [0, 0, 1, 1]),  # an adapter is the lowest
        ("qkv", 5, 0, 7, [0, 1, 1, 1]),
        ("wide", 3, 0, 9, [0, 1, 1, 1]),
        ("qkv", 0, 0, 12, []),
    ],
)
def test_no_gradient_goes_below_the_lowest_module(
    *,
    tiny: FrozenBase,
    examples: list[Encoded],
    placement: str,
    count: int,
    adapter_size: int,
    first_block: int,
    there: list[int],
) -> None:
    base, matrices = restricted(tiny)
    model = make(base, count, placement, adapter_size=adapter_size)
    filled(model)
    run(model, pack(examples))
    products = [matrix.backward_products for matrix in matrices]
    above = [1] * (4 * (12 - first_block) - len(there))
    assert products == [*[0] * (4 * first_block), *there, *above, 1]


def test_a_base_in_int8_trains_as_its_dequantised_weights_do(
    identity: BaseIdentity, examples: list[Encoded]
) -> None:
    held = load_frozen(identity, "int8")

    def dense(value: Any) -> Any:
        if hasattr(value, "times"):
            return Fp32Matrix(value.dense())
        if isinstance(value, tuple):
            return tuple(dense(part) for part in value)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            parts = {f.name: dense(getattr(value, f.name)) for f in dataclasses.fields(value)}
            return dataclasses.replace(value, **parts)
        return value

    model = make(held, 24)
    twin = make(dataclasses.replace(held, weights=dense(held.weights)), 24)
    filled(model)
    filled(twin)
    one, other = run(model, pack(examples)), run(twin, pack(examples))
    assert one[0] == pytest.approx(other[0], rel=1e-5)  # scales go on after the product
    assert furthest(one[1], other[1]) < 1e-3  # that rounding, amplified by the base


# -- the buffer ------------------------------------------------------------------------------------


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_client_with_fewer_modules_is_the_beginning_of_the_buffer(
    tiny: FrozenBase, identity: BaseIdentity, placement: str
) -> None:
    model = make(tiny, 36, placement)
    filled(model)
    whole = model.take_flat()
    planned = [
        *adapter_tensors(identity.shape, ADAPTER_SIZE),
        *lora_tensors(lora_sites(identity.shape, placement), RANK),
    ]
    assert list(model.trainable()) == [t.name for t in planned]
    for count in (0, 12, 13, 24, 36):
        model.activate(count)
        shapes = {n: tuple(t.shape) for n, t in model.trainable().items()}
        assert shapes == {t.name: t.shape for t in planned[: 144 + 2 * count]}
        assert np.array_equal(
            model.take_flat(), whole[: sum(t.size for t in planned[: 144 + 2 * count])]
        )


def test_the_shared_part_of_a_state_is_what_its_layout_packs(
    tiny: FrozenBase, identity: BaseIdentity
) -> None:
    model = make(tiny, 12)
    tensors = filled(model)
    planned = adapter_tensors(identity.shape, ADAPTER_SIZE)
    layout = Layout.of(planned)
    packed = layout.pack({n: t for n, t in tensors.items() if n in layout.names})
    assert np.array_equal(model.take_flat()[: layout.size], packed)
    model.put_flat(2 * packed)
    after = model.take()
    assert all(np.array_equal(after[n], 2 * tensors[n]) for n in layout.names)
    assert all(np.array_equal(after[n], t) for n, t in tensors.items() if n not in layout.names)


def test_a_part_of_the_buffer_can_be_put_from_any_entry(tiny: FrozenBase) -> None:
    model = make(tiny, 12)
    filled(model)
    before = model.take_flat()
    model.put_flat(np.array([1, 2, 3], np.float32), start=5)
    assert model.take_flat()[5:8].tolist() == [1, 2, 3]
    model.put_flat(before[5:8], start=5)
    assert np.array_equal(model.take_flat(), before)


@pytest.mark.parametrize(("extra", "start"), [(1, 0), (0, 1), (0, -1)])
def test_a_vector_that_does_not_fit_the_active_modules_is_refused(
    tiny: FrozenBase, extra: int, start: int
) -> None:
    model = make(tiny, 12)
    vector = np.zeros(len(model.take_flat()) + extra, np.float32)
    with pytest.raises(InputError, match=r"entries from entry .* do not fit the \d+ of the active"):
        model.put_flat(vector, start=start)


def test_taken_tensors_are_copies_of_what_was_put(tiny: FrozenBase) -> None:
    model = make(tiny)
    model.activate(13)
    tensors = filled(model)
    taken, flat = model.take(), model.take_flat()
    assert list(taken) == list(model.trainable())
    model.put({n: np.zeros_like(t) for n, t in tensors.items()})
    assert all(np.array_equal(taken[n], tensors[n]) for n in tensors)
    assert np.array_equal(flat, joined(tensors, model.trainable()))


def test_a_tensor_that_is_absent_is_zero_in_the_joined_vector(tiny: FrozenBase) -> None:
    model = make(tiny, 12)
    tensors = filled(model)
    gone = next(iter(tensors))
    parts = named(
        joined({n: t for n, t in tensors.items() if n != gone}, model.trainable()),
        model.trainable(),
    )
    assert (parts[gone] == 0).all()
    assert all(np.array_equal(parts[n], t) for n, t in tensors.items() if n != gone)


def test_clients_with_12_and_36_modules_take_turns_on_one_model(
    tiny: FrozenBase, identity: BaseIdentity, examples: list[Encoded]
) -> None:
    shared = make(tiny)
    clients = {n: random_tensors(identity, n, seed=n) for n in (12, 36)}
    alone = {}
    for count, tensors in clients.items():
        model = make(tiny, count)
        model.put(tensors)
        alone[count] = run(model, pack(examples))
    for count in (12, 36, 12, 36):
        shared.activate(count)
        shared.put(clients[count])
        loss, gradients = run(shared, pack(examples))
        assert loss == alone[count][0]
        assert list(gradients) == list(alone[count][1])
        assert all(torch.equal(gradients[n], g) for n, g in alone[count][1].items())


def test_modules_that_are_off_get_no_gradient(tiny: FrozenBase, examples: list[Encoded]) -> None:
    model = make(tiny)
    filled(model)
    run(model, pack(examples))
    model.parameter().grad.fill_(7.0)  # type: ignore[union-attr]
    model.activate(12)
    run(model, pack(examples))
    active = set(model.trainable())
    model.activate(36)
    assert all((g == 7).all() for n, g in model.gradients().items() if n not in active)


def test_untouched_modules_compute_what_the_plain_base_computes(
    tiny: FrozenBase, identity: BaseIdentity, examples: list[Encoded]
) -> None:
    model = make(tiny)
    model.put(initial_adapters(identity.shape, ADAPTER_SIZE, seed=3))
    model.put(initial_lora(lora_sites(identity.shape, "qkv"), RANK, seed=3))
    bare = make(tiny, 0, adapter_size=0)
    assert bare.trainable() == {}
    assert torch.equal(model.logits(pack(examples)), bare.logits(pack(examples)))


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"adapter_size": -1}, "adapter size -1; choose 1 to 16"),
        ({"adapter_size": 17}, "adapter size 17; choose 1 to 16"),
        ({"lora_count": 37}, "LoRA count 37 on a base of 12 blocks"),
        ({"lora_count": -1}, "LoRA count -1 on a base of 12 blocks"),
        ({"lora_rank": 0}, "LoRA rank 0; choose 1 to 16"),
        ({"lora_rank": 17}, "LoRA rank 17; choose 1 to 16"),
        ({"placement": "qkw"}, "unknown LoRA placement 'qkw'; did you mean 'qkv'"),
    ],
)
def test_modules_that_do_not_fit_are_refused(
    tiny: FrozenBase, changes: dict[str, Any], sentence: str
) -> None:
    wanted = {"adapter_size": 4, "placement": "qkv", "lora_count": 12, "lora_rank": 2, **changes}
    build: Callable[..., PackedModel] = PackedModel
    with pytest.raises(InputError, match=sentence):
        build(tiny, **wanted)


@pytest.mark.parametrize("count", [-1, 14])
def test_more_modules_than_the_model_was_made_with_are_not_switched_on(
    tiny: FrozenBase, count: int
) -> None:
    with pytest.raises(InputError, match=f"LoRA count {count} on a model that was given 13"):
        make(tiny, 13).activate(count)


def test_a_tensor_of_a_module_that_is_off_is_not_put(tiny: FrozenBase) -> None:
    model = make(tiny)
    model.activate(12)
    name = "transformer.h.11.attn.c_attn.key.lora_A.weight"
    with pytest.raises(KeyError, match=r"key\.lora_A"):
        model.put({name: np.zeros((RANK, 16), np.float32)})
