"""Sealed messages: who said it, to whom, in which session, and that it is not said again.

A packet is ``S``, a version, a direction, two sessions, an epoch, a counter, a proof and the
message, which is not encrypted (TLS does that). The proof of a device's message, and of one to a
device, is an HMAC-SHA256 under the client's own key; that of the manifest, which is public, an
Ed25519 signature. Run and client are bound into it without being sent. Big-endian integers.

    magic s | version B | direction s | device 8s | aggregator 8s | epoch Q | counter Q | proof

Sessions are the 16 hexadecimal digits that the messages carry. Counters rise with every message of
a session; what is not above the last one is a replay. A message that is sent anew is sealed anew.
A sealer belongs to one thread, or to whoever also holds the order in which packets are published.

Source: RFC 2104 (HMAC), RFC 8032 (Ed25519).
"""

from __future__ import annotations

import hmac
import struct
from dataclasses import dataclass, field

from messaging.errors import ProtocolError
from messaging.keys import SigningKey, check_key, client_key, sized
from messaging.protocol import MAX_MESSAGE_BYTES

__all__ = ["MAGIC", "SEAL_BYTES", "CloudSeal", "DeviceSeal", "SigningKey", "client_key"]

MAGIC = b"S"  # plain JSON begins with a brace, a chunk with its own magic

_VERSION = 1
_HEADER = struct.Struct(">sBs8s8sQQ")
_MAC_BYTES, _SIGNATURE_BYTES = 32, 64
_UP, _WILL, _DOWN, _MANIFEST = b"U", b"W", b"D", b"M"
_NOBODY = bytes(8)  # the session of an aggregator that has not been heard yet
SEAL_BYTES = _HEADER.size + _MAC_BYTES  # what sealing adds to a message; a manifest has 32 more


@dataclass(eq=False)
class DeviceSeal:
    """A device's side of one session.

    Attributes:
        run: Name of the run.
        client: The device's own name.
        key: Its own key, as ``client_key`` makes it.
        verify_key: The public half of the aggregator's signing key.
        session: 16 hexadecimal digits, fresh at each start of the device.
        epoch: The device's starts, counted on its own disk.
        highest: Epoch and counter of the newest manifest that this device ever accepted; kept on
            its disk, so that a restarted device takes no older one.
    """

    run: str
    client: str
    key: bytes = field(repr=False)
    verify_key: bytes
    session: str
    epoch: int
    highest: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        check_key(f"key of client '{self.client}'", self.key)
        check_key("verify key", self.verify_key)
        self._session = _session(self.session)
        self._aggregator = _NOBODY
        self._sent = self._taken = 0

    @property
    def aggregator_session(self) -> str:
        """Session that messages are bound to: that of the newest manifest; zeros before one."""
        return self._aggregator.hex()

    def seal(self, message: bytes, *, will: bool = False) -> bytes:
        """Return the packet of one message to the aggregator.

        A ``will`` is sealed when the connection opens and published by the broker when it breaks.
        It is bound to no aggregator session and holds for this device's session whatever has been
        sent since; nothing but an offline HELLO may be sealed so.
        """
        direction, aggregator = (_WILL, _NOBODY) if will else (_UP, self._aggregator)
        self._sent += 1
        header = _pack(direction, self._session, aggregator, self.epoch, self._sent)
        return header + _mac(self.key, self.run, self.client, header, message) + message

    def open(self, packet: bytes) -> bytes:
        """Return the message of a packet that came on the device's own topic.

        Raises:
            ProtocolError: With code ``mac`` if the aggregator did not make it for this device,
                ``replay`` if it is of another session or not newer than the last one.
        """
        header, proof, message = _unpack(packet, _DOWN)
        expected = _mac(self.key, self.run, self.client, header, message)
        if not hmac.compare_digest(proof, expected):
            raise ProtocolError("mac", f"message to '{self.client}' is not the aggregator's")
        _, _, _, session, aggregator, epoch, counter = _HEADER.unpack(header)
        if (session, epoch) != (self._session, self.epoch):
            raise ProtocolError("replay", "message to an earlier session of this device")
        if aggregator != self._aggregator:
            raise ProtocolError("replay", "message of an aggregator session that is not the newest")
        if counter <= self._taken:
            raise ProtocolError("replay", f"message {counter} after message {self._taken}")
        self._taken = counter
        return message

    def open_manifest(self, packet: bytes) -> bytes:
        """Return the manifest of a signed packet, and bind what follows to its aggregator.

        The newest manifest itself is delivered again on every connection, and passes.

        Raises:
            ProtocolError: With code ``mac`` if it is not the aggregator's of this run, ``replay``
                if it is older than ``highest``.
        """
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

        header, proof, message = _unpack(packet, _MANIFEST)
        content = _bound(self.run, "", header, message)
        try:
            Ed25519PublicKey.from_public_bytes(self.verify_key).verify(proof, content)
        except (InvalidSignature, ValueError) as err:
            raise ProtocolError("mac", "manifest is not signed by the run's aggregator") from err
        _, _, _, _, aggregator, epoch, counter = _HEADER.unpack(header)
        if (epoch, counter) < self.highest:
            raise ProtocolError(
                "replay",
                f"manifest {counter} of the aggregator's start {epoch}; this device has seen "
                f"{self.highest[1]} of start {self.highest[0]}",
            )
        self.highest = (epoch, counter)
        if aggregator != self._aggregator:
            self._aggregator, self._taken = aggregator, 0
        return message


