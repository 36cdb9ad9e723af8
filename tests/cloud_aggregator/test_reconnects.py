"""The window over which devices return: opened for a fleet that would return in one burst."""

from __future__ import annotations

from cloud_aggregator.reconnects import BURST, Reconnects


def test_a_small_fleet_returns_at_once() -> None:
    window = Reconnects(BURST)
    assert window.seconds == 0.0
    assert not any(window.greeted(0.0, BURST) for _ in range(BURST))


def test_a_large_fleet_that_is_known_returns_at_fifty_a_second_from_the_beginning() -> None:
    assert Reconnects(10_000).seconds == 200.0


def test_a_burst_of_greetings_opens_the_window_and_another_one_doubles_it() -> None:
    window = Reconnects(0)
    widened = [window.greeted(0.001 * i, 1000) for i in range(BURST + 1)]
    assert widened == [False] * BURST + [True]
    assert window.seconds == 20.0
    assert [window.greeted(100.0, 1000) for _ in range(BURST + 1)][-1]
    assert window.seconds == 40.0


def test_greetings_that_come_over_a_longer_time_are_no_burst() -> None:
    window = Reconnects(0)
    # one every 11 ms: 455 within any 5 seconds
    assert not any(window.greeted(0.011 * i, 5000) for i in range(5000))


def test_the_window_has_an_end() -> None:
    window = Reconnects(10_000_000)
    assert window.seconds == 3600.0
    assert not any(window.greeted(0.0, 10_000_000) for _ in range(BURST + 1))
