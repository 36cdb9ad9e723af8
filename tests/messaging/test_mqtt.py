"""The network over MQTT, against real brokers."""

from __future__ import annotations

import hashlib
import logging
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from messaging.broker import HOST, embedded_broker, free_port
from messaging.chunks import CHUNK_BYTES, chunk_count, make_chunk, parse_chunk
from messaging.errors import AddressError, BrokerUnavailableError
from messaging.mqtt import MqttNetwork, parse_address
from messaging.transport import Transport, Will

ROOT = Path(__file__).parents[2]
WAIT = 15.0  # seconds until a test gives up on an event

Received = queue.Queue[tuple[str, bytes]]


class Node:
    """A started connection, what it received, and how often it connected."""

    def __init__(
        self,
        url: str,
        client_id: str,
        *filters: str,
        will: Will | None = None,
        on_connected: Callable[[Node], None] = lambda _node: None,
    ) -> None:
        self.received: Received = queue.Queue()
        self.connections: queue.Queue[float] = queue.Queue()
        self._on_connected = on_connected
        self.transport: Transport = MqttNetwork(url).open(
            client_id=client_id,
            filters=list(filters),
            deliver=lambda topic, payload: self.received.put((topic, payload)),
            connected=self._connected,
            will=will,
        )

    def _connected(self) -> None:
        self._on_connected(self)
        self.connections.put(time.monotonic())

    def __enter__(self) -> Node:
        self.transport.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self.transport.close()

    def wait_connected(self) -> Node:
        """Wait for one more connection."""
        self.connections.get(timeout=WAIT)
        return self

    def next(self) -> tuple[str, bytes]:
        """Wait for one more message."""
        return self.received.get(timeout=WAIT)


# --- addresses ---


@pytest.mark.parametrize(
    ("url", "host", "port", "tls"),
    [
        ("mqtt://localhost", "localhost", 1883, False),
        ("mqtts://broker.example.org", "broker.example.org", 8883, True),
        ("mqtt://127.0.0.1:2000/", "127.0.0.1", 2000, False),
        ("mqtt://[::1]:2000", "::1", 2000, False),
        ("MQTT://Broker:1", "broker", 1, False),
    ],
)
def test_an_address_has_the_usual_ports(url: str, host: str, port: int, tls: bool) -> None:
    address = parse_address(url)
    assert (address.host, address.port, address.tls) == (host, port, tls)
    assert parse_address(str(address)) == address


def test_user_and_password_are_read_and_never_shown() -> None:
    address = parse_address("mqtts://phone:p%40ss%2Fw%3Ard@broker:2000")
    assert (address.username, address.password) == ("phone", "p@ss/w:rd")
    assert str(address) == "mqtts://broker:2000"
    assert "p@ss" not in repr(address)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "localhost",
        "localhost:1883",
        "http://localhost",
        "mqtt:/localhost",
        "mqtt://",
        "mqtt://:1883",
        "mqtt://host:0",
        "mqtt://host:65536",
        "mqtt://host:-1",
        "mqtt://host:port",
        "mqtt://[::1",
        "mqtt://a..b",
        f"mqtt://{'x' * 64}.org",
        "mqtt://host/topic",
        "mqtt://host:1883?tls=1",
        "mqtt://host#x",
        "mqtt://user:secret@:1883",
        "mqtt://user:secret@host:port",
        "mqtt://user:secret@host:0",
        "mqtt://user:secret/more@host",
        "ws://user:secret@host",
    ],
)
def test_a_wrong_address_is_named_without_its_password_and_with_a_remedy(url: str) -> None:
    with pytest.raises(AddressError, match="broker address") as caught:
        MqttNetwork(url)
    assert "secret" not in str(caught.value)
    assert "choose" in str(caught.value) or "mqtt://HOST:PORT" in str(caught.value)
    assert caught.value.exit_code == 2


# --- a broker that is not there, or not a broker ---


@contextmanager
def fake_broker(answer: bytes) -> Iterator[int]:
    """Listen on a port, read what comes, and say ``answer`` to each connection."""
    stop = threading.Event()

    def serve() -> None:
        with ExitStack() as connections:
            while not stop.is_set():
                connection, _ = listener.accept()
                connections.enter_context(connection)
                if not stop.is_set():
                    connection.recv(4_096)
                    connection.sendall(answer)

    with socket.create_server((HOST, 0)) as listener:
        port: int = listener.getsockname()[1]
        server = threading.Thread(target=serve)
        server.start()
        try:
            yield port
        finally:
            stop.set()
            socket.create_connection((HOST, port)).close()
            server.join(WAIT)


def test_a_broker_that_is_not_there_is_an_error_within_the_wait() -> None:
    url = f"mqtt://user:secret@{HOST}:{free_port()}"
    begun = time.monotonic()
    with pytest.raises(
        BrokerUnavailableError, match=r"mqtt://127.0.0.1:\d+ within 0.3 s"
    ) as caught:
        MqttNetwork(url).require(0.3)
    assert time.monotonic() - begun < 0.3 + 2.0  # paho's thread looks up once a second
    assert "secret" not in str(caught.value)
    assert caught.value.exit_code == 1