@dataclass
class _Peer:
    """What the aggregator holds of a greeted device."""

    key: bytes
    session: bytes
    epoch: int
    taken: int
    sent: int = 0


class CloudSeal:
    """The aggregator's side, for every client of one run.

    Args:
        run: Name of the run.
        master: The run's master key, 32 bytes.
        signing_key: Signs the manifest.
        session: 16 hexadecimal digits, fresh at each start of the aggregator.
        epoch: The aggregator's starts, counted on its own disk.
    """

    def __init__(
        self, run: str, master: bytes, signing_key: SigningKey, session: str, epoch: int
    ) -> None:
        check_key("master key", master)
        self._run, self._master, self._signing_key = run, master, signing_key
        self._session, self._epoch = _session(session), epoch
        self._peers: dict[str, _Peer] = {}
        self._stranger: tuple[str, _Peer] | None = None  # of the last packet, not greeted yet
        self._signed = 0

    def greeted(self, client: str, device_session: str, epoch: int) -> None:
        """Begin a client's session: its HELLO has just been opened, and is accepted.

        Raises:
            ProtocolError: With code ``replay`` if the HELLO names another session or epoch than
                those that its packet is sealed with.
        """
        named = (_session(device_session), epoch)
        peer = self._peers.get(client)
        if peer is not None and (peer.session, peer.epoch) == named:
            return
        name, stranger = self._stranger or ("", None)
        if stranger is None or name != client or (stranger.session, stranger.epoch) != named:
            raise ProtocolError("replay", f"HELLO of '{client}' names a session that did not send")
        self._peers[client], self._stranger = stranger, None

    def seal(self, client: str, message: bytes) -> bytes:
        """Return the packet of one message to a client.

        Raises:
            ProtocolError: With code ``stale`` if the client has not been greeted in this session.
        """
        peer = self._peers.get(client)
        if peer is None:
            raise ProtocolError("stale", f"client '{client}' has said no HELLO to this aggregator")
        peer.sent += 1
        header = _pack(_DOWN, peer.session, self._session, peer.epoch, peer.sent)
        return header + _mac(peer.key, self._run, client, header, message) + message

    def open(self, client: str, packet: bytes) -> bytes:
        """Return the message of a packet that came on a client's topic.

        A session that has not been greeted is opened too, for its HELLO; ``greeted`` follows. Any
        other message of such a session is the caller's to leave.

        Raises:
            ProtocolError: With code ``mac`` if this client did not make it, ``replay`` if it is of
                an earlier session or not newer than the last one, ``stale`` if it speaks to another
                session of the aggregator, in which case the device says HELLO when it sees the
                manifest.
        """
        header, proof, message = _unpack(packet, _UP + _WILL)
        peer = self._peers.get(client)
        key = client_key(self._master, self._run, client) if peer is None else peer.key
        if not hmac.compare_digest(proof, _mac(key, self._run, client, header, message)):
            raise ProtocolError("mac", f"message of '{client}' is not sealed with its key")
        _, _, direction, session, aggregator, epoch, counter = _HEADER.unpack(header)
        if direction == _WILL:
            if peer is None or (session, epoch) != (peer.session, peer.epoch):
                raise ProtocolError("replay", f"last will of a session of '{client}' that is over")
            return message
        if aggregator != self._session:
            raise ProtocolError("stale", f"'{client}' speaks to another session of the aggregator")
        if peer is None or epoch > peer.epoch:
            self._stranger = (client, _Peer(key, session, epoch, counter))
            return message
        if epoch < peer.epoch:
            raise ProtocolError(
                "replay",
                f"start {epoch} of '{client}', which is at start {peer.epoch}; if the device lost "
                "its epoch file, write the higher number into it",
            )
        if session != peer.session:
            raise ProtocolError("replay", f"two devices claim start {epoch} of '{client}'")
        if counter <= peer.taken:
            raise ProtocolError(
                "replay", f"message {counter} of '{client}' after message {peer.taken}"
            )
        peer.taken = counter
        return message

    def sign_manifest(self, message: bytes) -> bytes:
        """Return the signed packet of a manifest, newer than every one before it."""
        self._signed += 1
        header = _pack(_MANIFEST, _NOBODY, self._session, self._epoch, self._signed)
        return header + self._signing_key.sign(_bound(self._run, "", header, message)) + message


