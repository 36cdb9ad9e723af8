"""What a node asks of the network: publish, subscribe, and be told of what arrives.

Everything that arrives is handed to ``deliver`` from the transport's own thread, which must only
put it on a queue. ``connected`` is called on every connection, the first and each later one, once
its subscriptions hold. Both may publish, and must neither wait nor close.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

Deliver = Callable[[str, bytes], None]
Connected = Callable[[], None]


@dataclass(frozen=True, kw_only=True)
class Will:
    """A retained message that the network publishes for a node that vanishes."""

    topic: str
    payload: bytes


class Transport(Protocol):
    """One node's connection."""

    def start(self) -> None:
        """Connect, and go on trying where the network is not there."""

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """Send at least once to whoever subscribed; an empty retained payload clears."""

    def close(self) -> None:
        """Send what is queued and leave in good order: no will is published."""


def largest_packet(transport: Transport) -> int | None:
    """Return the bytes of the largest packet that a network takes, where it has said so."""
    most: int | None = getattr(transport, "largest_packet", None)
    return most


@runtime_checkable
class Watched(Protocol):
    """A connection that can say whether it stands."""

    def is_connected(self) -> bool:
        """Return whether the network has accepted the connection, and it stands."""


def is_connected(transport: Transport) -> bool:
    """Return whether a connection stands; one that cannot say does."""
    return transport.is_connected() if isinstance(transport, Watched) else True


class Network(Protocol):
    """Opens connections: a broker's address, or a hub in this process."""

    def open(
        self,
        *,
        client_id: str,
        filters: list[str],
        deliver: Deliver,
        connected: Connected,
        will: Will | None = None,
    ) -> Transport:
        """Return a connection that subscribes to ``filters`` each time it connects."""
