"""Whoever publishes what is malformed, forged, old or another run's changes no bit of a run."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from messaging import topics
from messaging.chunks import HEADER, MAGIC, make_chunk, parse_chunk
from messaging.errors import ProtocolError
from messaging.protocol import decode
from tests.faults.base import CHUNK_BYTES, RUN
from tests.faults.intruder import Intruder
from tests.faults.play import DEVICES, Play
from tests.faults.processes import Clock, at

pytestmark = pytest.mark.faults

Undisturbed = Callable[..., dict[int, str]]
OTHER_RUN = "another"


@pytest.fixture
def play(play: Play) -> Play:
    """Return a run without keys: whoever publishes is read."""
    play.sealed = False
    return play


@pytest.fixture
def intruder(play: Play) -> Iterator[Intruder]:
    """Yield somebody on the run's broker."""
    intruder = Intruder(play.broker.url)
    yield intruder
    intruder.close()


def refused(play: Play, round_: int) -> dict[str, int]:
    """Return what was refused in a round, by code."""
    return play.record.rounds[round_ - 1].observed.refused


# -- what somebody else says -----------------------------------------------------------------------


def test_a_forged_chunk_with_a_right_sum_costs_the_upload_a_second_try(
    play: Play, intruder: Intruder, undisturbed: Undisturbed
) -> None:
    cloud, others = play.cloud(codec="fp32"), play.others("pi-1", clock=Clock(pace=30.0))
    victim = play.device("pi-1", hold=at("sent", chunk=1), clock=Clock(pace=30.0))
    victim.wait_held()
    topic, packet = intruder.wait_for(lambda t, p: "/c/pi-1/up/" in t and p.startswith(MAGIC))
    seen = parse_chunk(RUN, packet)
    zeros = bytes(seen.count * (CHUNK_BYTES - HEADER.size))
    intruder.publish(topic, make_chunk(RUN, seen.blob, zeros, 4, CHUNK_BYTES))
    intruder.wait_until_published()
    victim.let_go()
    play.finish(cloud, victim, *others.values())
    assert cloud.count("granted", client="pi-1", round=1) >= 2
    assert play.accepted == [list(DEVICES)] * 2
    assert play.states == undisturbed(codec="fp32")


def test_what_is_of_another_run_is_refused(
    play: Play, intruder: Intruder, undisturbed: Undisturbed
) -> None:
    cloud, others = play.cloud(), play.others("pi-1")
    held = play.device("pi-1", hold=at("step", round=1, step=1))
    held.wait_held()
    cloud.wait_for("update", times=2, round=1)
    said = [(t, p) for t, p in intruder.everything() if "/c/" in t and not t.endswith("/down")]
    for topic, payload in said:
        if payload.startswith(MAGIC):
            chunk = parse_chunk(RUN, payload)
            piece = make_chunk(OTHER_RUN, chunk.blob, chunk.payload, 0, CHUNK_BYTES)
            intruder.publish(topic, piece)
        else:
            intruder.publish(topic, payload.replace(RUN.encode(), OTHER_RUN.encode()))
    intruder.wait_until_published()
    cloud.wait_for("refused", code="run")
    cloud.wait_for("refused", code="identity")
    held.let_go()
    play.finish(cloud, held, *others.values())
    assert play.states == undisturbed()


def test_a_round_that_is_over_cannot_be_said_again(
    play: Play, intruder: Intruder, undisturbed: Undisturbed
) -> None:
    cloud, others = play.cloud(), play.others("pi-1")
    held = play.device("pi-1", hold=at("step", round=2, step=1))
    held.wait_held()
    over = [(t, p) for t, p in intruder.everything() if "/up/" in t and not _of_round(p, 2)]
    assert sum(b'"OFFER"' in payload for _, payload in over) >= len(DEVICES)
    for topic, payload in over:
        intruder.publish(topic, payload)
    intruder.wait_until_published()
    cloud.wait_for("refused", code="late", times=len(DEVICES))
    held.let_go()
    play.finish(cloud, held, *others.values())
    assert play.accepted == [list(DEVICES)] * 2
    assert play.states == undisturbed()


def _of_round(payload: bytes, round_: int) -> bool:
    return f'"round":{round_}'.encode() in payload


def test_two_devices_of_one_name_count_once(play: Play, undisturbed: Undisturbed) -> None:
    # Neither remembers anything between rounds: whichever of the two is heard says the same.
    alike: dict[str, Any] = {"remembers": False}
    cloud = play.cloud(codec="fp32")
    others = play.others("pi-1", **alike)
    one = play.device("pi-1", **alike)
    other = play.device("pi-1", folder=play.device_folder("copy"), **alike)
    play.finish(cloud, *others.values())
    assert play.accepted == [list(DEVICES)] * 2
    assert play.states == undisturbed(codec="fp32", remembers=False)
    play.broker.wait_for("Client pwff-faulty-pi-1 already connected, closing old connection")
    del one, other  # they take the connection from each other, and are ended after the test


