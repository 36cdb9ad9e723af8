"""Chunks that are spoilt on their way are refused and sent again: no bit of a run changes.

Every chunk of every device passes a link that spoils it once; the second time it passes as it is.
The devices' clock runs fast, so that the silence after which they offer again is short.
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator

import pytest

from messaging.chunks import HEADER, HEADER_BYTES
from tests.faults.base import CHUNKS
from tests.faults.play import DEVICES, Play
from tests.faults.processes import Clock
from tests.faults.wire import Publish, Spoil, Wire

pytestmark = pytest.mark.faults

Undisturbed = Callable[..., dict[int, str]]
SENT = CHUNKS * len(DEVICES)


class Once:
    """Spoils the first passage of each chunk that is chosen.

    Args:
        change: Returns the payload that passes instead.
        chosen: Says of an index whether that chunk is spoilt.
    """

    def __init__(
        self, change: Callable[[bytes], bytes], chosen: Callable[[int], bool] = lambda _i: True
    ) -> None:
        self._change, self._chosen = change, chosen
        self._passed: set[tuple[str, int]] = set()

    def __call__(self, publish: Publish) -> list[Publish]:
        """Return what passes instead."""
        key = publish.topic, HEADER.unpack_from(publish.payload)[4]
        if key in self._passed or not self._chosen(key[1]):
            return [publish]
        self._passed.add(key)
        return [publish.carrying(self._change(publish.payload))]


class Backwards:
    """Lets every three chunks of an update pass in the opposite order."""

    def __init__(self) -> None:
        self._kept: dict[str, list[Publish]] = defaultdict(list)

    def __call__(self, publish: Publish) -> list[Publish]:
        """Return three chunks, or none yet."""
        kept = self._kept[publish.topic]
        kept.append(publish)
        if len(kept) < 3:
            return []
        return self._kept.pop(publish.topic)[::-1]


def truncated(payload: bytes) -> bytes:
    """Return a chunk without its last seven bytes."""
    return payload[:-7]


def without_a_header(payload: bytes) -> bytes:
    """Return the beginning of a header."""
    return payload[: HEADER_BYTES - 1]


def corrupted(payload: bytes) -> bytes:
    """Return a chunk with one bit turned."""
    return payload[:-1] + bytes([payload[-1] ^ 1])


def oversize(payload: bytes) -> bytes:
    """Return a chunk with more behind it than it says."""
    return payload + bytes(500)


def oversize_and_consistent(payload: bytes) -> bytes:
    """Return a chunk with more in it than its offer has room for, sum and length right."""
    magic, version, tag, blob, index, count, _, _ = HEADER.unpack_from(payload)
    piece = payload[HEADER_BYTES:] + bytes(500)
    head = HEADER.pack(magic, version, tag, blob, index, count, len(piece), zlib.crc32(piece))
    return head + piece


def of_another_run(payload: bytes) -> bytes:
    """Return a chunk with another run's tag."""
    return payload[:8] + bytes(8) + payload[16:]


def beyond_the_broker(payload: bytes) -> bytes:
    """Return more than the broker takes in a packet; it hangs up on who sends that."""
    return payload + bytes(300_000)


@pytest.fixture
def through(play: Play) -> Iterator[Callable[[Spoil], None]]:
    """Return what does a run whose devices are all behind a link that spoils chunks."""
    wires: list[Wire] = []

    def run(spoil: Spoil) -> None:
        wires.append(Wire(play.broker.port, spoil))
        cloud = play.cloud(codec="fp32", rounds=1)
        devices = play.others(via=wires[0].url, clock=Clock(pace=30.0))
        play.finish(cloud, *devices.values())

    yield run
    for wire in wires:
        wire.close()


def test_duplicated_chunks_count_once(
    play: Play, through: Callable[[Spoil], None], undisturbed: Undisturbed
) -> None:
    through(lambda publish: [publish, publish])
    assert play.states == undisturbed(codec="fp32", rounds=1)
    assert play.accepted == [list(DEVICES)]
    # The duplicate of a last chunk comes to an upload that is over; all others are counted.
    refused = [r.observed.refused.get("grant", 0) for r in play.record.rounds]
    assert all(number <= len(DEVICES) for number in refused), refused
    assert all(r.observed.retransmitted_bytes > 0 for r in play.record.rounds)


def test_reordered_chunks_make_the_same_update(
    play: Play, through: Callable[[Spoil], None], undisturbed: Undisturbed
) -> None:
    through(Backwards())
    assert play.states == undisturbed(codec="fp32", rounds=1)
    assert not any("chunk" in r.observed.refused for r in play.record.rounds)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (truncated, "chunk"),
        (without_a_header, "chunk"),
        (corrupted, "chunk"),
        (oversize, "chunk"),
        (oversize_and_consistent, "chunk"),
        (of_another_run, "run"),
    ],
)
def test_spoilt_chunks_are_refused_one_by_one_and_sent_again(
    change: Callable[[bytes], bytes],
    code: str,
    play: Play,
    through: Callable[[Spoil], None],
    undisturbed: Undisturbed,
) -> None:
    through(Once(change))
    assert play.states == undisturbed(codec="fp32", rounds=1)
    assert play.record.rounds[0].observed.refused[code] == SENT


def test_a_packet_that_the_broker_does_not_take_costs_a_connection_and_no_bit(
    play: Play, through: Callable[[Spoil], None], undisturbed: Undisturbed
) -> None:
    through(Once(beyond_the_broker, chosen=lambda index: index == 3))
    assert play.states == undisturbed(codec="fp32", rounds=1)
    assert play.accepted == [list(DEVICES)]
