"""What may come in: counted by hand, on a clock that passes when a test says so."""

from __future__ import annotations

import pytest

from cloud_aggregator.door import Bucket, Door, DoorLimits
from messaging import topics
from messaging.chunks import CHUNK_BYTES
from messaging.transfer import UploadLimits
from tests.cloud_aggregator.conftest import RUN, Clock


class Hall:
    """A door, and what it let in."""

    def __init__(self, **limits: float) -> None:
        self.clock = Clock()
        self.admitted: list[tuple[str, bytes]] = []
        self.door = Door(
            DoorLimits(**limits),  # type: ignore[arg-type]
            lambda *packet: self.admitted.append(packet),
            self.clock,
        )

    def send(self, client: str, payload: bytes = b"x", times: int = 1) -> int:
        """Send the same so often; return how often it was let in."""
        before = len(self.admitted)
        for _ in range(times):
            self.door.deliver(topics.control(RUN, client), payload)
        return len(self.admitted) - before


def test_a_bucket_gives_what_came_back_and_no_more_than_it_holds() -> None:
    bucket = Bucket(rate=2.0, capacity=10.0, now=0.0)
    assert bucket.holds(10, 0.0)
    bucket.take(10)
    assert not bucket.holds(1, 0.25)  # half a token
    assert bucket.holds(1, 0.5)
    bucket.take(1)
    assert bucket.holds(10, 100.0)
    assert not bucket.holds(10.5, 100.0)


def test_one_client_has_its_burst_and_then_its_rate_and_others_have_theirs() -> None:
    hall = Hall(messages_per_second=2, burst_messages=5)
    assert hall.send("a", times=8) == 5
    assert hall.send("b", times=5) == 5  # nobody waits for a
    hall.clock.now = 1.5
    assert hall.send("a", times=8) == 3
    assert hall.door.refusals() == [("a", "rate", 8)]
    assert hall.door.refusals() == []


def test_bytes_have_a_rate_of_their_own() -> None:
    hall = Hall(bytes_per_second=100, burst_bytes=250)
    assert hall.send("a", bytes(100), times=4) == 2
    assert hall.send("a", bytes(50)) == 1
    hall.clock.now = 0.5
    assert hall.send("a", bytes(51)) == 0
    assert hall.send("a", bytes(50)) == 1


def test_what_is_too_large_is_refused_by_its_size_and_takes_nothing_of_the_rate() -> None:
    hall = Hall(largest_bytes=10, burst_messages=1, messages_per_second=1)
    assert hall.send("a", bytes(11), times=3) == 0
    assert hall.send("a", bytes(10)) == 1
    assert hall.door.refusals() == [("", "size", 3)]  # nobody knew a then


def test_what_waits_is_bounded_whoever_sends_until_it_is_taken() -> None:
    """512 bytes are reckoned around each message: one of a byte is no smaller in memory."""
    hall = Hall(waiting_bytes=3 * 512 + 100)
    assert sum(hall.send(f"c{i}", bytes(30)) for i in range(10)) == 3
    assert hall.door.waiting_bytes == 3 * 512 + 90
    hall.door.taken(bytes(30))
    hall.door.taken(b"")  # that there is a connection came past the door
    assert hall.send("y", bytes(41)) == 0
    assert hall.send("z", bytes(40)) == 1
    assert hall.door.waiting_bytes == 3 * 512 + 100


def test_no_more_clients_are_remembered_than_there_is_room_for() -> None:
    hall = Hall(clients=3, burst_messages=1, messages_per_second=1)
    assert [hall.send(name) for name in ("a", "b", "c", "a")] == [1, 1, 1, 0]
    assert hall.send("d") == 1  # and b, silent longest, is forgotten
    assert hall.send("b") == 1  # as if it had never been there, and c with it
    assert hall.send("a") == 0
    assert len(hall.door._buckets) == 3


@pytest.mark.parametrize("name", ["", "..", "A", "a b", "x" * 65, "x" * 60_000, "é", "a-"])
def test_a_topic_of_no_client_is_refused_and_its_name_is_not_kept(name: str) -> None:
    hall = Hall()
    assert hall.send(name, times=2) == 0
    assert hall.door.refusals() == [("", "identity", 2)]
    assert not hall.door._buckets


def test_what_was_taken_back_from_the_broker_is_not_worth_a_word() -> None:
    hall = Hall()
    assert hall.send("a", b"") == 0
    assert hall.send("..", b"") == 0
    assert hall.door.refusals() == []


def test_an_honest_device_is_far_below_the_limits() -> None:
    """A full window of the largest chunks from every holder of a grant, and all of a 264 MB blob.

    A device never has more in flight than a window; its control messages are fewer than its
    chunks. At gigabit speed (125 MB/s) a blob of 264 MB is 2,151 chunks in 2.1 s.
    """
    limits, upload = DoorLimits(), UploadLimits()
    assert upload.grants * upload.window * CHUNK_BYTES <= limits.waiting_bytes / 8
    chunks = -(-264_000_000 // (CHUNK_BYTES - 64))
    assert 2 * chunks <= limits.burst_messages / 4
    assert limits.bytes_per_second / 4 >= 125_000_000
    assert limits.largest_bytes >= CHUNK_BYTES
