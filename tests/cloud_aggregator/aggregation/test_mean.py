"""The mean of updates: weighted by examples, exact beyond float32, the same bits in any order."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud_aggregator.aggregation.mean import weighted_mean
from messaging.layout import Vector


def vector(*values: float) -> Vector:
    return np.array(values, np.float32)


def test_mean_weights_clients_by_their_example_count() -> None:
    # by hand: (1*2 + 3*6) / 4 and (1*-1 + 3*1) / 4
    assert weighted_mean([(vector(2.0, -1.0), 1), (vector(6.0, 1.0), 3)]).tolist() == [5.0, 0.5]


def test_the_mean_of_one_update_is_that_update() -> None:
    only = vector(0.1, -3.25, 1e-30)
    assert weighted_mean([(only, 7)]).tobytes() == only.tobytes()


def test_the_sum_keeps_what_float32_would_lose() -> None:
    # In float32 16777216 + 1 is 16777216, so the two ones would vanish: 16777216/3 = 5592405.33.
    # The true mean is 16777218/3 = 5592406 exactly.
    updates = [(vector(16_777_216.0), 1), (vector(1.0), 1), (vector(1.0), 1)]
    assert weighted_mean(updates).tolist() == [5_592_406.0]
    in_float32 = (vector(16_777_216.0) + vector(1.0) + vector(1.0)) / np.float32(3)
    assert in_float32.tolist() != [5_592_406.0]


def test_the_mean_is_float32_and_leaves_the_updates_alone() -> None:
    updates = [(vector(1.0, 2.0), 2), (vector(3.0, 5.0), 2)]
    mean = weighted_mean(updates)
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
    got = Fraction(float(weighted_mean([(vector(v), w) for v, w in updates])[0]))
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
    came = {c: (rng.standard_normal(50).astype(np.float32), 3 + i) for i, c in enumerate("abcde")}
    bits = {
        weighted_mean(dict(sorted(arrived)).values()).tobytes()
        for arrived in itertools.permutations(came.items())
    }
    assert len(bits) == 1


@pytest.mark.parametrize("updates", [[], [(vector(1.0), 0)]], ids=["none", "no examples"])
def test_a_mean_of_nothing_is_refused(updates: list[tuple[Vector, int]]) -> None:
    with pytest.raises(ValueError, match="at least one update"):
        weighted_mean(updates)


def test_updates_are_taken_one_at_a_time() -> None:
    held: list[int] = []

    def one_by_one() -> object:
        for i in range(3):
            held.append(i)
            yield vector(float(i)), 1

    assert weighted_mean(one_by_one()).tolist() == [1.0]  # type: ignore[arg-type]
    assert held == [0, 1, 2]
