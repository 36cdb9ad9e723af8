"""Nodes on one connection hear and say what nodes on connections of their own do."""

from __future__ import annotations

import queue
import threading

import pytest

from messaging.broker import embedded_broker, embedded_kind
from messaging.memory import MemoryNetwork
from messaging.mqtt import MqttNetwork
from messaging.shared import SharedNetwork
from messaging.transport import Transport


class Node:
    """A node, what it received, and how often it was told that it is connected."""

    def __init__(self, network: SharedNetwork, *topics: str) -> None:
        self.received: list[tuple[str, bytes]] = []
        self.connections = 0
        self.transport: Transport = network.open(
            client_id="node",
            filters=list(topics),
            deliver=lambda *packet: self.received.append(packet),
            connected=self._connected,
        )

    def _connected(self) -> None:
        self.connections += 1


def test_each_node_hears_its_own_topics_and_those_in_common() -> None:
    hub = MemoryNetwork()
    shared = SharedNetwork(hub, "many")
    one, other = Node(shared, "down/1", "all"), Node(shared, "down/2", "all")
    one.transport.start()
    other.transport.start()
    other.transport.publish("down/1", b"x")
    one.transport.publish("all", b"y")
    assert one.received == [("down/1", b"x"), ("all", b"y")]
    assert other.received == [("all", b"y")]
    assert (one.connections, other.connections) == (1, 1)


def test_what_was_retained_reaches_every_node() -> None:
    hub = MemoryNetwork()
    hub.open(
        client_id="cloud", filters=[], deliver=lambda *_: None, connected=lambda: None
    ).publish("all", b"state", retain=True)
    shared = SharedNetwork(hub, "many")
    nodes = [Node(shared, "all") for _ in range(3)]
    for node in nodes:
        node.transport.start()
    assert [node.received for node in nodes] == [[("all", b"state")]] * 3


def test_a_node_that_is_closed_hears_no_more_and_the_others_do() -> None:
    shared = SharedNetwork(MemoryNetwork(), "many")
    one, other = Node(shared, "all"), Node(shared, "all")
    for node in (one, other):
        node.transport.start()
    one.transport.close()
    one.transport.close()
    other.transport.publish("all", b"x")
    assert (one.received, other.received) == ([], [("all", b"x")])


def test_nodes_are_opened_before_the_first_is_started_and_name_whole_topics() -> None:
    shared = SharedNetwork(MemoryNetwork(), "many")
    with pytest.raises(ValueError, match="whole topics"):
        Node(shared, "down/+")
    Node(shared, "down/1").transport.start()
    with pytest.raises(ValueError, match="have started"):
        Node(shared, "down/2")


@pytest.mark.skipif(embedded_kind() is None, reason="no MQTT broker is installed")
def test_more_topics_than_a_packet_holds_are_subscribed_to_before_a_node_is_connected() -> None:
    """Of 1,200 nodes over a real broker, the last hears what is said once it is connected."""
    heard: queue.Queue[tuple[str, bytes]] = queue.Queue()
    there = threading.Event()
    with embedded_broker() as url:
        shared = SharedNetwork(MqttNetwork(url), "many")
        nodes = [Node(shared, f"down/{i}").transport for i in range(1199)]
        last = shared.open(
            client_id="last",
            filters=["down/1199"],
            deliver=lambda *packet: heard.put(packet),
            connected=there.set,
        )
        for node in [*nodes, last]:
            node.start()
        assert there.wait(30)
        nodes[0].publish("down/1199", b"x")
        assert heard.get(timeout=30) == ("down/1199", b"x")
        for node in [*nodes, last]:
            node.close()
