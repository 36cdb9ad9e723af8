"""The mean of updates: weighted by examples, exact beyond float32, the same bits in any order.

An update may hold only the first entries; each entry is averaged over those that hold it.
"""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud_aggregator.aggregation.mean import mean_of_tensors, weighted_mean
from messaging.layout import Layout, TensorSpec, Vector


def vector(*values: float) -> Vector:
    return np.array(values, np.float32)


def test_mean_weights_clients_by_their_example_count() -> None:
    # by hand: (1*2 + 3*6) / 4 and (1*-1 + 3*1) / 4
    updates = [(vector(2.0, -1.0), 1), (vector(6.0, 1.0), 3)]
    assert weighted_mean(updates, 2).tolist() == [5.0, 0.5]


def test_the_mean_of_one_update_is_that_update() -> None:
    only = vector(0.1, -3.25, 1e-30)
    assert weighted_mean([(only, 7)], 3).tobytes() == only.tobytes()


def test_the_sum_keeps_what_float32_would_lose() -> None:
    # In float32 16777216 + 1 is 16777216, so the two ones would vanish: 16777216/3 = 5592405.33.
    # The true mean is 16777218/3 = 5592406 exactly.
    updates = [(vector(16_777_216.0), 1), (vector(1.0), 1), (vector(1.0), 1)]
    assert weighted_mean(updates, 1).tolist() == [5_592_406.0]
    in_float32 = (vector(16_777_216.0) + vector(1.0) + vector(1.0)) / np.float32(3)
    assert in_float32.tolist() != [5_592_406.0]


def test_the_mean_is_float32_and_leaves_the_updates_alone() -> None:
    updates = [(vector(1.0, 2.0), 2), (vector(3.0, 5.0), 2)]
    mean = weighted_mean(updates, 2)
    assert mean.dtype == np.float32
    assert [u.tolist() for u, _ in updates] == [[1.0, 2.0], [3.0, 5.0]]


UPDATES = st.lists(
    st.tuples(st.floats(-1e6, 1e6, width=32), st.integers(1, 10_000)), min_size=1, max_size=6
)


@given(UPDATES)
def test_the_mean_is_the_true_one_to_a_rounding_of_float32(
    updates: list[tuple[float, int]],
) -> None:
    total = sum(weight for _, weight in updates)
    true = sum(Fraction(value) * weight for value, weight in updates) / total
    got = Fraction(float(weighted_mean([(vector(v), w) for v, w in updates], 1)[0]))
    largest = max(abs(value) for value, _ in updates)
    # half a unit in the last place of float32, and at most 2*6 roundings of float64 of the largest
    assert (
        abs(got - true)
        <= abs(true) * Fraction(2) ** -24
        + Fraction(largest) * 12 * Fraction(2) ** -53
        + Fraction(2) ** -150
    )


def test_taken_in_client_order_every_order_of_arrival_gives_the_same_bits() -> None:
    rng = np.random.default_rng(5)
    came = {
        c: (rng.standard_normal(50 - 9 * i).astype(np.float32), 3 + i)
        for i, c in enumerate("abcde")
    }
    bits = {
        weighted_mean(dict(sorted(arrived)).values(), 50).tobytes()
        for arrived in itertools.permutations(came.items())
    }
    assert len(bits) == 1


@pytest.mark.parametrize("updates", [[], [(vector(1.0), 0)]], ids=["none", "no examples"])
def test_a_mean_of_nothing_is_refused(updates: list[tuple[Vector, int]]) -> None:
    with pytest.raises(ValueError, match="at least one update"):
        weighted_mean(updates, 1)


def test_updates_are_taken_one_at_a_time() -> None:
    held: list[int] = []

    def one_by_one() -> object:
        for i in range(3):
            held.append(i)
            yield vector(float(i)), 1

    assert weighted_mean(one_by_one(), 1).tolist() == [1.0]  # type: ignore[arg-type]
    assert held == [0, 1, 2]


# -- updates that hold only the first entries -----------------------------------------------------

#: Lengths 3, 2 and 1 of 4, with one, three and four examples.
MIXED = [(vector(2.0, 4.0, 6.0), 1), (vector(6.0, 8.0), 3), (vector(10.0), 4)]


def test_an_entry_is_averaged_over_those_that_hold_it() -> None:
    # (1*2 + 3*6 + 4*10) / 8, then (1*4 + 3*8) / 4, then the one that is there, then none
    assert weighted_mean(MIXED, 4).tolist() == [7.5, 7.0, 6.0, 0.0]


def test_an_entry_that_nobody_holds_stays_as_it_is() -> None:
    state = vector(1.0, -1.0, 0.5, 0.1)
    layout = Layout(tuple(TensorSpec(name=f"adapters.{i}.mlp.up.bias", shape=(1,)) for i in "0123"))
    after = mean_of_tensors(state, MIXED, layout)
    assert after.tolist() == [8.5, 6.0, 6.5, state[3]]
    assert after.dtype == np.float32
    assert state.tolist() == vector(1.0, -1.0, 0.5, 0.1).tolist()


def test_updates_of_one_length_have_the_bits_of_a_plain_sum_over_its_weight() -> None:
    rng = np.random.default_rng(11)
    updates = [(rng.standard_normal(400).astype(np.float32), n) for n in (3, 41, 1, 17)]
    plain = sum(v.astype(np.float64) * n for v, n in updates) / 62
    assert weighted_mean(updates, 400).tobytes() == plain.astype(np.float32).tobytes()


@given(
    st.lists(
        st.tuples(st.lists(st.integers(-1000, 1000), max_size=5), st.integers(1, 1000)),
        min_size=1,
        max_size=5,
    )
)
def test_each_entry_is_the_true_mean_of_its_holders(updates: list[tuple[list[int], int]]) -> None:
    got = weighted_mean([(vector(*values), n) for values, n in updates], 5)
    for i, mean in enumerate(got):
        held = [(values[i], n) for values, n in updates if len(values) > i]
        true = Fraction(sum(v * n for v, n in held), sum(n for _, n in held)) if held else 0
        # sums of integers below 2**53 are exact; one rounding of the quotient in float64 and one
        # to float32 are within 2**-24 and a little
        assert abs(Fraction(float(mean)) - true) <= abs(true) * Fraction(2**-24 + 2**-50)


def test_an_update_longer_than_the_layout_is_refused() -> None:
    with pytest.raises(ValueError, match="an update of 3 entries; at most 2 are shared"):
        weighted_mean([(vector(1.0), 1), (vector(1.0, 2.0, 3.0), 1)], 2)
