"""The network over MQTT 5 (paho-mqtt): QoS 1, bounded queues, subscriptions renewed each time.

paho's own thread only enqueues. Reconnection backs off from one second to thirty. What was
published while the broker was away is sent when it is back, as far as the queue holds it.
Certificates and passwords are read anew for each connection (see ``tls`` and ``access``).
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote, urlsplit

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.subscribeoptions import SubscribeOptions

from messaging.access import BrokerAccess, Login
from messaging.errors import AddressError, BrokerUnavailableError, SecretError
from messaging.tls import FreshContext
from messaging.transport import Connected, Deliver, Transport, Will

log = logging.getLogger(__name__)

_SCHEMES = {"mqtt": (1883, False), "mqtts": (8883, True)}
_INFLIGHT_MESSAGES = 10  # HiveMQ's Receive Maximum, the least of the common brokers
_QUEUED_MESSAGES = 256  # of at most one chunk each
_PACKET_OVERHEAD = 10  # bytes of a PUBLISH besides topic and payload
_FILTERS_A_PACKET = 500  # of at most a hundred bytes each
_ROOM_SECONDS = 30.0
_LEAVE_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True)
class Address:
    """Where a broker listens."""

    host: str
    port: int
    tls: bool
    username: str | None = None
    password: str | None = field(default=None, repr=False)

    @property
    def login(self) -> Login | None:
        """User and password, where the address names a user."""
        return None if self.username is None else (self.username, self.password)

    @property
    def is_local(self) -> bool:
        """Whether the broker is on this machine."""
        return self.host in ("localhost", "127.0.0.1", "::1")

    def __str__(self) -> str:
        """Return the address without its secrets."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'mqtts' if self.tls else 'mqtt'}://{host}:{self.port}"


def parse_address(url: str) -> Address:
    """Return the parts of ``mqtt://[user:password@]host[:port]`` (``mqtts`` for TLS).

    A user or password with ``:``, ``/`` or ``@`` in it is written percent-encoded.

    Raises:
        AddressError: Naming what is wrong and an address that would do.
    """
    shown = f"{url.partition('://')[0]}://...@{url.rpartition('@')[2]}" if "@" in url else url
    remedy = "write it as mqtt://HOST:PORT, or mqtts://HOST:PORT for TLS"
    try:
        parts = urlsplit(url)
        port = parts.port
        host = parts.hostname or ""
        host.encode("idna")
    except ValueError:  # its text may quote a password
        raise AddressError(f"broker address '{shown}' has a bad host or port; {remedy}") from None
    if parts.scheme not in _SCHEMES or not host:
        raise AddressError(f"broker address '{shown}' is no MQTT address; {remedy}")
    if port == 0:
        raise AddressError(f"broker address '{shown}' has port 0; choose 1 to 65535, or none")
    if parts.path not in ("", "/") or parts.query or parts.fragment:
        raise AddressError(f"broker address '{shown}' goes on after the port; {remedy}")
    default, tls = _SCHEMES[parts.scheme]
    return Address(
        host=host,
        port=default if port is None else port,
        tls=tls,
        username=None if parts.username is None else unquote(parts.username),
        password=None if parts.password is None else unquote(parts.password),
    )


class MqttNetwork:
    """Opens MQTT connections to one broker.

    Args:
        url: Of the broker.
        access: Certificates, user and password.

    Raises:
        AddressError: If the address is none.
        SecretError: If certificates are given for a connection without TLS, or a file is not
            usable.
    """

    def __init__(self, url: str, access: BrokerAccess | None = None) -> None:
        self.address = parse_address(url)
        self._access = access or BrokerAccess()
        if self.address.tls:
            self._access.tls.check()
        elif self._access.needs_tls:
            raise SecretError(
                f"certificates are given, and broker '{self.address}' is without TLS; write mqtts://"
            )
        if self._access.login(self.address.login) is not None and not (
            self.address.tls or self.address.is_local
        ):
            log.warning("user and password go to %s without TLS; write mqtts://", self.address)

    def open(
        self,
        *,
        client_id: str,
        filters: list[str],
        deliver: Deliver,
        connected: Connected,
        will: Will | None = None,
    ) -> Transport:
        """Return a connection; ``start`` returns at once and goes on trying."""
        return _MqttTransport(
            self.address,
            self._access,
            client_id=client_id,
            filters=filters,
            deliver=deliver,
            connected=connected,
            will=will,
        )

    def require(self, wait_seconds: float) -> None:
        """Return once the broker has accepted an MQTT connection.

        Raises:
            BrokerUnavailableError: If it refuses, or after ``wait_seconds`` without an answer.
        """
        probe = _MqttTransport(
            self.address,
            self._access,
            client_id=f"pwff-probe-{secrets.token_hex(8)}",
            filters=[],
            deliver=lambda _topic, _payload: None,
            connected=lambda: None,
            will=None,
        )
        probe.start()
        try:
            answered = probe.answered.wait(wait_seconds)
        finally:
            probe.close()
        if probe.trouble and not probe.refusal:
            raise BrokerUnavailableError(
                f"no MQTT connection to the broker at {self.address}: {probe.trouble}"
            )
        if not answered:
            raise BrokerUnavailableError(
                f"no MQTT broker answered at {self.address} within {wait_seconds:g} s; "
                "start one there, correct --broker, or leave it out to use the embedded one"
            )
        if probe.refusal:
            raise BrokerUnavailableError(
                f"the broker at {self.address} refused the connection ({probe.refusal}); "
                "correct user and password, as mqtt://USER:PASSWORD@HOST:PORT"
            )