def is_will(packet: bytes) -> bool:
    """Return whether a sealed packet says that it is a last will; ``open`` tells if it is true."""
    return packet[2:3] == _WILL


def _session(text: str) -> bytes:
    raw = bytes.fromhex(text)
    if len(raw) != len(_NOBODY):
        raise ValueError(f"session '{text}' is not 16 hexadecimal digits")
    return raw


def _pack(direction: bytes, device: bytes, aggregator: bytes, epoch: int, counter: int) -> bytes:
    return _HEADER.pack(MAGIC, _VERSION, direction, device, aggregator, epoch, counter)


def _bound(run: str, client: str, header: bytes, message: bytes) -> bytes:
    return b"pwff seal 1" + sized(run) + sized(client) + header + message


def _mac(key: bytes, run: str, client: str, header: bytes, message: bytes) -> bytes:
    return hmac.digest(key, _bound(run, client, header, message), "sha256")


def _unpack(packet: bytes, directions: bytes) -> tuple[bytes, bytes, bytes]:
    """Return header, proof and message of a packet that says it goes one of the directions."""
    if packet[:1] != MAGIC:
        raise ProtocolError("mac", "message is not sealed, and this run has keys")
    proof_bytes = _SIGNATURE_BYTES if _MANIFEST in directions else _MAC_BYTES
    start = _HEADER.size + proof_bytes
    if len(packet) < start:
        raise ProtocolError("mac", f"sealed message of {len(packet)} bytes; {start} are the seal")
    if len(packet) > start + MAX_MESSAGE_BYTES:
        raise ProtocolError(
            "size", f"sealed message of {len(packet)} bytes; at most {MAX_MESSAGE_BYTES} are read"
        )
    if packet[1] != _VERSION:
        raise ProtocolError("version", f"seal of version {packet[1]}; this side reads {_VERSION}")
    if packet[2:3] not in [directions[at : at + 1] for at in range(len(directions))]:
        raise ProtocolError("mac", "sealed message of another direction")
    return packet[: _HEADER.size], packet[_HEADER.size : start], packet[start:]
