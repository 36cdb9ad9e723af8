"""Links that are slow, full or dark, and clocks that are wrong: a run's bits are the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.broker import Mosquitto
from tests.faults.play import DEVICES, Play
from tests.faults.processes import Clock, at, ended
from tests.faults.wire import Wire

pytestmark = pytest.mark.faults

Undisturbed = Callable[..., dict[int, str]]
DAY = 86_400.0


@pytest.fixture
def wire(play: Play) -> Iterator[Wire]:
    """Yield a link to the run's broker."""
    wire = Wire(play.broker.port)
    yield wire
    wire.close()


def test_a_slow_device_loses_its_grant_to_another(play: Play, undisturbed: Undisturbed) -> None:
    clock = Clock()
    cloud = play.cloud(codec="fp32", grants=1, clock=clock)
    slow = play.device("pi-1", hold=at("sent", chunk=2), clock=Clock(pace=30.0))
    others = play.others("pi-1", hold=at("step", round=1, step=1))
    for device in (slow, *others.values()):
        device.wait_held()
    for device in others.values():
        device.let_go()
        device.wait_for("offered")
    assert cloud.count("granted") == 1
    clock.jump(31.0)  # a grant holds for 30 s without a chunk
    cloud.wait_for("update", times=2, round=1)
    slow.let_go()
    play.finish(cloud, slow, *others.values())
    assert cloud.count("granted", client="pi-1", round=1) >= 2
    assert play.accepted == [list(DEVICES)] * 2
    assert play.states == undisturbed(codec="fp32")


@pytest.mark.parametrize("seconds", [DAY, -DAY], ids=["ahead", "behind"])
@pytest.mark.parametrize("who", ["a device", "the aggregator"])
def test_a_clock_that_is_off_by_a_day_changes_no_bit(
    who: str, seconds: float, play: Play, undisturbed: Undisturbed
) -> None:
    wrong: dict[str, Any] = {"clock": Clock(offset=seconds), "calendar_ahead": seconds}
    cloud = play.cloud(**(wrong if who == "the aggregator" else {}))
    devices = play.others("pi-1")
    one = play.device("pi-1", **(wrong if who == "a device" else {}))
    play.finish(cloud, one, *devices.values())
    assert play.accepted == [list(DEVICES)] * 2
    assert play.states == undisturbed()


def test_a_day_that_passes_in_a_round_changes_no_bit(play: Play, undisturbed: Undisturbed) -> None:
    clock = Clock()  # of all, as where a cloud machine and its devices are suspended for a day
    cloud = play.cloud(clock=clock)
    devices = play.others(hold=at("step", round=1, step=2), clock=clock)
    for device in devices.values():
        device.wait_held()
    clock.jump(DAY)
    for device in devices.values():
        device.let_go()
    play.finish(cloud, *devices.values())
    assert play.accepted == [list(DEVICES)] * 2
    assert play.states == undisturbed()


def test_a_link_that_is_cut_for_half_a_minute_changes_no_bit(
    play: Play, wire: Wire, undisturbed: Undisturbed
) -> None:
    clock = Clock()
    cloud = play.cloud(codec="fp32", clock=clock)
    devices = play.others(hold=at("sent", chunk=3), via=wire.url, clock=clock)
    for device in devices.values():
        device.wait_held()
    wire.cut()
    for device in devices.values():
        device.let_go()
    for _ in range(6):  # devices offer again each 5 s; grants expire after 30 s of silence
        before = {device: device.count("offered") for device in devices.values()}
        clock.jump(5.0)
        for device, times in before.items():
            device.wait_for("offered", times=times + 1)
    wire.mend()
    play.finish(cloud, *devices.values())
    assert play.accepted == [list(DEVICES)] * 2
    assert play.states == undisturbed(codec="fp32")


def test_a_link_that_breaks_after_it_was_dark_is_made_anew(
    play: Play, wire: Wire, undisturbed: Undisturbed
) -> None:
    clock = Clock()
    cloud = play.cloud(codec="fp32", clock=clock)
    devices = play.others(hold=at("sent", chunk=3), via=wire.url, clock=clock)
    for device in devices.values():
        device.wait_held()
    wire.cut()
    for device in devices.values():
        device.let_go()
    clock.jump(30.0)
    for device in devices.values():
        device.wait_for("offered", times=2)
    wire.sever()  # what was on its way is lost
    wire.mend()
    play.finish(cloud, *devices.values())
    for device in devices.values():
        device.wait_for("connected", times=2)
    assert play.accepted == [list(DEVICES)] * 2
    assert play.states == undisturbed(codec="fp32")


def test_an_aggregator_that_is_cut_off_goes_on_when_it_is_back(
    play: Play, wire: Wire, undisturbed: Undisturbed
) -> None:
    cloud = play.cloud(via=wire.url)
    devices = play.others(hold=at("sent", chunk=2), clock=Clock(pace=30.0))
    for device in devices.values():
        device.wait_held()
    wire.cut()
    for device in devices.values():
        device.let_go()
    wire.sever()
    play.broker.wait_for("pwff-faulty-aggregator closed its connection")
    wire.mend()
    play.finish(cloud, *devices.values())
    assert play.states == undisturbed()


def test_a_broker_that_queues_ten_messages_drops_some_and_no_bit_changes(
    tmp_path: Path, undisturbed: Undisturbed
) -> None:
    broker = Mosquitto(tmp_path, "max_queued_messages 10", "max_inflight_messages 4")
    broker.start()
    play = Play(tmp_path, broker)
    wire = Wire(broker.port)
    with ended(play.actors):
        cloud = play.cloud(codec="fp32", window=15, via=wire.url)
        pace = Clock(pace=30.0)
        devices = play.others(hold=at("sent", chunk=1), clock=pace)
        for device in devices.values():
            device.wait_held()
        wire.cut()  # the broker has nowhere to put what it acknowledges
        for device in devices.values():
            device.let_go()
        broker.wait_for("Outgoing messages are being dropped for client pwff-faulty-aggregator")
        wire.mend()
        play.finish(cloud, *devices.values())
        assert play.accepted == [list(DEVICES)] * 2
        assert play.states == undisturbed(codec="fp32")
    wire.close()
    broker.kill()


def test_a_window_below_the_queue_loses_nothing_on_a_broker_that_queues_ten(
    tmp_path: Path, undisturbed: Undisturbed
) -> None:
    broker = Mosquitto(tmp_path, "max_queued_messages 10", "max_inflight_messages 1")
    broker.start()
    play = Play(tmp_path, broker)
    with ended(play.actors):
        states = play.run(codec="fp32", grants=1, window=8)
        assert not any("dropped" in text for text in broker.said)
        assert states == undisturbed(codec="fp32")
    broker.kill()
