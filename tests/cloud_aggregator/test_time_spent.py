"""Where a round's time went: sums over devices, each phase of a device once."""

from __future__ import annotations

import itertools

from cloud_aggregator.time_spent import TimeSpent


def test_what_a_device_says_twice_counts_once_and_taking_begins_anew() -> None:
    ticks = itertools.count()
    spent = TimeSpent(clock=lambda: float(next(ticks)))
    for _ in range(2):
        spent.told("a", "offer", {"training": 2.0, "codec": 0.5})
    spent.told("a", "evaluate", {"evaluation": 1.0})
    spent.told("b", "offer", {"training": 3.0})
    with spent.part("aggregation"):
        pass
    assert spent.taken() == {
        "aggregation": 1.0,
        "codec": 0.5,
        "evaluation": 1.0,
        "training": 5.0,
    }
    assert spent.taken() == {}
