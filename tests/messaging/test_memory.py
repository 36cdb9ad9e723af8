"""The network inside a process delivers what MQTT would."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st
from paho.mqtt.client import topic_matches_sub

from messaging.memory import MemoryNetwork, matches
from messaging.transport import Transport, Will

Received = list[tuple[str, bytes]]


def join(network: MemoryNetwork, *filters: str) -> tuple[Transport, Received]:
    received: Received = []
    node = network.open(
        client_id="node",
        filters=list(filters),
        deliver=lambda topic, payload: received.append((topic, payload)),
        connected=lambda: None,
    )
    node.start()
    return node, received


@pytest.mark.parametrize(
    ("pattern", "topic", "expected"),
    [
        ("a/b", "a/b", True),
        ("a/b", "a/b/c", False),
        ("a/b/c", "a/b", False),
        ("a/+", "a/b", True),
        ("a/+", "a", False),
        ("a/+", "a/", True),
        ("a/+", "a/b/c", False),
        ("+/b", "/b", True),
        ("a/#", "a", True),
        ("a/#", "a/b/c", True),
        ("a/#", "ab", False),
        ("#", "a/b", True),
        ("pwff/v1/r/c/+/up/+", "pwff/v1/r/c/pi5-07/up/control", True),
        ("pwff/v1/r/c/+/up/+", "pwff/v1/r/c/pi5-07/down", False),
    ],
)
def test_filters_match_as_in_the_mqtt_specification(
    pattern: str, topic: str, expected: bool
) -> None:
    assert matches(pattern, topic) is expected


LEVEL = st.sampled_from(["a", "b", "", "ab"])


@given(
    st.lists(LEVEL | st.just("+"), min_size=1, max_size=4),
    st.booleans(),
    st.lists(LEVEL, min_size=1, max_size=4),
)
def test_filters_match_as_in_paho(pattern: list[str], rest: bool, topic: list[str]) -> None:
    wanted = "/".join([*pattern, "#"] if rest else pattern)
    assert matches(wanted, "/".join(topic)) == topic_matches_sub(wanted, "/".join(topic))


def test_a_message_reaches_every_node_that_asked_for_it_once() -> None:
    network = MemoryNetwork()
    _, both = join(network, "a/+", "a/b")
    _, other = join(network, "b/#")
    sender, own = join(network, "a/b")
    sender.publish("a/b", b"1")
    assert (both, other, own) == ([("a/b", b"1")], [], [("a/b", b"1")])


def test_what_is_retained_reaches_a_late_node_in_its_newest_form() -> None:
    network = MemoryNetwork()
    sender, _ = join(network)
    for payload in (b"1", b"2"):
        sender.publish("model/latest", payload, retain=True)
    sender.publish("model/other", b"3")
    _, late = join(network, "model/#")
    assert late == [("model/latest", b"2")]


def test_an_empty_retained_message_clears() -> None:
    network = MemoryNetwork()
    sender, early = join(network, "model/latest")
    sender.publish("model/latest", b"1", retain=True)
    sender.publish("model/latest", b"", retain=True)
    _, late = join(network, "model/latest")
    assert [payload for _, payload in early] == [b"1", b""]
    assert late == []


def test_a_node_that_left_hears_nothing_and_the_others_go_on() -> None:
    network = MemoryNetwork()
    gone, unheard = join(network, "a")
    sender, heard = join(network, "a")
    gone.close()
    gone.close()
    sender.publish("a", b"1")
    assert (unheard, heard) == ([], [("a", b"1")])


def test_a_node_hears_nothing_before_it_starts_and_each_message_once_however_often() -> None:
    network = MemoryNetwork()
    received: Received = []
    calls: list[str] = []
    node = network.open(
        client_id="node",
        filters=["a"],
        deliver=lambda topic, payload: received.append((topic, payload)),
        connected=lambda: calls.append("connected"),
        will=Will(topic="a", payload=b"gone"),
    )
    sender, _ = join(network)
    sender.publish("a", b"0")
    assert calls == []
    node.start()
    node.start()
    assert "connected" in calls
    sender.publish("a", b"1")
    node.close()
    assert received == [("a", b"1")]


def test_a_node_may_publish_while_it_is_told_of_something() -> None:
    network = MemoryNetwork()
    sender, heard = join(network, "answer")
    sender.publish("question", b"?", retain=True)

    def answer(_topic: str, _payload: bytes) -> None:
        node.publish("answer", b"!", retain=True)

    node = network.open(
        client_id="node", filters=["question"], deliver=answer, connected=lambda: None
    )
    node.start()
    assert heard == [("answer", b"!")]


def test_no_older_state_follows_a_newer_one_however_nodes_join() -> None:
    network = MemoryNetwork()
    sender, _ = join(network)
    joined = threading.Event()

    def publish() -> None:
        number = 0
        while not joined.is_set():
            number += 1
            sender.publish("latest", number.to_bytes(4, "big"), retain=True)
        sender.publish("latest", b"\xff" * 4, retain=True)

    publisher = threading.Thread(target=publish)
    publisher.start()
    nodes = [join(network, "latest")[1] for _ in range(200)]
    joined.set()
    publisher.join(10)
    assert not publisher.is_alive()
    for received in nodes:
        assert received == sorted(received)
        assert len(set(received)) == len(received)
        assert received[-1] == ("latest", b"\xff" * 4)