def test_a_listener_that_says_nothing_is_no_broker() -> None:
    with (
        fake_broker(b"") as port,
        pytest.raises(BrokerUnavailableError, match=r"within 0.3 s"),
    ):
        MqttNetwork(f"mqtt://{HOST}:{port}").require(0.3)


def test_a_refused_password_is_named_at_once() -> None:
    # CONNACK, 3 bytes follow: no session, reason 0x86 (bad user name or password), no properties
    refusal = bytes([0x20, 3, 0, 0x86, 0])
    begun = time.monotonic()
    with (
        fake_broker(refusal) as port,
        pytest.raises(
            BrokerUnavailableError, match=r"refused.*Bad user name or password"
        ) as caught,
    ):
        MqttNetwork(f"mqtt://user:secret@{HOST}:{port}").require(60.0)
    assert time.monotonic() - begun < 10.0
    assert "secret" not in str(caught.value)


def test_closing_a_connection_that_never_was_does_not_wait() -> None:
    begun = time.monotonic()
    with Node(f"mqtt://{HOST}:{free_port()}", "a") as node:
        node.transport.publish("a", b"1")
    assert time.monotonic() - begun < 3.0
    node.transport.close()


# --- real brokers ---


@pytest.mark.broker
def test_an_update_of_2_3_megabytes_arrives_whole(broker: str) -> None:
    blob = bytes(range(256)) * 9_078  # 2,323,968 bytes
    name = hashlib.sha256(blob).hexdigest()
    count = chunk_count(len(blob), CHUNK_BYTES)
    with Node(broker, "hears", "up/+") as hears, Node(broker, "sends") as sends:
        hears.wait_connected()
        for index in range(count):
            sends.transport.publish("up/x", make_chunk("r", name, blob, index, CHUNK_BYTES))
        pieces: dict[int, bytes] = {}
        while len(pieces) < count:
            topic, packet = hears.next()
            assert topic == "up/x"
            chunk = parse_chunk("r", packet)
            pieces[chunk.index] = chunk.payload
    assert hashlib.sha256(b"".join(pieces[i] for i in range(count))).hexdigest() == name


