"""A network inside one process: the same topics and payloads as MQTT, without a socket."""

from __future__ import annotations

import threading

from messaging.transport import Connected, Deliver, Transport, Will


def matches(pattern: str, topic: str) -> bool:
    """Return whether an MQTT filter (``+`` and a final ``#``) matches a topic."""
    wanted, levels = pattern.split("/"), topic.split("/")
    for i, part in enumerate(wanted):
        if part == "#":
            return True
        if i >= len(levels) or part not in ("+", levels[i]):
            return False
    return len(wanted) == len(levels)


class MemoryNetwork:
    """A hub that delivers at once, in the publisher's thread, and keeps retained messages.

    Order holds between one publisher and one subscriber, as it does over MQTT.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._nodes: list[_MemoryTransport] = []  # that are here
        # With a thousand nodes, most of a message's way would be to look who wants it.
        self._by_topic: dict[str, list[_MemoryTransport]] = {}
        self._by_pattern: list[_MemoryTransport] = []
        self._retained: dict[str, bytes] = {}

    def open(
        self,
        *,
        client_id: str,
        filters: list[str],
        deliver: Deliver,
        connected: Connected,
        will: Will | None = None,
    ) -> Transport:
        """Return a connection to this hub; nobody vanishes from memory, so no will is kept."""
        del client_id, will
        return _MemoryTransport(self, filters, deliver, connected)

    def _join(self, node: _MemoryTransport) -> None:
        with self._lock:  # so that nothing newer overtakes what was retained
            if node not in self._nodes:
                self._nodes.append(node)
                for topic in node.topics:
                    self._by_topic.setdefault(topic, []).append(node)
                if node.patterns:
                    self._by_pattern.append(node)
                wanted = self._retained if node.patterns else node.topics & self._retained.keys()
                for topic in list(wanted):
                    node.offer(topic, self._retained[topic])
        node.connected()

    def _leave(self, node: _MemoryTransport) -> None:
        with self._lock:
            if node in self._nodes:
                self._nodes.remove(node)
                for topic in node.topics:
                    self._by_topic[topic].remove(node)
                if node.patterns:
                    self._by_pattern.remove(node)

    def _publish(self, topic: str, payload: bytes, retain: bool) -> None:
        with self._lock:
            if retain and payload:
                self._retained[topic] = payload
            elif retain:
                self._retained.pop(topic, None)
            exact = self._by_topic.get(topic, [])
            nodes = [*exact, *(node for node in self._by_pattern if node not in exact)]
        for node in nodes:
            node.offer(topic, payload)


class _MemoryTransport:
    def __init__(
        self, hub: MemoryNetwork, filters: list[str], deliver: Deliver, connected: Connected
    ) -> None:
        self._hub = hub
        self.patterns = [f for f in filters if "+" in f or "#" in f]
        self.topics = {*filters} - {*self.patterns}
        self._deliver = deliver
        self.connected = connected

    def start(self) -> None:
        self._hub._join(self)

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        self._hub._publish(topic, payload, retain)

    def close(self) -> None:
        self._hub._leave(self)

    def offer(self, topic: str, payload: bytes) -> None:
        if topic in self.topics or any(matches(pattern, topic) for pattern in self.patterns):
            self._deliver(topic, payload)
