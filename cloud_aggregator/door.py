"""What may come in at all: sizes, names and rates, looked at before anything is kept or read.

The transport's thread passes everything here on its way to the inbox. Each client has a bucket for
messages and one for bytes, so that one who floods is cut off and nobody else waits; what is kept
for clients, and what lies in the inbox, is bounded whoever sends. Bytes, seconds on the caller's
clock.

An honest device stays far below: it sends a window of chunks, waits for their HAVE, and asks for a
global state a few chunks at a time.
"""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from messaging import topics
from messaging.errors import ProtocolError

#: A client's name; anything else would be a key of the sender's own choosing.
_IDENTIFIER = re.compile(topics.IDENTIFIER)
_NOBODY = ""  # whose count is that of topics without a client
#: What a message in the inbox takes beside its payload, roughly: topic, two objects, a pair.
_AROUND_BYTES = 512


@dataclass(frozen=True, kw_only=True)
class DoorLimits:
    """How much may come in.

    Attributes:
        messages_per_second: Of one client, in the long run, chunks included; > 0.
        burst_messages: Of one client at once, after a silence; >= 1.
        bytes_per_second: Of one client, in the long run; > 0.
        burst_bytes: Of one client at once; >= ``largest_bytes``.
        largest_bytes: Of one message or chunk.
        waiting_bytes: That lie in the inbox at once, of all clients, small messages at what they
            take in memory; above ``largest_bytes``.
        clients: Whose rates are remembered; beyond, the one that was silent longest is forgotten.
    """

    messages_per_second: float = 5000.0
    burst_messages: float = 20_000.0
    bytes_per_second: float = 2.0**29
    burst_bytes: float = 2.0**29
    largest_bytes: int = 262_144
    waiting_bytes: int = 2**28
    clients: int = 100_000


class Bucket:
    """Tokens that come back at a rate, up to a capacity.

    Args:
        rate: Tokens a second.
        capacity: Tokens at most, and at first.
        now: Seconds.
    """

    __slots__ = ("_at", "_capacity", "_rate", "_tokens")

    def __init__(self, rate: float, capacity: float, now: float) -> None:
        self._rate, self._capacity = rate, capacity
        self._tokens, self._at = capacity, now

    def holds(self, tokens: float, now: float) -> bool:
        """Return whether so many tokens are there at ``now``, which never goes back."""
        self._tokens = min(self._capacity, self._tokens + (now - self._at) * self._rate)
        self._at = now
        return self._tokens >= tokens

    def take(self, tokens: float) -> None:
        """Take tokens that are there."""
        self._tokens -= tokens


class Door:
    """Between a transport and the inbox.

    Args:
        limits: How much may come in.
        admit: Takes topic and payload of what may.
        clock: Monotonic seconds.
    """

    def __init__(
        self, limits: DoorLimits, admit: Callable[[str, bytes], None], clock: Callable[[], float]
    ) -> None:
        self._limits = limits
        self._admit = admit
        self._clock = clock
        self._lock = threading.Lock()
        self._buckets: OrderedDict[str, tuple[Bucket, Bucket]] = OrderedDict()
        self._waiting = 0
        self._refused: dict[tuple[str, str], int] = {}

    def deliver(self, topic: str, payload: bytes) -> None:
        """Let what arrived in, or count it as refused; called by the transport, never waits."""
        if not payload:  # a retained message was taken back
            return
        client = topics.client_of(topic)
        with self._lock:
            try:
                self._check(client, len(payload))
            except ProtocolError as err:
                self._note(client, err.code)
                return
            self._waiting += len(payload) + _AROUND_BYTES
        self._admit(topic, payload)

    def taken(self, payload: bytes) -> None:
        """Note that something that was let in has left the inbox; nothing empty was."""
        if not payload:
            return
        with self._lock:
            self._waiting -= len(payload) + _AROUND_BYTES

    def refusals(self) -> list[tuple[str, str, int]]:
        """Return client, code and number of what was refused since this was last asked."""
        with self._lock:
            refused, self._refused = self._refused, {}
        return [(client, code, number) for (client, code), number in sorted(refused.items())]

    @property
    def waiting_bytes(self) -> int:
        """Bytes that were let in and not taken yet, with what is around each message."""
        return self._waiting

    def _check(self, client: str, size: int) -> None:
        limits, now = self._limits, self._clock()
        if not _IDENTIFIER.fullmatch(client):
            raise ProtocolError("identity", "a topic of no client")
        if size > limits.largest_bytes:
            raise ProtocolError("size", f"{size} bytes; at most {limits.largest_bytes} are taken")
        messages, octets = self._of(client, now)
        if not (messages.holds(1, now) and octets.holds(size, now)):
            raise ProtocolError("rate", "more than one client may send")
        if self._waiting + size + _AROUND_BYTES > limits.waiting_bytes:
            raise ProtocolError("rate", "more than is taken from the inbox at this moment")
        messages.take(1)
        octets.take(size)

    def _of(self, client: str, now: float) -> tuple[Bucket, Bucket]:
        buckets, limits = self._buckets, self._limits
        if client in buckets:
            buckets.move_to_end(client)
            return buckets[client]
        if len(buckets) >= limits.clients:
            buckets.popitem(last=False)
        made = (
            Bucket(limits.messages_per_second, limits.burst_messages, now),
            Bucket(limits.bytes_per_second, limits.burst_bytes, now),
        )
        buckets[client] = made
        return made

    def _note(self, client: str, code: str) -> None:
        """Count a refusal under its client where that is known; names of strangers are not kept."""
        key = (client if client in self._buckets else _NOBODY, code)
        if key not in self._refused and len(self._refused) >= self._limits.clients:
            key = (_NOBODY, code)
        self._refused[key] = self._refused.get(key, 0) + 1