@pytest.mark.broker
@pytest.mark.skipif(not hasattr(socket, "TCP_QUICKACK"), reason="acknowledgements wait: no Linux")
def test_tcp_acknowledges_at_once_what_a_broker_may_hold_the_next_packet_back_for(
    broker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    plain = socket.socket.setsockopt

    def note(sock: socket.socket, level: int, option: int, value: int) -> None:
        if (level, option, value) == (socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1):
            told.append(threading.current_thread().name)
        plain(sock, level, option, value)

    monkeypatch.setattr(socket.socket, "setsockopt", note, raising=False)
    with Node(broker, "hears", "a") as hears, Node(broker, "sends") as sends:
        hears.wait_connected()
        assert told == []
        sends.transport.publish("a", b"1")
        hears.next()
    assert len(told) == len(set(told)) == 2  # the message on one side, its PUBACK on the other


@pytest.mark.broker
def test_the_newest_retained_manifest_reaches_a_late_subscriber(broker: str) -> None:
    with Node(broker, "sends", "echo") as sends:
        sends.wait_connected()
        for payload in (b"1", b"2"):
            sends.transport.publish("model/latest", payload, retain=True)
        sends.transport.publish("echo", b"")
        sends.next()
        with Node(broker, "late", "model/latest", "other") as late:
            assert late.next() == ("model/latest", b"2")
            late.wait_connected()
            sends.transport.publish("other", b"3")
            assert late.next() == ("other", b"3")


@pytest.mark.broker
def test_an_empty_retained_message_clears(broker: str) -> None:
    with Node(broker, "sends", "echo") as sends:
        sends.wait_connected()
        sends.transport.publish("state", b"1", retain=True)
        sends.transport.publish("state", b"", retain=True)
        sends.transport.publish("echo", b"")
        sends.next()
        with Node(broker, "late", "state", "other") as late:
            late.wait_connected()
            sends.transport.publish("other", b"3")
            assert late.next() == ("other", b"3")


@pytest.mark.broker
def test_subscriptions_hold_when_a_node_is_told_that_it_is_connected(broker: str) -> None:
    with Node(broker, "sends") as sends:
        sends.wait_connected()
        for number in range(10):
            with Node(broker, f"hears-{number}", "a") as hears:
                hears.wait_connected()
                sends.transport.publish("a", b"%d" % number)
                assert hears.next() == ("a", b"%d" % number)


@pytest.mark.broker
def test_the_will_of_a_killed_process_is_published_and_retained(broker: str) -> None:
    script = (
        "import sys, threading\n"
        "from messaging.mqtt import MqttNetwork\n"
        "from messaging.transport import Will\n"
        f"MqttNetwork({broker!r}).open(client_id='device', filters=['x'],\n"
        "    deliver=print, connected=lambda: print('ready', flush=True),\n"
        "    will=Will(topic='c/device/state', payload=b'gone')).start()\n"
        "sys.stdin.read()\n"
    )
    with Node(broker, "hears", "c/+/state") as hears:
        hears.wait_connected()
        with subprocess.Popen(
            [sys.executable, "-c", script],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as device:
            try:
                assert device.stdout is not None
                assert device.stdout.readline() == "ready\n"
            finally:
                device.send_signal(signal.SIGKILL)
        assert hears.next() == ("c/device/state", b"gone")
        with Node(broker, "late", "c/+/state") as late:
            assert late.next() == ("c/device/state", b"gone")


@pytest.mark.broker
def test_a_node_that_leaves_in_good_order_sends_all_it_had_and_no_will(broker: str) -> None:
    with Node(broker, "hears", "c/#") as hears:
        hears.wait_connected()
        will = Will(topic="c/device/state", payload=b"gone")
        with Node(broker, "device", will=will) as device:
            device.wait_connected()
            for number in range(50):
                device.transport.publish("c/device/up", b"%d" % number)
        hears.transport.publish("c/marker", b"")
        heard = []
        while (message := hears.next()) != ("c/marker", b""):
            heard.append(message)
    assert heard == [("c/device/up", b"%d" % number) for number in range(50)]


@pytest.mark.broker
def test_after_the_broker_was_restarted_both_ends_go_on(kind: str) -> None:
    port = free_port()
    url = f"mqtt://{HOST}:{port}"
    with ExitStack() as nodes:
        with embedded_broker(kind=kind, port=port):
            hears = nodes.enter_context(Node(url, "hears", "a/+")).wait_connected()
            sends = nodes.enter_context(Node(url, "sends")).wait_connected()
            sends.transport.publish("a/b", b"before")
            assert hears.next() == ("a/b", b"before")
        sends.transport.publish("a/c", b"between", retain=True)
        with embedded_broker(kind=kind, port=port):
            hears.wait_connected()
            while hears.next() != ("a/c", b"between"):  # at least once, so perhaps again
                pass
            sends.transport.publish("a/b", b"after")
            while hears.next() != ("a/b", b"after"):
                pass


@pytest.mark.broker
def test_what_was_published_before_there_was_a_connection_is_sent_on_it(kind: str) -> None:
    port = free_port()
    url = f"mqtt://{HOST}:{port}"
    sends = Node(url, "sends")
    for number in range(256):  # as much as the queue holds
        sends.transport.publish(f"a/{number}", b"1")
    with embedded_broker(kind=kind, port=port), Node(url, "hears", "a/+") as hears:
        hears.wait_connected()
        topics: set[str] = set()
        with sends:
            while len(topics) < 256:
                topics.add(hears.next()[0])


@pytest.mark.broker
def test_a_node_with_a_full_queue_may_publish_when_it_is_connected(kind: str) -> None:
    port = free_port()
    url = f"mqtt://{HOST}:{port}"

    def greet(node: Node) -> None:
        node.transport.publish("hello", b"1", retain=True)

    with embedded_broker(kind=kind, port=port):
        node = Node(url, "device", on_connected=greet)
        for _ in range(256):
            node.transport.publish("a", b"")
        with node, Node(url, "hears", "hello") as hears:
            assert hears.next() == ("hello", b"1")


@pytest.mark.broker
def test_a_callback_that_fails_does_not_end_the_connection(
    broker: str, caplog: pytest.LogCaptureFixture
) -> None:
    received: queue.Queue[bytes] = queue.Queue()
    ready = threading.Event()

    def deliver(_topic: str, payload: bytes) -> None:
        if payload == b"bad":
            raise ValueError("a bug of the node")
        received.put(payload)

    def connected() -> None:
        ready.set()
        raise ValueError("another")

    node = MqttNetwork(broker).open(
        client_id="node", filters=["a"], deliver=deliver, connected=connected
    )
    node.start()
    assert ready.wait(WAIT)
    for payload in (b"bad", b"good"):
        node.publish("a", payload)
    assert received.get(timeout=WAIT) == b"good"
    node.close()
    failures = [r for r in caplog.records if r.levelno == logging.ERROR]
    assert len(failures) == 2


@pytest.mark.broker
def test_a_message_that_the_broker_would_hang_up_on_is_dropped(
    caplog: pytest.LogCaptureFixture,
) -> None:
    # CONNACK with Maximum Packet Size (0x27) 1000, then nothing
    connack = bytes([0x20, 8, 0, 0, 5, 0x27]) + (1_000).to_bytes(4, "big")
    with fake_broker(connack) as port, Node(f"mqtt://{HOST}:{port}", "sends") as sends:
        sends.wait_connected()
        sends.transport.publish("a", bytes(1_001))
    assert "at most 1000 bytes" in caplog.text
