"""The two ends of a transfer as state machines without input or output.

Times are seconds on the caller's monotonic clock and come in as values; what to send comes out as
values. An upload is done when the aggregator says DONE, never when a broker acknowledged: a device
keeps its blob until then. A download is driven by the device, which asks for what it lacks.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

from messaging.chunks import HEADER_BYTES, Bytes, Chunk, Missing, chunk_count
from messaging.errors import ProtocolError
from messaging.protocol import Done, Grant, Have, Message, Offer, Reject, StateRef

SILENCE_SECONDS = 5.0  # after this long without an answer a device asks again
HAVE_SECONDS = 1.0  # an upload that moves is told so at least this often
ATTEMPTS = 3  # how often pieces that make another blob are forgotten and asked for anew


def _piece_bytes(whole: Offer | StateRef, index: int) -> tuple[int, int]:
    """Return where piece ``index`` starts and how long it is."""
    size = whole.chunk_bytes - HEADER_BYTES
    return index * size, min(size, whole.bytes - index * size)


class Upload:
    """The device's end: one blob on its way up. What is said of another blob changes nothing."""

    def __init__(self, blob: bytes, offer: Offer, now: float) -> None:
        self.blob = blob
        self.offer = offer
        self._sent: set[int] = set()
        self._sent_before: set[int] = set()  # those that went out before the last offer
        self._missing = Missing(offer.chunks)
        self._window = 0
        self._heard = now

    def granted(self, grant: Grant, now: float) -> list[int]:
        """Return the chunks to send now that the aggregator grants a window.

        A chunk that went out before the last offer and is named is lost. One that went out after
        it is under way still, whatever a grant says that answers the offer.

        Raises:
            ProtocolError: If the grant names a chunk that the blob does not have.
        """
        if grant.blob != self.offer.blob:
            return []
        self._missing = Missing.from_bitmap(grant.missing, self.offer.chunks)
        self._window = grant.window
        self._sent -= self._sent_before
        self._sent &= self._missing.indices
        self._sent_before = set()
        return self._next(now)

    def acknowledged(self, have: Have, now: float) -> list[int]:
        """Return the chunks to send now that the aggregator says what it still lacks.

        Raises:
            ProtocolError: If it names a chunk that the blob does not have.
        """
        if have.blob != self.offer.blob:
            return []
        self._missing = Missing.from_bitmap(have.missing, self.offer.chunks)
        self._sent &= self._missing.indices
        return self._next(now)

    def _next(self, now: float) -> list[int]:
        self._heard = now
        room = self._window - len(self._sent)
        ready = [i for i in sorted(self._missing.indices) if i not in self._sent][: max(0, room)]
        self._sent.update(ready)
        return ready

    def must_offer_again(self, now: float) -> bool:
        """Return whether the aggregator was silent for so long that the offer goes out again."""
        if now - self._heard < SILENCE_SECONDS:
            return False
        self._heard = now
        self.offered_again()
        return True

    def offered_again(self) -> None:
        """Note that the offer goes out once more, behind everything that was sent so far."""
        self._sent_before = set(self._sent)


class Download:
    """The device's end: one global state on its way down."""

    def __init__(self, ref: StateRef, now: float) -> None:
        self.ref = ref
        self.missing = Missing(ref.chunks)
        self._buffer = bytearray(ref.bytes)
        self._asked: set[int] = set()
        self._heard = now

    def arrived(self, chunk: Chunk, now: float) -> None:
        """Put one piece in its place.

        Raises:
            ProtocolError: If the piece does not fit the state.
        """
        start, length = _piece_bytes(self.ref, chunk.index)
        if chunk.blob != self.ref.blob:
            raise ProtocolError("chunk", f"chunk of {chunk.blob[:12]}, not of the state asked for")
        if chunk.count != self.ref.chunks or len(chunk.payload) != length:
            raise ProtocolError("chunk", f"chunk {chunk.index} does not fit the state asked for")
        self._heard = now
        self._asked.discard(chunk.index)
        if self.missing.arrived(chunk.index):
            self._buffer[start : start + length] = chunk.payload

    def stalled(self, now: float) -> bool:
        """Return whether a request has gone without an answer for too long."""
        return bool(self._asked) and now - self._heard >= SILENCE_SECONDS

    def ask_anew(self) -> None:
        """Forget the request that is being answered: the answer goes where nobody listens."""
        self._asked = set()

    def wanted(self, window: int, now: float) -> list[int]:
        """Return what to ask for: nothing while an earlier request is being answered."""
        if self._asked and not self.stalled(now):
            return []
        self._heard = now
        self._asked = set(self.missing.first(window))
        return sorted(self._asked)

    def finish(self) -> bytes:
        """Return the verified state.

        Raises:
            ProtocolError: If pieces are missing, or if its hash is not the one asked for; then
                everything is missing again.
        """
        if self.missing:
            raise ProtocolError("chunk", f"{len(self.missing)} chunks of the state are missing")
        blob = bytes(self._buffer)
        if hashlib.sha256(blob).hexdigest() != self.ref.blob:
            self.missing = Missing(self.ref.chunks)
            raise ProtocolError("hash", "the global state arrived with another hash")
        return blob


