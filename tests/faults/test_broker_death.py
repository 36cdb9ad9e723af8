"""A broker that is absent, restarted or killed loses no update, and changes no bit of a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.broker import Mosquitto
from tests.faults.play import DEVICES, Play
from tests.faults.processes import Actor, Hold, at, ended

pytestmark = pytest.mark.faults

Undisturbed = Callable[..., dict[int, str]]


def test_a_broker_that_is_down_at_the_start_is_waited_for(
    tmp_path: Path, undisturbed: Undisturbed
) -> None:
    broker = Mosquitto(tmp_path)
    play = Play(tmp_path, broker)
    with ended(play.actors):
        cloud, devices = play.cloud(), play.others()
        for actor in (cloud, *devices.values()):
            actor.wait_for("log", level="WARNING", said=f"no broker at {broker.url}, trying again")
        broker.start()
        play.finish(cloud, *devices.values())
        assert play.states == undisturbed()
    broker.kill()


@pytest.mark.parametrize("end", [Mosquitto.stop, Mosquitto.kill], ids=["restarted", "killed"])
@pytest.mark.parametrize(
    "hold",
    [
        at("step", round=1, step=2),
        at("offered", times=1),
        at("sent", chunk=2),
        at("measured", round=1),
    ],
    ids=["training", "offering", "in the middle of uploads", "measuring"],
)
def test_a_broker_that_ends_in_a_round_changes_no_bit(
    hold: Hold, end: Callable[[Mosquitto], None], play: Play, undisturbed: Undisturbed
) -> None:
    cloud, devices = play.cloud(), play.others(hold=hold)
    for device in devices.values():
        device.wait_held()
    _fall_and_come_again(play.broker, end)
    for device in devices.values():
        device.let_go()
    play.finish(cloud, *devices.values())
    assert play.accepted == [list(DEVICES)] * 2
    assert play.states == undisturbed()


@pytest.mark.parametrize(
    "hold",
    [
        at("task", work="train", round=1),
        at("granted", times=2),
        at("update", round=1, times=3),
        at("task", work="evaluate", round=1),
        at("round", round=2),
    ],
    ids=["giving tasks", "granting", "all updates in", "aggregated", "over"],
)
def test_a_broker_killed_while_the_aggregator_speaks_changes_no_bit(
    hold: Hold, play: Play, undisturbed: Undisturbed
) -> None:
    cloud, devices = play.cloud(hold=hold), play.others()
    cloud.wait_held()
    _fall_and_come_again(play.broker, Mosquitto.kill)
    cloud.let_go()
    play.finish(cloud, *devices.values())
    assert play.states == undisturbed()


def test_a_broker_that_flaps_changes_no_bit(play: Play, undisturbed: Undisturbed) -> None:
    cloud = play.cloud()
    slow = play.device("pi-1", hold=at("step", round=1, step=1))
    devices = play.others("pi-1")
    slow.wait_held()
    for times in (2, 3, 4):
        _fall_and_come_again(play.broker, Mosquitto.kill)
        _all_back(times, cloud, slow, *devices.values())
    slow.let_go()
    play.finish(cloud, slow, *devices.values())
    assert play.states == undisturbed()


def _fall_and_come_again(broker: Mosquitto, end: Callable[[Mosquitto], None]) -> None:
    end(broker)
    broker.start()


def _all_back(times: int, _cloud: Actor, *devices: Actor) -> None:
    for device in devices:
        device.wait_for("connected", times=times)
