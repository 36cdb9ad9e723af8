"""A round that can end without someone does: the record names who was left out, and it goes on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.faults.play import Play
from tests.faults.processes import Clock, Hold, at
from tests.faults.wire import Wire

pytestmark = pytest.mark.faults

TWO_OF_THREE: dict[str, Any] = {"quorum": 0.66, "minimum_clients": 2, "gather_seconds": 60.0}


@pytest.fixture
def wire(play: Play) -> Iterator[Wire]:
    """Yield a link to the run's broker."""
    wire = Wire(play.broker.port)
    yield wire
    wire.close()


def statuses(play: Play, round_: int) -> dict[str, str]:
    """Return what the record says became of each device in a round."""
    return {client.id: client.status for client in play.record.rounds[round_ - 1].clients}


def test_a_device_that_dies_in_a_round_is_named_as_lost(play: Play) -> None:
    cloud, others = play.cloud(**TWO_OF_THREE), play.others("pi-1")
    doomed = play.device("pi-1", hold=at("step", round=1, step=1))
    doomed.wait_held()
    doomed.kill()
    play.finish(cloud, *others.values())
    assert play.accepted == [["pi-2", "pi-3"]] * 2
    assert statuses(play, 1) == {"pi-1": "lost", "pi-2": "aggregated", "pi-3": "aggregated"}
    assert statuses(play, 2)["pi-1"] == "skipped"


def test_a_device_that_is_late_is_named_and_takes_part_in_the_next_round(play: Play) -> None:
    cloud = play.cloud(hold=at("task", work="evaluate", round=1), **TWO_OF_THREE)
    others = play.others("pi-1")
    slow = play.device("pi-1", hold=at("step", round=1, step=1))
    cloud.wait_held()  # the others were enough
    slow.let_go()
    slow.wait_for("offered")
    cloud.let_go()
    play.finish(cloud, slow, *others.values())
    assert play.accepted[0] == ["pi-2", "pi-3"]
    assert statuses(play, 1)["pi-1"] == "late"
    assert statuses(play, 2)["pi-1"] in ("aggregated", "late", "lost")
    # It is told that nothing of its update counted, so what that left out stays left out.
    assert slow.all("measured")[1]["outcome"] in ("late", "lost")


def test_past_the_deadline_a_round_goes_on_with_who_is_there(play: Play) -> None:
    clock = Clock()
    cloud = play.cloud(minimum_clients=2, deadline_seconds=500.0, clock=clock)
    others = play.others("pi-1")
    slow = play.device("pi-1", hold=at("step", round=1, step=1))
    slow.wait_held()
    cloud.wait_for("update", times=2, round=1)
    clock.jump(501.0)
    cloud.wait_for("task", work="evaluate", round=1)
    slow.let_go()
    play.finish(cloud, slow, *others.values())
    assert play.accepted == [["pi-2", "pi-3"], ["pi-1", "pi-2", "pi-3"]]
    assert statuses(play, 1)["pi-1"] in ("late", "lost")


@pytest.mark.parametrize("value", [float("nan"), 1e30], ids=["not a number", "far too large"])
def test_a_poisoned_update_is_refused_and_named(value: float, play: Play) -> None:
    cloud, others = play.cloud(codec="fp32"), play.others("pi-1")
    bad = play.device("pi-1", poison=value)
    play.finish(cloud, bad, *others.values())
    assert play.accepted == [["pi-2", "pi-3"]] * 2
    assert [statuses(play, n)["pi-1"] for n in (1, 2)] == ["rejected", "rejected"]


def test_a_device_in_the_dark_is_named_and_is_back_when_its_link_is(play: Play, wire: Wire) -> None:
    cloud = play.cloud(hold=at("round", round=1), **TWO_OF_THREE)
    others = play.others("pi-1")
    cut_off = play.device("pi-1", hold=at("step", round=1, step=1), via=wire.url)
    cut_off.wait_held()
    wire.cut()
    cut_off.let_go()
    wire.sever()
    play.broker.wait_for("pwff-faulty-pi-1 closed its connection")
    cloud.wait_held()
    wire.mend()
    cut_off.wait_for("connected", times=2)
    cloud.let_go()
    play.finish(cloud, cut_off, *others.values())
    assert play.accepted[0] == ["pi-2", "pi-3"]
    assert statuses(play, 1)["pi-1"] == "lost"


@pytest.mark.parametrize(
    "hold",
    [at("update", round=1, times=2), at("task", work="evaluate", round=1)],
    ids=["when the quorum was in", "when it was aggregated"],
)
def test_a_quorum_that_was_accepted_before_a_kill_is_the_one_that_counts(
    hold: Hold, play: Play
) -> None:
    doomed = play.cloud(hold=hold, **TWO_OF_THREE)
    others = play.others("pi-1")
    slow = play.device("pi-1", hold=at("step", round=1, step=1))
    doomed.wait_held()
    doomed.kill()
    slow.let_go()
    slow.wait_for("offered")
    again = play.cloud(**TWO_OF_THREE)
    play.finish(again, slow, *others.values())
    assert play.accepted[0] == ["pi-2", "pi-3"]
    assert statuses(play, 1)["pi-1"] in ("late", "lost")


def test_a_broker_killed_with_a_device_lost_goes_on_with_the_others(play: Play) -> None:
    cloud = play.cloud(**TWO_OF_THREE)
    doomed = play.device("pi-1", hold=at("step", round=1, step=1))
    others = play.others("pi-1", hold=at("sent", chunk=2))
    for device in (doomed, *others.values()):
        device.wait_held()
    doomed.kill()
    cloud.wait_for("hello", client="pi-1", online=False)
    play.broker.kill()
    play.broker.start()
    for device in others.values():
        device.let_go()
    play.finish(cloud, *others.values())
    assert play.accepted[0] == ["pi-2", "pi-3"]
    assert statuses(play, 1)["pi-1"] == "lost"