class PartialBlob(Protocol):
    """Where the pieces of one update are put until it is whole (a file of the spool)."""

    def write(self, offset: int, payload: Bytes) -> None:
        """Put ``payload`` at ``offset``; putting it there twice changes nothing."""

    def rest(self) -> None:
        """Keep nothing open: no piece is granted for now."""

    def finish(self) -> Bytes:
        """Return the whole blob, on disk."""

    def discard(self) -> None:
        """Forget the pieces; after ``finish``, the blob, because it was refused."""


class LimitsError(ValueError):
    """Limits of uploads that a person must correct."""

    exit_code = 2


@dataclass
class _Incoming:
    offer: Offer
    missing: Missing
    partial: PartialBlob | None = None
    heard: float = 0.0  # when its last chunk came
    have_at: float = 0.0  # when it was last told what is missing
    since_have: int = 0  # chunks since then
    period_began: float = 0.0  # when its progress was last measured
    period_chunks: int = 0  # chunks since then
    attempts: int = 1
    digest: hashlib._Hash = field(default_factory=hashlib.sha256)  # of the first ``hashed`` pieces
    hashed: int = 0

    def rest(self) -> None:
        """Keep nothing open."""
        if self.partial is not None:
            self.partial.rest()

    def hash(self, index: int, payload: Bytes) -> None:
        """Hash a piece if it is the next: while the others are on their way costs no time."""
        if index == self.hashed:
            self.digest.update(payload)
            self.hashed += 1

    def hash_rest(self, blob: Bytes) -> str:
        """Return the hash of the whole blob, of which the first pieces are hashed."""
        self.digest.update(
            memoryview(blob)[self.hashed * (self.offer.chunk_bytes - HEADER_BYTES) :]
        )
        return self.digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class UploadLimits:
    """How much may be in flight: ``grants * window`` stays below a broker's queue.

    Attributes:
        grants: Uploads at once.
        window: Chunks of one upload that are under way at once.
        expiry_seconds: An upload that is silent for so long loses its grant, and one that brings
            less than a window of new chunks in it does where another waits.
    """

    grants: int = 16
    window: int = 16
    expiry_seconds: float = 30.0


def check_limits(grants: int, window: int, queue: int) -> None:
    """Refuse limits under which a broker would have to throw chunks away.

    Args:
        grants: Uploads at once, >= 1.
        window: Chunks of one upload under way at once, >= 1.
        queue: Messages that the broker keeps for one receiver (``max_queued_messages`` of
            mosquitto, 1000 by default), >= 1.

    Raises:
        LimitsError: If one is below 1, or the chunks in flight would not stay below the queue.
    """
    for name, value in (("grants", grants), ("window", window), ("queue", queue)):
        if value < 1:
            raise LimitsError(f"{name} = {value}; give at least 1")
    if grants * window >= queue:
        raise LimitsError(
            f"grants = {grants} uploads of window = {window} chunks may put {grants * window} "
            f"chunks in flight, and the broker queues {queue} messages; lower grants or window "
            f"until their product is below {queue}, or raise the broker's max_queued_messages"
        )


