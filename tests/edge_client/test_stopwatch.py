"""Seconds go to the innermost part that is at work, and to nobody outside of any."""

from __future__ import annotations

import itertools

import pytest

from edge_client.stopwatch import Stopwatch, timed


def test_the_time_of_a_part_inside_another_counts_for_the_inner_one_alone() -> None:
    ticks = itertools.count()  # one second at each look at the clock
    watch = Stopwatch(clock=lambda: float(next(ticks)))
    with watch.running(), timed("training"), timed("generation"):
        pass  # training from 0 to 1 and from 2 to 3, generation in between
    assert watch.seconds == {"training": 2.0, "generation": 1.0}


def test_nothing_is_taken_where_nobody_asked_for_it() -> None:
    watch = Stopwatch()
    with timed("training"):
        pass
    assert watch.seconds == {}


def test_a_part_that_fails_counts_until_then() -> None:
    ticks = itertools.count()
    watch = Stopwatch(clock=lambda: float(next(ticks)))
    with pytest.raises(ValueError, match="invalid"), watch.running(), timed("disk"):
        int("x")
    assert watch.seconds == {"disk": 1.0}
