"""A link between devices and a broker, as a proxy that can be cut and that can spoil what passes.

It forwards bytes both ways. Cut, it takes nothing more off either socket, as where a router has
gone dark: nobody is told. Towards the broker it can hand each chunk of an update to a function
that returns what is forwarded in its place.

Source: MQTT 5.0, sections 1.5.5 (variable byte integer), 2.1 (fixed header), 3.3 (PUBLISH).
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from messaging.broker import HOST

_PUBLISH = 3
_PIECE = 65_536


def _varint(data: bytes | bytearray, at: int) -> tuple[int, int] | None:
    """Return a variable byte integer and where it ends; none where it is not whole yet."""
    value = 0
    for place in range(4):
        if at + place >= len(data):
            return None
        octet = data[at + place]
        value |= (octet & 0x7F) << 7 * place
        if not octet & 0x80:
            return value, at + place + 1
    raise ValueError("a variable byte integer of more than four bytes")


def _as_varint(value: int) -> bytes:
    octets = bytearray()
    while True:
        value, octet = divmod(value, 128)
        octets.append(octet | 0x80 if value else octet)
        if not value:
            return bytes(octets)


def packets(buffer: bytearray) -> Iterator[bytes]:
    """Take whole packets off the front of ``buffer``."""
    while len(buffer) > 1:
        length = _varint(buffer, 1)
        if length is None or len(buffer) < length[0] + length[1]:
            return
        end = length[0] + length[1]
        packet = bytes(buffer[:end])
        del buffer[:end]
        yield packet


@dataclass(frozen=True)
class Publish:
    """A PUBLISH of MQTT 5: its first byte, topic, identifier with properties, and payload."""

    first: int
    topic: str
    between: bytes
    payload: bytes

    @classmethod
    def of(cls, packet: bytes) -> Publish | None:
        """Return the PUBLISH that a packet is, or none."""
        if packet[0] >> 4 != _PUBLISH:
            return None
        found = _varint(packet, 1)
        assert found is not None
        at = found[1]
        size = int.from_bytes(packet[at : at + 2], "big")
        topic = packet[at + 2 : at + 2 + size].decode()
        at += 2 + size
        identifier = 2 if packet[0] & 0b110 else 0
        properties = _varint(packet, at + identifier)
        assert properties is not None
        end = properties[0] + properties[1]
        return cls(packet[0], topic, packet[at:end], packet[end:])

    def packet(self) -> bytes:
        """Return it as it travels."""
        topic = self.topic.encode()
        body = len(topic).to_bytes(2, "big") + topic + self.between + self.payload
        return bytes([self.first]) + _as_varint(len(body)) + body

    def carrying(self, payload: bytes) -> Publish:
        """Return it with another payload."""
        return replace(self, payload=payload)

    @property
    def is_chunk(self) -> bool:
        """Whether it carries a piece of an update."""
        return "/up/" in self.topic and not self.topic.endswith("/control")


Spoil = Callable[[Publish], list[Publish]]


class Wire:
    """A link to a broker.

    Args:
        port: Of the broker.
        spoil: Given each chunk that passes towards it; returns what passes instead.
    """

    def __init__(self, port: int, spoil: Spoil | None = None) -> None:
        self._port, self._spoil = port, spoil
        self._open = threading.Event()
        self._open.set()
        self._lock = threading.Lock()
        self._ends: set[socket.socket] = set()
        self._listener = socket.create_server((HOST, 0))
        self.url = f"mqtt://{HOST}:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Forward nothing any more; connections stand, and go dark."""
        self._open.clear()

    def mend(self) -> None:
        """Forward again, first what has been waiting."""
        self._open.set()

    def sever(self) -> None:
        """Break every connection that stands; new ones are taken."""
        with self._lock:
            ends, self._ends = self._ends, set()
        for end in ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Take no more connections, and break those that stand."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._open.set()
        self.sever()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            try:
                far = socket.create_connection((HOST, self._port))
            except OSError:  # the broker is down
                near.close()
                continue
            for end in (near, far):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self._ends |= {near, far}
            for source, target, spoil in ((near, far, self._spoil), (far, near, None)):
                arguments = source, target, spoil
                threading.Thread(target=self._pump, args=arguments, daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket, spoil: Spoil | None) -> None:
        buffer = bytearray()
        with contextlib.suppress(OSError):
            while piece := source.recv(_PIECE):
                self._open.wait()
                if spoil is not None:
                    buffer += piece
                    piece = b"".join(_spoiled(packet, spoil) for packet in packets(buffer))
                target.sendall(piece)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()


def _spoiled(packet: bytes, spoil: Spoil) -> bytes:
    publish = Publish.of(packet)
    if publish is None or not publish.is_chunk:
        return packet
    return b"".join(other.packet() for other in spoil(publish))
