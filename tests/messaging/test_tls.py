"""Certificates, and connections that are made with the files as they are then."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from messaging.access import BrokerAccess
from messaging.certificates import (
    Pair,
    is_vouched_for,
    make_authority,
    make_client,
    make_server,
    server_names,
    valid_until,
)
from messaging.errors import SecretError
from messaging.mqtt import MqttNetwork
from messaging.secret_files import write_over
from messaging.tls import FreshContext, TlsFiles

NOW = datetime(2026, 3, 1, tzinfo=timezone.utc)


def put(place: Path, name: str, pair: Pair) -> tuple[Path, Path]:
    """Write a pair; return the paths of certificate and key."""
    certificate, key = place / f"{name}.pem", place / f"{name}.key"
    write_over(key, pair.key, secret=True)
    write_over(certificate, pair.certificate, secret=False)
    return certificate, key


@pytest.fixture
def authority() -> Pair:
    return make_authority("test")


def test_a_leaf_is_for_one_purpose_and_signs_nothing() -> None:
    authority = make_authority("test", NOW)
    server = make_server(authority, "broker", ["broker.lan", "10.0.0.1"], days=30, now=NOW)
    client = make_client(authority, "pi5-01", days=30, now=NOW)
    for pair, purpose in (
        (server, ExtendedKeyUsageOID.SERVER_AUTH),
        (client, ExtendedKeyUsageOID.CLIENT_AUTH),
    ):
        leaf = x509.load_pem_x509_certificate(pair.certificate)
        extensions = leaf.extensions
        assert list(extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [purpose]
        assert not extensions.get_extension_for_class(x509.BasicConstraints).value.ca
        assert not extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign
        assert leaf.not_valid_before_utc == NOW - timedelta(days=1)  # clocks are off by a day
        assert valid_until(pair.certificate) == NOW + timedelta(days=30)
        assert is_vouched_for(pair.certificate, authority.certificate)
        assert not is_vouched_for(pair.certificate, make_authority("test").certificate)
    assert server_names(server.certificate) == ["broker.lan", "10.0.0.1"]
    assert (
        x509.load_pem_x509_certificate(client.certificate).subject.rfc4514_string() == "CN=pi5-01"
    )


@pytest.mark.parametrize("host", ["", "a b", "mqtts://host", "*.lan", "user@host", "host:8883"])
def test_a_host_that_is_no_name_is_refused(authority: Pair, host: str) -> None:
    with pytest.raises(SecretError, match="is no name and no address"):
        make_server(authority, "broker", [host], days=1)


class Server:
    """A TLS listener that asks for a certificate, and notes whose each connection has."""

    def __init__(self, place: Path, authority: Pair) -> None:
        certificate, key = put(place, "server", make_server(authority, "s", ["localhost"], days=1))
        (place / "authority.pem").write_bytes(authority.certificate)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        context.load_verify_locations(place / "authority.pem")
        context.verify_mode = ssl.CERT_REQUIRED
        self._context = context
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.versions: list[str | None] = []

    def meet(self, client: ssl.SSLContext) -> str:
        """Connect once; return the common name that the server saw."""
        seen: list[str] = []

        def serve() -> None:
            plain, _ = self._listener.accept()
            with plain, self._context.wrap_socket(plain, server_side=True) as connection:
                subject = connection.getpeercert() or {}
                seen.append(dict(pair[0] for pair in subject["subject"])["commonName"])  # type: ignore[union-attr, misc, index]
                self.versions.append(connection.version())
                connection.sendall(b"1")

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        with (
            socket.create_connection(("127.0.0.1", self.port), timeout=10) as plain,
            client.wrap_socket(
                plain, server_hostname="localhost", do_handshake_on_connect=False
            ) as connection,
        ):
            connection.do_handshake()  # as paho does: it finds it done
            assert connection.recv(1) == b"1"
        thread.join(10)
        return seen[0]

    def close(self) -> None:
        """Listen no longer."""
        self._listener.close()


@pytest.fixture
def server(tmp_path: Path, authority: Pair) -> Iterator[Server]:
    server = Server(tmp_path, authority)
    yield server
    server.close()


def test_the_next_connection_has_the_certificate_that_is_there_then(
    server: Server, tmp_path: Path, authority: Pair
) -> None:
    certificate, key = put(tmp_path, "client", make_client(authority, "before", days=1))
    files = TlsFiles(ca=tmp_path / "authority.pem", certificate=certificate, private_key=key)
    context = FreshContext(files, lambda _trouble: None)
    assert context.check_hostname
    assert server.meet(context) == "before"
    put(tmp_path, "client", make_client(authority, "after", days=1))
    assert server.meet(context) == "after"
    assert set(server.versions) <= {"TLSv1.2", "TLSv1.3"}


def test_a_certificate_and_its_key_may_stand_in_one_file(
    server: Server, tmp_path: Path, authority: Pair
) -> None:
    pair = make_client(authority, "one", days=1)
    both = tmp_path / "both.pem"
    write_over(both, pair.certificate + pair.key, secret=True)
    files = TlsFiles(ca=tmp_path / "authority.pem", certificate=both)
    files.check()
    assert server.meet(FreshContext(files, lambda _trouble: None)) == "one"


def test_half_an_exchange_fails_that_attempt_and_the_next_succeeds(
    server: Server, tmp_path: Path, authority: Pair
) -> None:
    certificate, key = put(tmp_path, "client", make_client(authority, "before", days=1))
    files = TlsFiles(ca=tmp_path / "authority.pem", certificate=certificate, private_key=key)
    troubles: list[str] = []
    context = FreshContext(files, troubles.append)
    new = make_client(authority, "after", days=1)
    write_over(key, new.key, secret=True)
    with (
        socket.create_connection(("127.0.0.1", server.port), timeout=10) as plain,
        pytest.raises(OSError, match="that belong together"),
    ):
        context.wrap_socket(plain, server_hostname="localhost", do_handshake_on_connect=False)
    assert plain.fileno() == -1  # nothing is left open
    server._listener.accept()[0].close()
    assert "that belong together" in troubles[0]
    write_over(certificate, new.certificate, secret=False)
    assert server.meet(context) == "after"


def test_nothing_older_than_tls_1_2_is_spoken() -> None:
    context = TlsFiles().context()
    assert context.minimum_version == ssl.TLSVersion.TLSv1_2
    assert (context.check_hostname, context.verify_mode) == (True, ssl.CERT_REQUIRED)


def refusal(access: BrokerAccess, url: str = "mqtts://localhost:1") -> str:
    with pytest.raises(SecretError) as told:
        MqttNetwork(url, access)
    return str(told.value)


def test_files_that_no_connection_could_be_made_with_are_told_at_once(
    tmp_path: Path, authority: Pair
) -> None:
    certificate, key = put(tmp_path, "client", make_client(authority, "a", days=1))
    nowhere = tmp_path / "nowhere.pem"
    assert f"ca = '{nowhere}': No such file" in refusal(BrokerAccess(ca=nowhere))
    assert "with the broker's authority" in refusal(BrokerAccess(ca=key))
    assert "private key: cannot read" in refusal(
        BrokerAccess(certificate=certificate, private_key=nowhere)
    )
    _, other = put(tmp_path, "other", make_client(authority, "b", days=1))
    assert "that belong together" in refusal(
        BrokerAccess(certificate=certificate, private_key=other)
    )
    assert "write mqtts://" in refusal(BrokerAccess(ca=certificate), "mqtt://localhost:1")
    key.chmod(0o644)
    assert f"chmod 600 {key}" in refusal(BrokerAccess(certificate=certificate, private_key=key))
    with pytest.raises(ValueError, match="private_key is given without certificate"):
        BrokerAccess(private_key=key)


def test_a_password_over_a_network_without_tls_is_warned_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    MqttNetwork("mqtt://me:secret@broker.example")
    assert "without TLS" in caplog.text
    assert "secret" not in caplog.text
    caplog.clear()
    MqttNetwork("mqtt://me:secret@127.0.0.1")
    assert not caplog.text
