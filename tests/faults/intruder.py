"""Somebody on the broker who belongs to nobody: hears everything, and publishes what it likes."""

from __future__ import annotations

import threading
from collections.abc import Callable

from messaging.mqtt import MqttNetwork
from tests.faults.processes import LIMIT


class Intruder:
    """A connection that listens to every topic.

    Attributes:
        heard: Topic and payload of what was published, in order.
    """

    def __init__(self, broker: str) -> None:
        self.heard: list[tuple[str, bytes]] = []
        self._changed = threading.Condition()
        connected = threading.Event()
        self._transport = MqttNetwork(broker).open(
            client_id="intruder",
            filters=["pwff/#", "intruder"],
            deliver=self._hear,
            connected=connected.set,
        )
        self._transport.start()
        assert connected.wait(LIMIT), "the intruder cannot connect"

    def _hear(self, topic: str, payload: bytes) -> None:
        with self._changed:
            self.heard.append((topic, payload))
            self._changed.notify_all()

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """Publish anything anywhere."""
        self._transport.publish(topic, payload, retain=retain)

    def wait_until_published(self) -> None:
        """Return once the broker has given out everything that was published before."""
        mark = "intruder", str(len(self.heard)).encode()
        self.publish(*mark)
        with self._changed:
            assert self._changed.wait_for(lambda: mark in self.heard, LIMIT), "no echo"

    def wait_for(self, holds: Callable[[str, bytes], bool]) -> tuple[str, bytes]:
        """Return the first message for which ``holds``, once there is one."""

        def first() -> tuple[str, bytes] | None:
            return next((said for said in self.heard if holds(*said)), None)

        with self._changed:
            self._changed.wait_for(first, LIMIT)
            found = first()
        assert found is not None, "nobody said that"
        return found

    def everything(self) -> list[tuple[str, bytes]]:
        """Return what was said so far, all of it."""
        self.wait_until_published()
        return list(self.heard)

    def close(self) -> None:
        """Leave."""
        self._transport.close()
