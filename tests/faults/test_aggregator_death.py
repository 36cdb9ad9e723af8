"""An aggregator that is killed, whatever it is at, goes on to the bits of one that was not."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from messaging import topics
from messaging.chunks import Missing
from messaging.protocol import Grant, decode
from tests.faults.base import CHUNKS, RUN
from tests.faults.cloud import open_store
from tests.faults.intruder import Intruder
from tests.faults.play import DEVICES, Play
from tests.faults.processes import Actor, Hold, at, wait_for_files

pytestmark = pytest.mark.faults

Undisturbed = Callable[..., dict[int, str]]

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
    hold: Hold, play: Play, undisturbed: Undisturbed
) -> None:
    doomed = play.cloud(hold=hold)
    devices = play.others()
    doomed.wait_held()
    doomed.kill()
    play.finish(play.cloud(), *devices.values())
    assert play.accepted == [list(DEVICES)] * 2
    assert play.states == undisturbed()


def test_an_aggregator_killed_in_the_middle_of_uploads_keeps_the_chunks_that_it_had(
    play: Play, undisturbed: Undisturbed
) -> None:
    doomed = play.cloud(codec="fp32")
    devices = play.others(hold=at("sent", chunk=4))
    for device in devices.values():
        device.wait_held()
    parts = play.out / "spool" / "1"
    wait_for_files(lambda: [sum(p.read_bytes()[-CHUNKS:]) for p in parts.glob("*.part")], [4] * 3)
    doomed.kill()
    witness = Intruder(play.broker.url)
    again = play.cloud(codec="fp32")
    for device in devices.values():
        device.let_go()
    for name in DEVICES:
        _, packet = witness.wait_for(partial(_is_grant, topics.down(RUN, name)))
        grant = decode(packet[packet.index(b'{"schema"') :])
        assert isinstance(grant, Grant)
        assert not Missing.from_bitmap(grant.missing, CHUNKS).indices & {0, 1, 2, 3}
    witness.close()
    play.finish(again, *devices.values())
    assert play.accepted == [list(DEVICES)] * 2
    assert play.states == undisturbed(codec="fp32")


def _is_grant(topic: str, heard_on: str, payload: bytes) -> bool:
    return heard_on == topic and b'"GRANT"' in payload


def test_an_aggregator_killed_at_any_statement_while_it_makes_its_store_makes_it_whole(
    tmp_path: Path,
) -> None:
    whole = Actor("store", open_store, folder=tmp_path / "whole")
    assert whole.finish() == {"epoch": 1}
    statements = whole.count("statement")
    assert statements > 4  # there are four tables
    for number in range(1, statements + 1):
        folder = tmp_path / str(number)
        doomed = Actor("store", open_store, hold=at("statement", times=number), folder=folder)
        doomed.wait_held()
        doomed.kill()
        assert Actor("store", open_store, folder=folder).finish() == {"epoch": 1}


def test_an_aggregator_that_is_told_to_leave_goes_on_where_it_was(
    play: Play, undisturbed: Undisturbed
) -> None:
    first = play.cloud()
    slow = play.device("pi-1", hold=at("step", round=1, step=2))
    others = play.others("pi-1")
    first.wait_for("update", round=1, times=2)
    first.terminate()
    assert first.finish() == {"status": "stopped"}
    slow.wait_held()
    slow.let_go()
    play.finish(play.cloud(), slow, *others.values())
    assert play.accepted == [list(DEVICES)] * 2
    assert play.states == undisturbed()


def test_an_aggregator_killed_when_all_have_left_ends_when_it_is_started_again(
    play: Play, undisturbed: Undisturbed
) -> None:
    doomed = play.cloud(hold=at("end"))
    devices = play.others()
    for device in devices.values():
        device.finish()
    doomed.wait_held()
    doomed.kill()
    play.finish(play.cloud())
    assert play.states == undisturbed()
