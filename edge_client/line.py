"""One device's line to its aggregator: topics, sealing, and the messages that every device says."""

from __future__ import annotations

import secrets
from collections.abc import Callable

from edge_client.ledger import Ledger
from edge_client.local_client import Performer
from messaging import security, topics
from messaging.errors import ProtocolError
from messaging.protocol import Alive, Hello, Message, StateRef, Want, encode
from messaging.security import DeviceSeal

Publish = Callable[[str, bytes, bool], None]


class Line:
    """What a device says, as it travels, and what it hears.

    Args:
        local: The device and what its run has in common.
        binding: Hash of the device's own base, tokenizer and placement.
        publish: Sends a payload to a topic (topic, payload, retain).
        seal: Seals what is said and opens what is heard; without it, messages are plain.
        ledger: The device's starts, and the newest aggregator that it has heard, on its disk.

    Attributes:
        session: Of this start.
    """

    def __init__(
        self,
        local: Performer,
        *,
        binding: str,
        publish: Publish,
        seal: DeviceSeal | None,
        ledger: Ledger | None,
    ) -> None:
        self._local = local
        self._run, self._client = local.setup.run, local.device.id
        self._binding = binding
        self._publish = publish
        self._seal, self._ledger = seal, ledger
        self.session = secrets.token_hex(8) if seal is None else seal.session

    @property
    def filters(self) -> list[str]:
        """What the device subscribes to."""
        return [topics.down(self._run, self._client), topics.manifest(self._run)]

    @property
    def is_sealed(self) -> bool:
        """Whether messages are sealed."""
        return self._seal is not None

    def opened(self, packet: bytes, topic: str) -> bytes:
        """Return the message in a packet.

        Raises:
            ProtocolError: If it is not sealed as the run's messages are.
            DiskError: If the disk does not take what must be remembered of it.
        """
        seal = self._seal
        if seal is None:
            if packet.startswith(security.MAGIC):
                raise ProtocolError("mac", "the run seals its messages; give this device its key")
            return packet
        if topic != topics.manifest(self._run):
            return seal.open(packet)
        message = seal.open_manifest(packet)
        if self._ledger is not None:
            self._ledger.heard(seal.highest)
        return message

    def say(self, message: Message) -> None:
        """Send a message to the aggregator."""
        payload = encode(message)
        if self._seal is not None:
            payload = self._seal.seal(payload)
        self._publish(topics.control(self._run, self._client), payload, False)

    def send_chunk(self, blob: str, packet: bytes) -> None:
        """Send a piece of an update."""
        self._publish(topics.data(self._run, self._client, blob), packet, False)

    # -- what every device says ------------------------------------------------------------------

    def hello(self, *, online: bool = True, will: bool = False) -> bytes:
        """Return the retained message that says that the device is there, or that it left.

        A ``will`` is what the broker says for a device that vanishes.
        """
        message = encode(
            Hello(
                run=self._run,
                client=self._client,
                session=self.session,
                epoch=0 if self._ledger is None else self._ledger.epoch,
                online=online,
                binding=self._binding,
                layout=self._local.setup.layouts_sha256,
                device=self._local.device if online else None,
            )
        )
        return message if self._seal is None else self._seal.seal(message, will=will)

    def greet(self) -> None:
        """Say HELLO."""
        self._publish(topics.state(self._run, self._client), self.hello(), True)

    def say_alive(self) -> None:
        """Give a sign of life."""
        self.say(Alive(run=self._run, client=self._client, session=self.session))

    def want(self, ref: StateRef, pieces: list[int]) -> None:
        """Ask for pieces of a global state."""
        bits = sum(1 << i for i in pieces).to_bytes((ref.chunks + 7) // 8, "little")
        self.say(
            Want(
                run=self._run,
                client=self._client,
                session=self.session,
                blob=ref.blob,
                missing=bits.hex(),
            )
        )