def _nothing_held(_offer: Offer) -> Iterable[int]:
    return ()


def _pieces(offer: Offer) -> tuple[str, int, int]:
    return offer.blob, offer.bytes, offer.chunk_bytes


class UploadDesk:
    """The aggregator's end: which uploads hold a grant, and what each still lacks.

    Args:
        run: The run whose uploads these are.
        limits: Grants and window.
        open_partial: Makes the place where an offer's pieces are put, once the first is here.
        send: Sends a message to a client.
        complete: Called with an offer and its whole, hash-verified blob. Returns the answer.
        held: Returns the pieces of an offer that an earlier process left in that place.

    Attributes:
        duplicate_bytes: Bytes of chunks that came more than once.
        damaged: How often the pieces of an upload made another blob than the one offered.
    """

    def __init__(
        self,
        *,
        run: str,
        limits: UploadLimits,
        open_partial: Callable[[Offer], PartialBlob],
        send: Callable[[str, Message], None],
        complete: Callable[[Offer, Bytes], Done | Reject],
        held: Callable[[Offer], Iterable[int]] = _nothing_held,
    ) -> None:
        self._run = run
        self._limits = limits
        self._open_partial = open_partial
        self._send = send
        self._complete = complete
        self._held = held
        self._granted: dict[str, _Incoming] = {}  # a client has one upload at most, in either
        self._waiting: OrderedDict[str, _Incoming] = OrderedDict()  # who waits longest is first
        self.duplicate_bytes = 0
        self.damaged = 0

    @property
    def holders(self) -> list[str]:
        """Clients whose chunks are taken now, in client order."""
        return sorted(self._granted)

    def offered(self, offer: Offer, now: float) -> None:
        """Take an offer that the caller has already found acceptable; grant it when there is room.

        The same offer again resumes: a grant names what is missing. Another blob, or the same in
        pieces of another size, replaces what the client had under way.

        Raises:
            ProtocolError: If its chunk count does not follow from its size.
        """
        if offer.chunks != chunk_count(offer.bytes, offer.chunk_bytes):
            raise ProtocolError("chunk", f"{offer.chunks} chunks do not make {offer.bytes} bytes")
        client = offer.client
        incoming = self._granted.get(client) or self._waiting.get(client)
        if incoming is None or _pieces(incoming.offer) != _pieces(offer):
            self.forget(client)
            missing = Missing(offer.chunks, set(range(offer.chunks)) - set(self._held(offer)))
            incoming = self._waiting[client] = _Incoming(offer, missing)
        incoming.offer = offer
        if not incoming.missing:  # an earlier process had all of it, and did not come to verify it
            self._whole(incoming, self._open_partial(offer), now)
            return
        if client in self._granted:
            self._say_grant(incoming, now)
        self._hand_out(now)

    def _hand_out(self, now: float) -> None:
        while self._waiting and len(self._granted) < self._limits.grants:
            client, incoming = self._waiting.popitem(last=False)
            self._granted[client] = incoming
            incoming.period_began = now
            incoming.period_chunks = 0
            self._say_grant(incoming, now)

    def _say_grant(self, incoming: _Incoming, now: float) -> None:
        incoming.heard = incoming.have_at = now
        incoming.since_have = 0
        offer = incoming.offer
        self._send(
            offer.client,
            Grant(
                run=self._run,
                client=offer.client,
                blob=offer.blob,
                missing=incoming.missing.bitmap(),
                window=self._limits.window,
                expiry_seconds=self._limits.expiry_seconds,
            ),
        )

    def data(self, client: str, chunk: Chunk, now: float) -> None:
        """Put one piece on disk; when the blob is whole, verify it and answer.

        Raises:
            ProtocolError: If the piece was not granted or does not fit its offer.
        """
        incoming = self._granted.get(client)
        if incoming is None or incoming.offer.blob != chunk.blob:
            raise ProtocolError("grant", "chunk of an upload that holds no grant")
        offer = incoming.offer
        start, length = _piece_bytes(offer, chunk.index)
        if chunk.count != offer.chunks or len(chunk.payload) != length:
            raise ProtocolError("chunk", f"chunk {chunk.index} does not fit the offer")
        incoming.heard = now
        if chunk.index not in incoming.missing.indices:
            self.duplicate_bytes += length
            return
        if incoming.partial is None:  # hundreds may wait for a grant: only now a file is opened
            incoming.partial = self._open_partial(offer)
        incoming.partial.write(start, chunk.payload)
        incoming.hash(chunk.index, chunk.payload)
        incoming.missing.arrived(chunk.index)  # only once it is written
        incoming.since_have += 1
        incoming.period_chunks += 1
        if not incoming.missing:
            self._whole(incoming, incoming.partial, now)
        elif incoming.since_have >= max(1, self._limits.window // 2):
            self._say_have(incoming, now)
        else:
            self._say_have_in_time(incoming, now)

    def _say_have_in_time(self, incoming: _Incoming, now: float) -> None:
        if incoming.since_have and now - incoming.have_at >= HAVE_SECONDS:
            self._say_have(incoming, now)

    def _say_have(self, incoming: _Incoming, now: float) -> None:
        incoming.since_have = 0
        incoming.have_at = now
        offer, missing = incoming.offer, incoming.missing.bitmap()
        have = Have(run=self._run, client=offer.client, blob=offer.blob, missing=missing)
        self._send(offer.client, have)

    def _whole(self, incoming: _Incoming, partial: PartialBlob, now: float) -> None:
        offer = incoming.offer
        blob = partial.finish()
        if len(blob) != offer.bytes or incoming.hash_rest(blob) != offer.blob:
            self.damaged += 1
            if incoming.attempts < ATTEMPTS:
                self._begin_anew(incoming, partial, now)
                return
            answer: Done | Reject = Reject(
                run=self._run,
                client=offer.client,
                blob=offer.blob,
                code="hash",
                reason=f"{ATTEMPTS} times the pieces did not make the blob that was offered",
            )
            self._drop(offer.client)
        else:
            self._drop(offer.client)
            answer = self._complete(offer, blob)
        if isinstance(answer, Reject):
            partial.discard()
        self._send(offer.client, answer)
        self._hand_out(now)

    def _begin_anew(self, incoming: _Incoming, partial: PartialBlob, now: float) -> None:
        """Forget the pieces of an upload: one of them may have been forged by somebody else."""
        partial.discard()
        incoming.partial = None
        incoming.attempts += 1
        incoming.missing = Missing(incoming.offer.chunks)
        incoming.digest, incoming.hashed = hashlib.sha256(), 0
        if incoming.offer.client in self._granted:
            self._say_grant(incoming, now)
        self._hand_out(now)

    def expire(self, now: float) -> None:
        """Take grants back from uploads that are silent or too slow, and hand them on."""
        someone_waits = bool(self._waiting)
        for client, incoming in list(self._granted.items()):
            if self._is_silent(incoming, now) or (self._is_slow(incoming, now) and someone_waits):
                del self._granted[client]
                self._waiting[client] = incoming
                incoming.rest()
            else:
                self._say_have_in_time(incoming, now)
        self._hand_out(now)

    def _is_silent(self, incoming: _Incoming, now: float) -> bool:
        return now - incoming.heard >= self._limits.expiry_seconds

    def _is_slow(self, incoming: _Incoming, now: float) -> bool:
        """Return whether the period that ends now brought less than a window; begin another."""
        if now - incoming.period_began < self._limits.expiry_seconds:
            return False
        slow = incoming.period_chunks < self._limits.window
        incoming.period_began = now
        incoming.period_chunks = 0
        return slow

    def suspend(self) -> None:
        """Let go of everything under way without a word; the pieces stay where they are."""
        for incoming in self._granted.values():
            incoming.rest()
        self._granted.clear()
        self._waiting.clear()

    def forget(self, client: str) -> None:
        """Drop whatever ``client`` had under way (it left, or its round is over).

        The next ``expire`` or ``offered`` hands its grant on.
        """
        incoming = self._drop(client)
        if incoming is not None and incoming.partial is not None:
            incoming.partial.discard()

    def _drop(self, client: str) -> _Incoming | None:
        return self._granted.pop(client, None) or self._waiting.pop(client, None)
