"""An aggregator that is killed, whatever it is at, goes on to the bits of one that was not."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.faults.play import DEVICES, Play
from tests.faults.processes import Hold, at

pytestmark = pytest.mark.faults

STATES = {
    "gathering": at("hello", online=True, times=2),
    "measuring before the first round": at("report", times=2),
    "about to give tasks": at("task", work="train", round=1),
    "uploads granted": at("granted", times=2),
    "one update in": at("update", round=1),
    "all updates in": at("update", round=1, times=3),
    "closed and aggregated": at("task", work="evaluate", round=1),
    "measuring after a round": at("report", round=1, times=2),
    "evaluated": at("round", round=1),
    "all updates of the last round in": at("update", round=2, times=3),
    "the last round evaluated": at("round", round=2),
    "saying that the run is over": at("hello", online=False),
}


@pytest.mark.parametrize("hold", STATES.values(), ids=STATES)
def test_an_aggregator_killed_in_any_state_ends_with_the_same_bits(
    hold: Hold, play: Play, undisturbed: Callable[..., dict[int, str]]
) -> None:
    doomed = play.cloud(hold=hold)
    devices = play.others()
    doomed.wait_held()
    doomed.kill()
    play.finish(play.cloud(), *devices.values())
    assert play.accepted == [list(DEVICES)] * 2
    assert play.states == undisturbed()


def test_an_aggregator_killed_when_all_have_left_ends_when_it_is_started_again(
    play: Play, undisturbed: Callable[..., dict[int, str]]
) -> None:
    doomed = play.cloud(hold=at("end"))
    devices = play.others()
    for device in devices.values():
        device.finish()
    doomed.wait_held()
    doomed.kill()
    play.finish(play.cloud())
    assert play.states == undisturbed()