def _send_at_once(_client: paho.Client, _userdata: Any, sock: Any) -> None:
    """Switch Nagle's algorithm off: grants would wait for acknowledgements of earlier packets."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _acknowledge_at_once(client: paho.Client) -> None:
    """Let TCP acknowledge what has come now, and not within 40 ms (Linux; elsewhere nothing).

    A broker that has Nagle's algorithm on, as mosquitto has by default, holds a small packet back
    until the one before is acknowledged. The system goes back to waiting by itself, so it is told
    each time.
    """
    sock: Any = client.socket()
    if sock is not None and hasattr(socket, "TCP_QUICKACK"):
        with contextlib.suppress(OSError):  # it has been closed meanwhile
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)


class _MqttTransport:
    """One paho client.

    Attributes:
        answered: Set once the broker has accepted or refused, or there is ``trouble``.
        refusal: Why it last refused, or an empty string.
        largest_packet: Bytes of the largest packet that the broker takes, where it has said so.
        trouble: What was last wrong with certificates or password, or an empty string.
    """

    def __init__(
        self,
        address: Address,
        access: BrokerAccess,
        *,
        client_id: str,
        filters: list[str],
        deliver: Deliver,
        connected: Connected,
        will: Will | None,
    ) -> None:
        self.answered = threading.Event()
        self.refusal = ""
        self.trouble = ""
        self._address = address
        self._access = access
        self._filters = filters
        self._unanswered: dict[int, list[str]] = {}  # subscriptions, by the number of their packet
        self._deliver = deliver
        self._connected = connected
        self._flow = threading.Condition()
        self._unacknowledged = 0
        self._closing = False
        self._accepted = False
        self._network_thread: int | None = None
        self.largest_packet: int | None = None
        client = paho.Client(CallbackAPIVersion.VERSION2, client_id=client_id, protocol=paho.MQTTv5)
        client.max_inflight_messages_set(_INFLIGHT_MESSAGES)
        client.max_queued_messages_set(2 * _QUEUED_MESSAGES)  # room for what callbacks publish
        client.reconnect_delay_set(1, 30)
        client.on_pre_connect = self._on_pre_connect
        if address.tls:
            client.tls_set_context(FreshContext(access.tls, self._note_trouble))
        if will is not None:
            client.will_set(will.topic, will.payload, qos=1, retain=True)
        client.on_socket_open = _send_at_once
        client.on_connect = self._on_connect
        client.on_connect_fail = self._on_connect_fail
        client.on_disconnect = self._on_disconnect
        client.on_subscribe = self._on_subscribe
        client.on_message = self._on_message
        client.on_publish = self._on_publish
        self._client = client

    def start(self) -> None:
        properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        properties.SessionExpiryInterval = 0
        self._client.connect_async(
            self._address.host,
            self._address.port,
            keepalive=30,
            clean_start=True,
            properties=properties,
        )
        self._client.loop_start()

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        size = len(payload) + len(topic.encode()) + _PACKET_OVERHEAD
        if self.largest_packet is not None and size > self.largest_packet:
            # The broker would hang up, and again each time the message is sent anew.
            log.error(
                "%s takes packets of at most %d bytes, message of %d dropped; use smaller chunks",
                self._address,
                self.largest_packet,
                size,
            )
            return
        if not self._wait_for(lambda: self._unacknowledged < _QUEUED_MESSAGES, _ROOM_SECONDS):
            log.warning("%s: queue full for %g s, message dropped", self._address, _ROOM_SECONDS)
            return
        with self._flow:
            self._unacknowledged += 1
        info = self._client.publish(topic, payload, qos=1, retain=retain)
        if info.rc == paho.MQTT_ERR_QUEUE_SIZE:  # otherwise paho holds it until acknowledged
            self._acknowledged()
            log.warning("%s: message not queued (%s)", self._address, paho.error_string(info.rc))

    def close(self) -> None:
        if self._client.is_connected():
            self._wait_for(lambda: self._unacknowledged == 0, _LEAVE_SECONDS)
        with self._flow:
            self._closing = True
            self._flow.notify_all()
            if self._unacknowledged:
                log.warning("%s: left with %d messages unsent", self._address, self._unacknowledged)
        self._client.disconnect()
        self._client.loop_stop()

    def _wait_for(self, room: Callable[[], bool], seconds: float) -> bool:
        """Wait until ``room``; paho's own thread, which makes the room, passes at once."""
        if threading.get_ident() == self._network_thread:
            return True
        with self._flow:
            return self._flow.wait_for(lambda: self._closing or room(), seconds)

    def _acknowledged(self) -> None:
        with self._flow:
            self._unacknowledged -= 1
            self._flow.notify_all()

    def _tell(self, callback: Callable[[], None]) -> None:
        """Call a node; what it raises would end paho's thread, and nobody would notice."""
        try:
            callback()
        except Exception:
            log.exception("%s: a callback failed", self._address)

    def _on_connect(
        self, client: paho.Client, _userdata: Any, _flags: Any, reason: Any, properties: Any
    ) -> None:
        self._network_thread = threading.get_ident()
        self.refusal = str(reason) if reason.is_failure else ""
        self.answered.set()
        if reason.is_failure:
            log.error("broker %s refused the connection: %s", self._address, reason)
            return
        self.largest_packet = getattr(properties, "MaximumPacketSize", None)
        self._accepted, self.trouble = True, ""
        log.info("connected to %s", self._address)
        if self._filters:
            options = SubscribeOptions(qos=1)
            self._unanswered.clear()  # of a connection that is gone
            for start in range(0, len(self._filters), _FILTERS_A_PACKET):
                some = self._filters[start : start + _FILTERS_A_PACKET]
                _, number = client.subscribe([(pattern, options) for pattern in some])
                if number is not None:
                    self._unanswered[number] = some
        else:
            self._tell(self._connected)

    def _on_subscribe(
        self, _client: paho.Client, _userdata: Any, mid: int, reasons: Any, _properties: Any
    ) -> None:
        for pattern, reason in zip(self._unanswered.pop(mid, []), reasons, strict=False):
            if reason.is_failure:
                log.error("broker %s refused to send '%s': %s", self._address, pattern, reason)
        if not self._unanswered:
            self._tell(self._connected)

    def _on_pre_connect(self, client: paho.Client, _userdata: Any) -> None:
        self._accepted = False
        try:
            login = self._access.login(self._address.login)
        except SecretError as err:  # as it was before, then; the broker says what it thinks of it
            self._note_trouble(str(err))
            return
        if login is not None:
            client.username_pw_set(*login)

    def _note_trouble(self, reason: str) -> None:
        self.trouble = reason
        self.answered.set()

    def is_connected(self) -> bool:
        """Return whether the broker has accepted this connection, and it stands."""
        return self._accepted and self._client.is_connected()

    def _on_connect_fail(self, _client: paho.Client, _userdata: Any) -> None:
        because = f" ({self.trouble})" if self.trouble else ""
        log.warning("no broker at %s%s, trying again", self._address, because)

    def _on_disconnect(
        self, _client: paho.Client, _userdata: Any, _flags: Any, reason: Any, _properties: Any
    ) -> None:
        if not reason.is_failure:
            return
        if self._accepted or self.refusal or not self._address.tls:
            log.warning("connection to %s lost: %s", self._address, reason)
            return
        # From TLS 1.3 on, a broker that wants another certificate says so after the handshake.
        self._note_trouble("it hung up after the handshake: give a certificate that it trusts")
        log.warning("broker %s hung up: %s", self._address, self.trouble)

    def _on_message(self, client: paho.Client, _userdata: Any, message: paho.MQTTMessage) -> None:
        _acknowledge_at_once(client)
        self._tell(lambda: self._deliver(message.topic, bytes(message.payload)))

    def _on_publish(
        self, client: paho.Client, _userdata: Any, _mid: int, reason: Any, _properties: Any
    ) -> None:
        _acknowledge_at_once(client)
        if reason.is_failure:
            log.warning("broker %s refused a message: %s", self._address, reason)
        self._acknowledged()
