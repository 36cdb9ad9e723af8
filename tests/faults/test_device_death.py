"""A device that is killed, whatever it is at, gives the update that it would have given, once."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.faults.play import DEVICES, Play
from tests.faults.processes import Hold, at

pytestmark = pytest.mark.faults

Undisturbed = Callable[..., dict[int, str]]


@pytest.mark.parametrize("round_", [1, 2])
def test_a_device_killed_while_it_trains_goes_on_from_its_last_step(
    round_: int, play: Play, undisturbed: Undisturbed
) -> None:
    cloud, others = play.cloud(), play.others("pi-1")
    doomed = play.device("pi-1", hold=at("step", round=round_, step=3))
    doomed.wait_held()
    doomed.kill()
    again = play.device("pi-1")
    play.finish(cloud, again, *others.values())
    again.wait_for("resumed", round=round_, step=2)
    assert again.count("step", round=round_) == 1
    assert play.accepted == [list(DEVICES)] * 2
    assert play.states == undisturbed()


@pytest.mark.parametrize(
    "hold",
    [at("offered"), at("sent", chunk=1), at("sent", chunk=3)],
    ids=["offered", "first chunk sent", "some chunks sent"],
)
def test_a_device_killed_while_it_uploads_sends_the_update_that_it_kept(
    hold: Hold, play: Play, undisturbed: Undisturbed
) -> None:
    cloud, others = play.cloud(), play.others("pi-1")
    doomed = play.device("pi-1", hold=hold)
    doomed.wait_held()
    doomed.kill()
    again = play.device("pi-1")
    play.finish(cloud, again, *others.values())
    assert again.count("step", round=1) == 0
    assert play.states == undisturbed()


def test_a_device_killed_while_it_waits_for_others_is_no_loss(
    play: Play, undisturbed: Undisturbed
) -> None:
    cloud = play.cloud()
    doomed, slow = play.device("pi-1"), play.device("pi-2", hold=at("step", round=1, step=1))
    others = play.others("pi-1", "pi-2")
    slow.wait_held()
    cloud.wait_for("update", client="pi-1", round=1)
    doomed.kill()
    cloud.wait_for("hello", client="pi-1", online=False)
    again = play.device("pi-1")
    cloud.wait_for("hello", client="pi-1", online=True, times=2)
    slow.let_go()
    play.finish(cloud, again, slow, *others.values())
    assert again.count("step", round=1) == 0
    assert play.accepted == [list(DEVICES)] * 2
    assert play.states == undisturbed()


def test_a_device_killed_before_it_heard_that_its_update_is_in_is_asked_no_more(
    play: Play, undisturbed: Undisturbed
) -> None:
    cloud = play.cloud(hold=at("update", client="pi-1", round=1))  # on disk, DONE not said
    doomed, others = play.device("pi-1"), play.others("pi-1")
    cloud.wait_held()
    doomed.kill()
    again = play.device("pi-1")
    again.wait_for("connected")
    cloud.let_go()
    play.finish(cloud, again, *others.values())
    assert again.count("step", round=1) == 0
    assert cloud.count("granted", client="pi-1", round=1) == 1
    assert play.accepted == [list(DEVICES)] * 2
    assert play.states == undisturbed()


def test_a_device_killed_while_it_measures_settles_its_residual_once(
    play: Play, undisturbed: Undisturbed
) -> None:
    cloud, others = play.cloud(), play.others("pi-1")
    doomed = play.device("pi-1", hold=at("measured", round=1))
    doomed.wait_held()
    doomed.kill()
    again = play.device("pi-1")
    play.finish(cloud, again, *others.values())
    assert play.accepted == [list(DEVICES)] * 2
    assert play.states == undisturbed()


def test_a_device_away_at_the_end_of_a_round_is_asked_in_the_next(
    play: Play, undisturbed: Undisturbed
) -> None:
    cloud = play.cloud(hold=at("round", round=1))
    doomed, others = play.device("pi-1"), play.others("pi-1")
    cloud.wait_held()
    doomed.kill()
    play.broker.wait_for("pwff-faulty-pi-1 closed its connection")
    cloud.let_go()
    again = play.device("pi-1")
    play.finish(cloud, again, *others.values())
    assert play.accepted == [list(DEVICES)] * 2
    assert play.states == undisturbed()


def test_every_device_killed_at_once_is_waited_for(play: Play, undisturbed: Undisturbed) -> None:
    cloud = play.cloud()
    doomed = play.others(hold=at("step", round=2, step=1))
    for device in doomed.values():
        device.wait_held()
    for device in doomed.values():
        device.kill()
    again = play.others()
    play.finish(cloud, *again.values())
    assert play.accepted == [list(DEVICES)] * 2
    assert play.states == undisturbed()


def test_a_device_that_is_told_to_leave_puts_down_where_its_training_stands(
    play: Play, undisturbed: Undisturbed
) -> None:
    cloud, others = play.cloud(), play.others("pi-1")
    leaving = play.device("pi-1", hold=at("step", round=1, step=2))
    leaving.wait_held()
    leaving.terminate()
    leaving.wait_for("leaving")
    leaving.let_go()
    assert leaving.finish() == {"failures": []}
    assert leaving.count("step", round=1, step=3) == 0
    again = play.device("pi-1")
    play.finish(cloud, again, *others.values())
    again.wait_for("resumed", round=1, step=2)
    assert play.states == undisturbed()
