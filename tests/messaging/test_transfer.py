"""Uploads and downloads arrive whole over a network that loses, repeats and reorders.

Both ends run on one virtual clock. Nothing here waits.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from messaging.chunks import Chunk, Missing, chunk_count, make_chunk, parse_chunk
from messaging.errors import ProtocolError
from messaging.protocol import (
    Costs,
    Done,
    Grant,
    Have,
    Message,
    Offer,
    Reject,
    StateRef,
    decode,
    encode,
)
from messaging.transfer import (
    ATTEMPTS,
    SILENCE_SECONDS,
    Download,
    LimitsError,
    Upload,
    UploadDesk,
    UploadLimits,
    check_limits,
)

RUN = "night-1"
CHUNK = 1_024  # pieces of 960 bytes


def sha(blob: bytes) -> str:
    return hashlib.sha256(blob).hexdigest()


def bytes_of(length: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(length)


def offer_of(blob: bytes, client: str = "a", *, chunk_bytes: int = CHUNK) -> Offer:
    return Offer(
        run=RUN,
        client=client,
        session="0" * 16,
        round=1,
        blob=sha(blob),
        bytes=len(blob),
        chunk_bytes=chunk_bytes,
        chunks=chunk_count(len(blob), chunk_bytes),
        binding="0" * 64,
        layout="0" * 64,
        codec="fp32",
        costs=Costs(),
    )


def ref_of(blob: bytes) -> StateRef:
    chunks = chunk_count(len(blob), CHUNK)
    return StateRef(round=1, blob=sha(blob), bytes=len(blob), chunk_bytes=CHUNK, chunks=chunks)


def piece(blob: bytes, index: int, *, name: str | None = None, chunk_bytes: int = CHUNK) -> Chunk:
    return parse_chunk(RUN, make_chunk(RUN, name or sha(blob), blob, index, chunk_bytes))


class Piecewise:
    """Pieces of a blob in memory; where it is broken, the first write fails."""

    def __init__(self, size: int, *, broken: bool = False) -> None:
        self.buffer = bytearray(size)
        self.discarded = False
        self.rests = 0
        self.broken = broken

    def write(self, offset: int, payload: bytes) -> None:
        """Put a piece in its place."""
        if self.broken:
            self.broken = False
            raise OSError("no space left on device")
        self.buffer[offset : offset + len(payload)] = payload

    def rest(self) -> None:
        """Remember that nothing is granted for now."""
        self.rests += 1

    def finish(self) -> bytes:
        """Return the pieces."""
        return bytes(self.buffer)

    def discard(self) -> None:
        """Remember that the pieces were given up."""
        self.discarded = True


@dataclass
class Office:
    """A desk with everything that it said, stored and opened."""

    limits: UploadLimits = field(default_factory=UploadLimits)
    said: list[Message] = field(default_factory=list)
    stored: list[bytes] = field(default_factory=list)
    completed: list[Offer] = field(default_factory=list)
    opened: list[Piecewise] = field(default_factory=list)
    refuse: bool = False
    broken: bool = False

    def __post_init__(self) -> None:
        self.desk = UploadDesk(
            run=RUN,
            limits=self.limits,
            open_partial=self._open,
            send=lambda _client, message: self.said.append(message),
            complete=self._complete,
        )

    def _open(self, offer: Offer) -> Piecewise:
        self.opened.append(Piecewise(offer.bytes, broken=self.broken))
        return self.opened[-1]

    def _complete(self, offer: Offer, blob: bytes) -> Done | Reject:
        if self.refuse:
            return Reject(run=RUN, client=offer.client, blob=offer.blob, code="layout", reason="no")
        self.stored.append(blob)
        self.completed.append(offer)
        return Done(run=RUN, client=offer.client, blob=offer.blob, status="stored")

    def heard(self) -> list[tuple[str, str]]:
        """Return kind and client of everything said since the last call."""
        said: list[tuple[str, str]] = [
            (m.kind, m.client) for m in self.said if isinstance(m, Grant | Have | Done | Reject)
        ]
        self.said.clear()
        return said


# --- one end at a time ---


def test_an_upload_sends_nothing_without_a_grant_and_a_window_with_one() -> None:
    blob = bytes_of(9 * 960)
    upload = Upload(blob, offer_of(blob), now=0.0)
    have = Have(run=RUN, client="a", blob=sha(blob), missing=Missing(9).bitmap())
    assert upload.acknowledged(have, 0.0) == []
    grant = Grant(run=RUN, client="a", blob=sha(blob), missing="ff01", window=4, expiry_seconds=9.0)
    assert upload.granted(grant, 0.0) == [0, 1, 2, 3]
    # 1 and 3 arrived: two places in the window are free
    have = Have(run=RUN, client="a", blob=sha(blob), missing=Missing(9, {0, 2, 4, 5, 6}).bitmap())
    assert upload.acknowledged(have, 0.0) == [4, 5]
    assert upload.acknowledged(have, 0.0) == []
    # it answers the first offer, behind which they went out: they are under way still
    assert upload.granted(grant, 1.0) == []
    # it answers an offer that went out behind them: they are lost
    upload.offered_again()
    assert upload.granted(grant, 1.0) == [0, 1, 2, 3]


def test_two_grants_for_two_offers_that_crossed_send_a_chunk_once() -> None:
    # The device is slow: it offers again before it has read the grant that waits for it.
    blob = bytes_of(8 * 960)
    upload = Upload(blob, offer_of(blob), now=0.0)
    grant = Grant(
        run=RUN, client="a", blob=sha(blob), missing=Missing(8).bitmap(), window=4, expiry_seconds=9
    )
    assert upload.must_offer_again(SILENCE_SECONDS)
    assert upload.granted(grant, 6.0) == [0, 1, 2, 3]
    assert upload.granted(grant, 6.1) == []
    # nothing is heard: what went out is lost after all
    assert upload.must_offer_again(6.1 + SILENCE_SECONDS)
    assert upload.granted(grant, 12.0) == [0, 1, 2, 3]


def test_an_upload_offers_again_after_each_silence_and_only_then() -> None:
    blob = bytes_of(960)
    upload = Upload(blob, offer_of(blob), now=10.0)
    assert not upload.must_offer_again(10.0 + SILENCE_SECONDS - 0.01)
    assert upload.must_offer_again(10.0 + SILENCE_SECONDS)
    assert not upload.must_offer_again(10.0 + 2 * SILENCE_SECONDS - 0.01)
    have = Have(run=RUN, client="a", blob=sha(blob), missing="01")
    upload.acknowledged(have, 18.0)
    assert not upload.must_offer_again(18.0 + SILENCE_SECONDS - 0.01)
    assert upload.must_offer_again(18.0 + SILENCE_SECONDS)


def test_an_answer_about_another_blob_moves_nothing() -> None:
    blob, other = bytes_of(960), sha(b"other")
    upload = Upload(blob, offer_of(blob), now=0.0)
    grant = Grant(run=RUN, client="a", blob=other, missing="ffff", window=4, expiry_seconds=9.0)
    assert upload.granted(grant, 4.0) == []
    assert upload.acknowledged(Have(run=RUN, client="a", blob=other, missing="ffff"), 4.0) == []
    assert upload.must_offer_again(SILENCE_SECONDS)


def test_a_grant_of_chunks_that_the_blob_does_not_have_is_refused() -> None:
    blob = bytes_of(960)
    upload = Upload(blob, offer_of(blob), now=0.0)
    grant = Grant(run=RUN, client="a", blob=sha(blob), missing="02", window=4, expiry_seconds=9.0)
    with pytest.raises(ProtocolError) as caught:
        upload.granted(grant, 0.0)
    assert caught.value.code == "bitmap"


def test_no_more_uploads_hold_a_grant_than_the_limit_and_the_next_follows_in_order() -> None:
    office = Office(UploadLimits(grants=2))
    blobs = {client: bytes_of(960, i) for i, client in enumerate("abcd")}
    for client, blob in blobs.items():
        office.desk.offered(offer_of(blob, client), 0.0)
    assert office.heard() == [("GRANT", "a"), ("GRANT", "b")]
    with pytest.raises(ProtocolError) as caught:
        office.desk.data("c", piece(blobs["c"], 0), 0.0)
    assert caught.value.code == "grant"
    office.desk.data("b", piece(blobs["b"], 0), 1.0)
    assert office.heard() == [("DONE", "b"), ("GRANT", "c")]
    office.desk.data("a", piece(blobs["a"], 0), 1.0)
    assert office.heard() == [("DONE", "a"), ("GRANT", "d")]
    assert office.stored == [blobs["b"], blobs["a"]]


def test_the_grant_of_a_silent_upload_goes_to_the_next_and_comes_back() -> None:
    office = Office(UploadLimits(grants=1, window=1, expiry_seconds=30.0))
    a, b = bytes_of(2 * 960, 1), bytes_of(960, 2)
    office.desk.offered(offer_of(a, "a"), 0.0)
    office.desk.offered(offer_of(b, "b"), 0.0)
    office.desk.data("a", piece(a, 1), 10.0)
    assert office.heard() == [("GRANT", "a"), ("HAVE", "a")]
    office.desk.expire(39.9)
    assert office.heard() == []
    assert office.opened[0].rests == 0
    office.desk.expire(40.0)
    assert office.heard() == [("GRANT", "b")]
    assert office.opened[0].rests == 1
    with pytest.raises(ProtocolError, match="no grant"):
        office.desk.data("a", piece(a, 0), 40.0)
    office.desk.data("b", piece(b, 0), 41.0)
    done, again = office.said[-2:]
    assert isinstance(done, Done)
    assert isinstance(again, Grant)
    assert (again.client, again.missing) == ("a", "01")  # what had arrived is kept
    office.desk.data("a", piece(a, 0), 42.0)
    assert office.stored == [b, a]


def test_a_resumed_offer_is_granted_what_is_missing() -> None:
    office = Office()
    blob = bytes_of(3 * 960)
    office.desk.offered(offer_of(blob), 0.0)
    office.desk.data("a", piece(blob, 1), 0.0)
    office.desk.offered(offer_of(blob), 6.0)
    grant = office.said[-1]
    assert isinstance(grant, Grant)
    assert Missing.from_bitmap(grant.missing, 3).indices == {0, 2}
    assert len(office.opened) == 1


def test_an_update_is_completed_under_its_newest_offer() -> None:
    office = Office()
    blob = bytes_of(960)
    office.desk.offered(offer_of(blob), 0.0)
    office.desk.offered(offer_of(blob).model_copy(update={"session": "f" * 16}), 6.0)
    office.desk.data("a", piece(blob, 0), 7.0)
    assert [offer.session for offer in office.completed] == ["f" * 16]


def test_an_offer_in_pieces_of_another_size_begins_anew() -> None:
    office = Office()
    blob = bytes_of(3 * 960)
    office.desk.offered(offer_of(blob), 0.0)
    office.desk.data("a", piece(blob, 1), 0.0)
    office.desk.offered(offer_of(blob, chunk_bytes=2_048), 6.0)
    grant = office.said[-1]
    assert isinstance(grant, Grant)
    assert Missing.from_bitmap(grant.missing, 2).indices == {0, 1}
    for index in (1, 0):
        office.desk.data("a", piece(blob, index, chunk_bytes=2_048), 7.0)
    assert office.stored == [blob]
    assert office.opened[0].discarded


def test_one_client_has_one_upload_and_one_grant() -> None:
    office = Office(UploadLimits(grants=1))
    first, second, other = bytes_of(2 * 960, 1), bytes_of(960, 2), bytes_of(960, 3)
    office.desk.offered(offer_of(first, "a"), 0.0)
    office.desk.offered(offer_of(other, "b"), 0.0)
    office.desk.data("a", piece(first, 0), 0.0)
    office.desk.offered(offer_of(second, "a"), 0.0)
    assert office.heard() == [("GRANT", "a"), ("GRANT", "b")]
    assert office.opened[0].discarded
    with pytest.raises(ProtocolError):
        office.desk.data("a", piece(first, 1), 0.0)
    office.desk.data("b", piece(other, 0), 0.0)
    office.desk.data("a", piece(second, 0), 0.0)
    assert office.stored == [other, second]


def test_nothing_is_opened_for_an_upload_of_which_nothing_came() -> None:
    office = Office(UploadLimits(grants=1))
    blobs = {f"c{i}": bytes_of(960, i) for i in range(50)}
    for client, blob in blobs.items():
        office.desk.offered(offer_of(blob, client), 0.0)
    assert office.opened == []
    office.desk.data("c0", piece(blobs["c0"], 0), 0.0)
    assert len(office.opened) == 1


def test_a_client_cannot_send_chunks_of_the_upload_of_another() -> None:
    office = Office()
    blob = bytes_of(960)
    office.desk.offered(offer_of(blob, "a"), 0.0)
    with pytest.raises(ProtocolError) as caught:
        office.desk.data("b", piece(blob, 0), 0.0)
    assert caught.value.code == "grant"


def test_pieces_that_do_not_make_the_offered_hash_are_asked_for_anew_and_then_rejected() -> None:
    office = Office()
    blob, name = bytes_of(2 * 960), sha(b"something else")
    office.desk.offered(offer_of(blob).model_copy(update={"blob": name}), 0.0)
    for _ in range(ATTEMPTS):
        grant = office.said[-1]
        assert isinstance(grant, Grant)
        assert Missing.from_bitmap(grant.missing, 2).indices == {0, 1}
        for index in range(2):
            office.desk.data("a", piece(blob, index, name=name), 0.0)
    answer = office.said[-1]
    assert isinstance(answer, Reject)
    assert (answer.code, answer.blob) == ("hash", name)
    assert decode(encode(answer)) == answer
    assert office.stored == []
    assert office.desk.damaged == ATTEMPTS == 3
    assert [partial.discarded for partial in office.opened] == [True] * 3
    with pytest.raises(ProtocolError):
        office.desk.data("a", piece(blob, 0, name=name), 0.0)


def test_a_forged_piece_costs_a_device_its_pieces_and_not_its_update() -> None:
    office = Office(UploadLimits(grants=1))
    blob, other = bytes_of(2 * 960, 1), bytes_of(960, 2)
    office.desk.offered(offer_of(blob), 0.0)
    office.desk.offered(offer_of(other, "b"), 0.0)
    office.desk.data("a", piece(bytes(2 * 960), 0, name=sha(blob)), 0.0)  # by whoever could
    office.desk.data("a", piece(blob, 0), 0.0)  # the device's own came second
    office.desk.data("a", piece(blob, 1), 0.0)
    assert office.heard() == [("GRANT", "a"), ("GRANT", "a")]
    for index in range(2):
        office.desk.data("a", piece(blob, index), 1.0)
    assert office.stored == [blob]
    assert office.desk.holders == ["b"]


def test_a_trickle_does_not_keep_a_grant_that_another_waits_for() -> None:
    office = Office(UploadLimits(grants=1, window=4, expiry_seconds=30.0))
    slow, other = bytes_of(40 * 960, 1), bytes_of(960, 2)
    office.desk.offered(offer_of(slow, "a"), 0.0)
    office.desk.offered(offer_of(other, "b"), 0.0)
    for index, time in enumerate((5.0, 15.0, 25.0)):  # never silent, and one short of a window
        office.desk.data("a", piece(slow, index), time)
    office.desk.offered(offer_of(slow, "a"), 28.0)  # nor does asking again help it
    office.desk.expire(29.9)
    assert office.desk.holders == ["a"]
    office.desk.expire(30.0)
    assert office.desk.holders == ["b"]
    office.desk.data("b", piece(other, 0), 31.0)
    assert office.desk.holders == ["a"]


def test_a_window_of_chunks_in_time_keeps_the_grant() -> None:
    office = Office(UploadLimits(grants=1, window=4, expiry_seconds=30.0))
    steady, other = bytes_of(40 * 960, 1), bytes_of(960, 2)
    office.desk.offered(offer_of(steady, "a"), 0.0)
    office.desk.offered(offer_of(other, "b"), 0.0)
    for index, time in enumerate((5.0, 15.0, 25.0, 29.0)):
        office.desk.data("a", piece(steady, index), time)
    office.desk.expire(30.0)
    assert office.desk.holders == ["a"]
    office.desk.data("a", piece(steady, 4), 59.0)  # one in the thirty seconds that follow
    office.desk.expire(60.0)
    assert office.desk.holders == ["b"]


def test_a_slow_upload_that_nobody_waits_behind_keeps_its_grant() -> None:
    office = Office(UploadLimits(grants=1, window=4, expiry_seconds=30.0))
    slow = bytes_of(40 * 960, 1)
    office.desk.offered(offer_of(slow, "a"), 0.0)
    for index, time in enumerate((25.0, 50.0, 75.0)):
        office.desk.data("a", piece(slow, index), time)
        office.desk.expire(time + 5)
    assert [kind for kind, _ in office.heard()].count("GRANT") == 1


def test_what_arrived_is_said_each_second_though_half_a_window_is_far() -> None:
    office = Office(UploadLimits(window=100))
    blob = bytes_of(50 * 960)
    office.desk.offered(offer_of(blob), 0.0)
    office.desk.data("a", piece(blob, 0), 0.5)
    office.desk.expire(0.9)
    assert office.heard() == [("GRANT", "a")]
    office.desk.expire(1.0)
    assert office.heard() == [("HAVE", "a")]
    office.desk.expire(2.5)  # nothing came since
    assert office.heard() == []
    office.desk.data("a", piece(blob, 1), 2.6)
    assert office.heard() == [("HAVE", "a")]


@pytest.mark.parametrize("queue", [129, 1000])
def test_chunks_in_flight_below_the_brokers_queue_are_allowed(queue: int) -> None:
    check_limits(16, 8, queue)  # 128


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ((16, 8, 128), "128 chunks in flight.*queues 128.*below 128"),
        ((2, 8, 10), "16 chunks in flight.*max_queued_messages"),
        ((0, 8, 10), "grants = 0"),
        ((1, -1, 10), "window = -1"),
        ((1, 1, 0), "queue = 0"),
    ],
)
def test_limits_that_a_broker_would_have_to_drop_chunks_under_are_refused(
    limits: tuple[int, int, int], words: str
) -> None:
    with pytest.raises(LimitsError, match=words):
        check_limits(*limits)


def test_an_upload_goes_on_with_the_pieces_that_an_earlier_process_left() -> None:
    blob = bytes_of(3 * 960)
    partial = Piecewise(len(blob))
    partial.write(960, blob[960:1920])
    said: list[Message] = []
    stored: list[bytes] = []

    def stores(offer: Offer, whole: bytes) -> Done:
        stored.append(whole)
        return Done(run=RUN, client=offer.client, blob=offer.blob, status="stored")

    def desk(held: set[int]) -> UploadDesk:
        return UploadDesk(
            run=RUN, limits=UploadLimits(), open_partial=lambda _offer: partial,
            send=lambda _client, message: said.append(message), complete=stores,
            held=lambda _offer: held,
        )  # fmt: skip

    first = desk({1})
    first.offered(offer_of(blob), 0.0)
    grant = said[-1]
    assert isinstance(grant, Grant)
    assert Missing.from_bitmap(grant.missing, 3).indices == {0, 2}
    for index in (0, 2):
        first.data("a", piece(blob, index), 0.0)
    assert stored == [blob]
    # All of it was there, and the process ended before it looked.
    desk({0, 1, 2}).offered(offer_of(blob), 0.0)
    assert stored == [blob, blob]
    # What is there is of no use: all of it is asked for.
    partial.buffer = bytearray(len(blob))
    desk({0, 1, 2}).offered(offer_of(blob), 0.0)
    grant = said[-1]
    assert isinstance(grant, Grant)
    assert Missing.from_bitmap(grant.missing, 3).indices == {0, 1, 2}


def test_what_is_suspended_is_not_discarded_and_holds_no_grant() -> None:
    office = Office()
    blob = bytes_of(2 * 960)
    office.desk.offered(offer_of(blob), 0.0)
    office.desk.data("a", piece(blob, 0), 0.0)
    office.desk.suspend()
    assert not office.opened[0].discarded
    assert office.opened[0].rests == 1
    with pytest.raises(ProtocolError, match="no grant"):
        office.desk.data("a", piece(blob, 1), 0.0)


def test_the_pieces_of_an_update_that_was_refused_are_forgotten() -> None:
    office = Office(refuse=True)
    blob = bytes_of(960)
    office.desk.offered(offer_of(blob), 0.0)
    office.desk.data("a", piece(blob, 0), 0.0)
    assert office.heard()[-1] == ("REJECT", "a")
    assert office.opened[0].discarded


def test_the_pieces_of_an_update_that_was_stored_are_kept() -> None:
    office = Office()
    blob = bytes_of(960)
    office.desk.offered(offer_of(blob), 0.0)
    office.desk.data("a", piece(blob, 0), 0.0)
    assert not office.opened[0].discarded


def test_duplicates_are_counted_and_change_nothing() -> None:
    office = Office()
    blob = bytes_of(960 + 100)
    office.desk.offered(offer_of(blob), 0.0)
    for _ in range(3):
        office.desk.data("a", piece(blob, 1), 0.0)
    office.desk.data("a", piece(bytes(960) + bytes(100), 1, name=sha(blob)), 0.0)
    assert office.desk.duplicate_bytes == 3 * 100
    office.desk.data("a", piece(blob, 0), 0.0)
    assert office.stored == [blob]


@pytest.mark.parametrize(
    ("index", "count", "length"), [(0, 3, 960), (1, 2, 960), (0, 2, 959), (1, 2, 0), (0, 1, 1_060)]
)
def test_a_chunk_that_does_not_fit_its_offer_is_refused(
    index: int, count: int, length: int
) -> None:
    blob = bytes_of(960 + 100)
    bad = Chunk(blob=sha(blob), index=index, count=count, payload=b"x" * length)
    office = Office()
    office.desk.offered(offer_of(blob), 0.0)
    with pytest.raises(ProtocolError) as desk_error:
        office.desk.data("a", bad, 0.0)
    with pytest.raises(ProtocolError) as download_error:
        Download(ref_of(blob), 0.0).arrived(bad, 0.0)
    assert {desk_error.value.code, download_error.value.code} == {"chunk"}


def test_an_offer_whose_chunks_do_not_follow_from_its_bytes_is_refused() -> None:
    office = Office()
    bad = offer_of(bytes_of(961)).model_copy(update={"chunks": 1})
    with pytest.raises(ProtocolError) as caught:
        office.desk.offered(bad, 0.0)
    assert caught.value.code == "chunk"
    assert office.opened == []


def test_a_chunk_that_could_not_be_written_is_still_missing() -> None:
    office = Office()
    blob = bytes_of(960)
    office.desk.offered(offer_of(blob), 0.0)
    office.broken = True
    with pytest.raises(OSError, match="no space"):
        office.desk.data("a", piece(blob, 0), 0.0)
    office.desk.data("a", piece(blob, 0), 0.0)
    assert office.stored == [blob]
    assert office.desk.duplicate_bytes == 0


def test_the_aggregator_says_what_it_has_every_half_window() -> None:
    office = Office(UploadLimits(window=4))
    blob = bytes_of(6 * 960)
    office.desk.offered(offer_of(blob), 0.0)
    for index in range(6):
        office.desk.data("a", piece(blob, index), 0.0)
    assert [kind for kind, _ in office.heard()] == ["GRANT", "HAVE", "HAVE", "DONE"]


def test_what_a_client_had_under_way_is_forgotten_and_its_grant_handed_on() -> None:
    office = Office(UploadLimits(grants=1))
    a, b = bytes_of(2 * 960, 1), bytes_of(960, 2)
    office.desk.offered(offer_of(a, "a"), 0.0)
    office.desk.offered(offer_of(b, "b"), 0.0)
    office.desk.data("a", piece(a, 0), 0.0)
    office.desk.forget("a")
    office.desk.forget("nobody")
    assert office.opened[0].discarded
    office.desk.expire(0.1)
    assert office.heard() == [("GRANT", "a"), ("GRANT", "b")]


def test_a_download_asks_for_a_window_at_a_time_and_again_after_silence() -> None:
    blob = bytes_of(5 * 960 - 10)
    download = Download(ref_of(blob), now=0.0)
    assert download.wanted(3, 0.0) == [0, 1, 2]
    download.arrived(piece(blob, 1), 1.0)
    download.arrived(piece(blob, 1), 1.0)
    assert download.wanted(3, 1.0 + SILENCE_SECONDS - 0.01) == []
    assert download.wanted(3, 1.0 + SILENCE_SECONDS) == [0, 2, 3]
    for index in (3, 0, 2):
        download.arrived(piece(blob, index), 7.0)
    with pytest.raises(ProtocolError, match="1 chunks"):
        download.finish()
    assert download.wanted(3, 7.0) == [4]
    download.arrived(piece(blob, 4), 7.0)
    assert download.wanted(3, 99.0) == []
    assert download.finish() == blob


def test_a_chunk_of_another_state_is_refused() -> None:
    old, new = bytes_of(2 * 960, 1), bytes_of(2 * 960, 2)
    download = Download(ref_of(new), now=0.0)
    with pytest.raises(ProtocolError) as caught:
        download.arrived(piece(old, 0), 0.0)
    assert caught.value.code == "chunk"
    assert len(download.missing) == 2


def test_a_state_with_another_hash_is_refused_and_asked_for_again() -> None:
    blob = bytes_of(2 * 960)
    download = Download(ref_of(blob), now=0.0)
    assert download.wanted(8, 0.0) == [0, 1]
    download.arrived(piece(bytes(960) + blob[960:], 0, name=sha(blob)), 0.0)
    download.arrived(piece(blob, 1), 0.0)
    with pytest.raises(ProtocolError) as caught:
        download.finish()
    assert caught.value.code == "hash"
    assert download.wanted(8, 0.0) == [0, 1]
    for index in range(2):
        download.arrived(piece(blob, index), 0.0)
    assert download.finish() == blob


# --- both ends over a bad network ---


class BadNetwork:
    """Delivers after a while, not at all, or twice; a copy may overtake another."""

    def __init__(self, seed: int, loss: float, twice: float) -> None:
        self.now = 0.0
        self._rng = np.random.default_rng(seed)
        self._loss = loss
        self._twice = twice
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0

    def at(self, time: float, event: Callable[[], None]) -> None:
        """Let ``event`` happen at ``time``."""
        self._count += 1
        heapq.heappush(self._events, (time, self._count, event))

    def carry(self, event: Callable[[], None]) -> None:
        """Let ``event`` happen at its other end, none, one or two times."""
        copies = 2 if self._rng.random() < self._twice else 1
        for _ in range(copies):
            if self._rng.random() >= self._loss:
                self.at(self.now + self._rng.uniform(0.001, 0.5), event)

    def run(self, finished: Callable[[], bool], until: float) -> None:
        """Let events happen in the order of their times."""
        while self._events and self.now < until and not finished():
            self.now, _, event = heapq.heappop(self._events)
            event()


class Device:
    """A client that uploads one blob, and holds its own account of the window."""

    def __init__(self, client: str, blob: bytes, world: World) -> None:
        self.offer = offer_of(blob, client)
        self.upload = Upload(blob, self.offer, 0.0)
        self.done = False
        self.outstanding: set[int] = set()
        self._world = world

    def offers(self) -> None:
        """Send the offer."""
        self._world.network.carry(lambda: self._world.hears_offer(self.offer))

    def ticks(self) -> None:
        """Look at the clock each second."""
        if not self.done:
            if self.upload.must_offer_again(self._world.network.now):
                self.offers()
            self._world.network.at(self._world.network.now + 1.0, self.ticks)

    def hears(self, message: Message) -> None:
        """Obey the aggregator."""
        now = self._world.network.now
        if isinstance(message, Grant):
            self.outstanding = set()
            self._sends(self.upload.granted(message, now), message.window)
        elif isinstance(message, Have):
            self.outstanding &= Missing.from_bitmap(message.missing, self.offer.chunks).indices
            self._sends(self.upload.acknowledged(message, now), self._world.limits.window)
        elif isinstance(message, Done):
            self.done = True

    def _sends(self, indices: list[int], window: int) -> None:
        assert not self.outstanding & set(indices)
        self.outstanding |= set(indices)
        assert len(self.outstanding) <= window
        for index in indices:
            packet = make_chunk(RUN, self.offer.blob, self.upload.blob, index, CHUNK)
            self._world.network.carry(partial(self._world.hears_data, self.offer.client, packet))


class World:
    """Devices, an aggregator that may restart, and its account of who holds a grant."""

    def __init__(self, network: BadNetwork, blobs: list[bytes], limits: UploadLimits) -> None:
        self.network = network
        self.limits = limits
        self.devices = {f"c{i}": Device(f"c{i}", blob, self) for i, blob in enumerate(blobs)}
        self.spool: dict[str, bytes] = {}
        self.completed: list[str] = []
        self.accepted_bytes = 0
        self.restarts()
        for device in self.devices.values():
            device.offers()
            device.ticks()
        self._sweeps()

    def restarts(self) -> None:
        """Forget everything but what is stored."""
        self.desk = UploadDesk(
            run=RUN,
            limits=self.limits,
            open_partial=lambda offer: Piecewise(offer.bytes),
            send=self._says,
            complete=self._stores,
        )

    def _sweeps(self) -> None:
        self.desk.expire(self.network.now)
        self.network.at(self.network.now + 1.0, self._sweeps)

    def _says(self, client: str, message: Message) -> None:
        if isinstance(message, Grant):
            assert client in self.desk.holders
            assert len(self.desk.holders) <= self.limits.grants
        self.network.carry(lambda: self.devices[client].hears(message))

    def _stores(self, offer: Offer, blob: bytes) -> Done:
        self.completed.append(offer.client)
        self.spool[offer.blob] = blob
        return Done(run=RUN, client=offer.client, blob=offer.blob, status="stored")

    def hears_offer(self, offer: Offer) -> None:
        """Answer DONE at once to what is stored."""
        if offer.blob in self.spool:
            self._says(
                offer.client, Done(run=RUN, client=offer.client, blob=offer.blob, status="stored")
            )
        else:
            self.desk.offered(offer, self.network.now)

    def hears_data(self, client: str, packet: bytes) -> None:
        """Take a chunk; one without a grant is a late one."""
        chunk = parse_chunk(RUN, packet)
        holds = client in self.desk.holders
        try:
            self.desk.data(client, chunk, self.network.now)
        except ProtocolError as err:
            if err.code != "grant":
                raise
            assert not holds
        else:
            assert holds
            self.accepted_bytes += len(chunk.payload)


CHANCE = st.floats(0, 0.4)
NETWORKS = st.builds(BadNetwork, st.integers(0, 2**32), CHANCE, CHANCE)
SIZES = st.lists(st.integers(1, 20 * 960), min_size=1, max_size=6)
LIMITS = st.builds(
    UploadLimits,
    grants=st.integers(1, 3),
    window=st.integers(1, 8),
    expiry_seconds=st.sampled_from([7.0, 30.0]),
)


def world(network: BadNetwork, sizes: list[int], limits: UploadLimits) -> World:
    return World(network, [bytes_of(size, seed) for seed, size in enumerate(sizes)], limits)


def finish(there: World) -> None:
    there.network.run(lambda: all(d.done for d in there.devices.values()), until=50_000.0)
    for device in there.devices.values():
        assert device.done
        assert there.spool[device.offer.blob] == device.upload.blob


@settings(max_examples=200, deadline=None)
@given(NETWORKS, SIZES, LIMITS)
def test_every_upload_is_stored_once_whatever_the_network_does(
    network: BadNetwork, sizes: list[int], limits: UploadLimits
) -> None:
    there = world(network, sizes, limits)
    finish(there)
    assert sorted(there.completed) == sorted(there.devices)
    assert there.desk.duplicate_bytes == there.accepted_bytes - sum(sizes)


@settings(max_examples=200, deadline=None)
@given(NETWORKS, SIZES, LIMITS, st.lists(st.floats(0, 15), min_size=1, max_size=3))
def test_every_upload_is_stored_although_the_aggregator_forgets_all_that_was_under_way(
    network: BadNetwork, sizes: list[int], limits: UploadLimits, restarts: list[float]
) -> None:
    there = world(network, sizes, limits)
    for time in restarts:
        network.at(time, there.restarts)
    finish(there)


def test_without_loss_nothing_is_sent_twice_and_nobody_waits_for_a_silence() -> None:
    network = BadNetwork(1, loss=0.0, twice=0.0)
    there = world(network, [20 * 960] * 4, UploadLimits(grants=2, window=8))
    finish(there)
    assert there.desk.duplicate_bytes == 0
    # Each upload: offer, grant, 20 chunks in windows, done; every hop at most half a second.
    assert there.network.now < 2 * (2 + 2 * 20 / 4 + 2) * 0.5


@settings(max_examples=100, deadline=None)
@given(NETWORKS, st.integers(1, 40 * 960), st.integers(1, 16))
def test_every_download_is_whole_whatever_the_network_does(
    network: BadNetwork, size: int, window: int
) -> None:
    blob = bytes_of(size)
    download = Download(ref_of(blob), 0.0)

    def asks() -> None:
        wanted = download.wanted(window, network.now)
        assert len(wanted) <= window
        if wanted:
            network.carry(lambda: answers(wanted))

    def answers(wanted: list[int]) -> None:
        for index in wanted:
            packet = make_chunk(RUN, sha(blob), blob, index, CHUNK)
            network.carry(partial(hears, packet))

    def hears(packet: bytes) -> None:
        download.arrived(parse_chunk(RUN, packet), network.now)
        asks()

    def ticks() -> None:
        asks()
        network.at(network.now + 1.0, ticks)

    ticks()
    network.run(lambda: not download.missing, until=50_000.0)
    assert download.finish() == blob
