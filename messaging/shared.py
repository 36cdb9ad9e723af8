"""Many nodes on one connection: the emulated devices of a process.

A connection each would be a socket and a thread each, for a thousand devices that one processor
computes. What a node sends and receives is the same; only a last will there is not, since nobody
vanishes by itself from a process.
"""

from __future__ import annotations

import threading

from messaging.transport import Connected, Deliver, Network, Transport, Will, largest_packet


class SharedNetwork:
    """Opens nodes that share one connection of another network.

    Every node must be opened before the first is started: what the connection subscribes to is then
    known. It closes with its last node.

    Args:
        network: Opens the connection.
        client_id: Of the connection.
    """

    def __init__(self, network: Network, client_id: str) -> None:
        self._network = network
        self._client_id = client_id
        self._lock = threading.RLock()
        self._nodes: list[_Node] = []
        self._by_topic: dict[str, list[_Node]] = {}
        self._transport: Transport | None = None
        self._is_connected = False

    def open(
        self,
        *,
        client_id: str,
        filters: list[str],
        deliver: Deliver,
        connected: Connected,
        will: Will | None = None,
    ) -> Transport:
        """Return a node that subscribes to ``filters``, which are topics without wildcards.

        Raises:
            ValueError: If a node was started already, or a filter has a wildcard.
        """
        del client_id, will
        if self._transport is not None:
            raise ValueError("a node is opened on a connection that others have started")
        if any("+" in topic or "#" in topic for topic in filters):
            raise ValueError(f"filters {filters}: nodes of a shared connection name whole topics")
        node = _Node(self, filters, deliver, connected)
        self._nodes.append(node)
        for topic in filters:
            self._by_topic.setdefault(topic, []).append(node)
        return node

    def start(self, node: _Node) -> None:
        """Connect, if no node has; tell ``node`` if the connection is there already."""
        with self._lock:
            node.started = True
            first, there = self._transport is None, self._is_connected
            if first:
                self._transport = self._network.open(
                    client_id=self._client_id,
                    filters=sorted(self._by_topic),
                    deliver=self._deliver,
                    connected=self._connected,
                )
        if first and self._transport is not None:
            self._transport.start()
        elif there:
            node.connected()

    @property
    def largest_packet(self) -> int | None:
        """Bytes of the largest packet that the connection takes, where the broker has said so."""
        return None if self._transport is None else largest_packet(self._transport)

    def publish(self, topic: str, payload: bytes, *, retain: bool) -> None:
        """Send for a node."""
        if self._transport is not None:
            self._transport.publish(topic, payload, retain=retain)

    def close(self, node: _Node) -> None:
        """Let a node go, and the connection with the last of them."""
        with self._lock:
            if node not in self._nodes:
                return
            self._nodes.remove(node)
            for topic in node.topics:
                self._by_topic[topic].remove(node)
            last = not self._nodes
        if last and self._transport is not None:
            self._transport.close()

    def _deliver(self, topic: str, payload: bytes) -> None:
        for node in list(self._by_topic.get(topic, ())):
            node.deliver(topic, payload)

    def _connected(self) -> None:
        with self._lock:
            self._is_connected = True
            started = [node for node in self._nodes if node.started]
        for node in started:
            node.connected()


class _Node:
    def __init__(
        self, shared: SharedNetwork, topics: list[str], deliver: Deliver, connected: Connected
    ) -> None:
        self._shared = shared
        self.topics = topics
        self.deliver, self.connected = deliver, connected
        self.started = False

    @property
    def largest_packet(self) -> int | None:
        return self._shared.largest_packet

    def start(self) -> None:
        self._shared.start(self)

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        self._shared.publish(topic, payload, retain=retain)

    def close(self) -> None:
        self._shared.close(self)