# -- what makes no sense ---------------------------------------------------------------------------

TOPICS = [
    topics.state(RUN, "pi-1"),
    topics.control(RUN, "pi-1"),
    topics.control(RUN, "nobody"),
    topics.state(RUN, "nobody"),
    topics.data(RUN, "pi-1", "ab" * 32),
    topics.down(RUN, "pi-1"),
    topics.down(RUN, "pi-2"),
    topics.manifest(RUN),
]

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4)
    ),
    max_leaves=12,
)
WRONG: list[object] = [
    None,
    -1,
    2**64,
    1e308,
    "",
    "../../etc/passwd",
    "x" * 5000,
    [],
    {},
    True,
    "\u0000",
]


@st.composite
def spoilt_messages(draw: st.DrawFn, said: list[bytes]) -> bytes:
    """Draw a message that was really said, with a field changed, added or taken away, or cut."""
    payload = draw(st.sampled_from(said))
    fields: dict[str, Any] = json.loads(payload)
    how = draw(st.sampled_from(["change", "add", "drop", "cut", "repeat"]))
    name = draw(st.sampled_from(sorted(fields)))
    if how == "change":
        fields[name] = draw(st.sampled_from(WRONG) | JSON)
    elif how == "add":
        fields[draw(st.text(min_size=1, max_size=20))] = draw(JSON)
    elif how == "drop":
        del fields[name]
    elif how == "repeat":
        return payload + payload
    else:
        return payload[: draw(st.integers(1, len(payload) - 1))]
    return json.dumps(fields).encode()


@st.composite
def spoilt_chunks(draw: st.DrawFn) -> bytes:
    """Draw a chunk whose header says anything."""
    head = HEADER.pack(
        MAGIC,
        draw(st.integers(0, 255)),
        draw(st.binary(min_size=8, max_size=8)),
        draw(st.binary(min_size=32, max_size=32)),
        *(draw(st.integers(0, 2**32 - 1)) for _ in range(4)),
    )
    return head + draw(st.binary(max_size=200))


def malformed(said: list[bytes]) -> st.SearchStrategy[tuple[str, bytes, bool]]:
    """Return topic, payload and retention of what no device and no aggregator would say."""
    payloads = (
        st.binary(max_size=400)
        | st.sampled_from(
            [b"[" * 60_000, b'{"kind":' * 5000, b"{}", b"null", b"S" + bytes(200), b"{" * 70_000]
        )
        | JSON.map(lambda value: json.dumps(value).encode())
        | spoilt_messages(said)
        | spoilt_chunks()
    )
    return st.tuples(st.sampled_from(TOPICS), payloads.filter(_makes_no_sense), st.booleans())


def _makes_no_sense(payload: bytes) -> bool:
    try:
        if payload.startswith(MAGIC):
            parse_chunk(RUN, payload)
        else:
            decode(payload)
    except ProtocolError:
        return True
    return False


def test_whatever_malformed_is_published_changes_no_bit(
    play: Play, intruder: Intruder, undisturbed: Undisturbed
) -> None:
    cloud, others = play.cloud(), play.others("pi-1")
    held = play.device("pi-1", hold=at("step", round=1, step=1))
    held.wait_held()
    cloud.wait_for("update", times=2, round=1)
    said = sorted({p for _, p in intruder.everything() if re.match(rb'{"schema"', p)})
    kinds = {json.loads(payload)["kind"] for payload in said}
    assert kinds >= {"HELLO", "OFFER", "REPORT", "TASK", "GRANT", "DONE", "MANIFEST"}

    @settings(
        max_examples=400,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(malformed(said))
    def publish(what: tuple[str, bytes, bool]) -> None:
        topic, payload, retain = what
        intruder.publish(topic, payload, retain=retain)

    publish()
    intruder.wait_until_published()
    for actor in (cloud, held, *others.values()):
        assert actor.is_alive, actor.told[-5:]
    _take_back_what_was_retained(intruder)
    held.let_go()
    play.finish(cloud, held, *others.values())
    assert sum(refused(play, 1).values()) > 50
    assert play.accepted == [list(DEVICES)] * 2
    assert play.states == undisturbed()
    assert not (play.out.parent / "etc").exists()


def _take_back_what_was_retained(intruder: Intruder) -> None:
    """Clear the topics of nobody; those of the run's own are said anew by whoever owns them."""
    intruder.publish(topics.state(RUN, "nobody"), b"", retain=True)
