"""What a late update moves, and in which order it is added."""

from __future__ import annotations

import numpy as np
import pytest

from cloud_aggregator.aggregation.asynchronous import StaleUpdate, staleness_weight, with_stale
from cloud_aggregator.aggregation.mean import weighted_mean
from messaging.layout import Vector


def vector(*values: float) -> Vector:
    return np.array(values, np.float32)


def stale(client: str, round_: int, staleness: int, value: float, examples: int) -> StaleUpdate:
    return StaleUpdate(
        client=client,
        round=round_,
        staleness=staleness,
        vector=vector(value),
        examples=examples,
    )


@pytest.mark.parametrize(("staleness", "share"), [(0, 1.0), (3, 0.5), (8, 1 / 3), (99, 0.1)])
def test_an_update_counts_by_the_root_of_its_age(staleness: int, share: float) -> None:
    # one rounding of a power, far below this
    assert staleness_weight(staleness) == pytest.approx(share, rel=1e-15)


def test_an_update_from_the_future_is_refused() -> None:
    with pytest.raises(ValueError, match="staleness = -1"):
        staleness_weight(-1)


def test_a_stale_update_moves_the_mean_by_its_share_and_weighs_as_much_as_a_fresh_one() -> None:
    # 2 examples of 8 by half, 3 of 1: 8 + 3 = 11 by 5
    mixed = list(with_stale([(vector(1.0), 3)], [stale("a", 1, 3, 8.0, 2)]))
    assert weighted_mean(mixed, 1).tolist() == [np.float32(11 / 5)]


def test_a_round_of_nothing_but_stale_updates_does_not_follow_them_in_full() -> None:
    assert weighted_mean(with_stale([], [stale("a", 1, 3, 8.0, 2)]), 1).tolist() == [4.0]


def test_stale_updates_come_first_in_the_order_of_round_and_client() -> None:
    old = [stale("b", 1, 3, 2.0, 1), stale("a", 4, 0, 3.0, 2), stale("c", 4, 0, 4.0, 3)]
    mixed = [(float(v[0]), n) for v, n in with_stale([(vector(9.0), 4)], old)]
    assert mixed == [(1.0, 1), (3.0, 2), (4.0, 3), (9.0, 4)]


@pytest.mark.parametrize("second", [("a", 1), ("b", 1), ("z", 0)])
def test_another_order_or_one_that_comes_twice_is_refused(second: tuple[str, int]) -> None:
    first = stale("b", 1, 1, 1.0, 1)
    client, round_ = second
    with pytest.raises(ValueError, match="in order, each once"):
        list(with_stale([], [first, stale(client, round_, 1, 1.0, 1)]))
