"""The pages that machines ask, over real sockets."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cloud_aggregator.health import Vitals, monitor, parse_address
from cloud_aggregator.metrics import Metrics
from device_profiles.errors import InputError
from tests.cloud_aggregator.conftest import Clock


@dataclass
class Patient:
    """A run whose state a test sets."""

    clock: Clock = field(default_factory=Clock)
    ticked_at: float | None = 0.0
    connected: bool = True
    store_open: bool = True
    finished: bool = False

    def vitals(self) -> Vitals:
        """Return what the server asks."""
        return Vitals(
            ticked_at=lambda: self.ticked_at,
            connected=lambda: self.connected,
            store_open=lambda: self.store_open,
            finished=lambda: self.finished,
            silence_seconds=30.0,
            clock=self.clock,
        )


@pytest.fixture
def patient() -> Patient:
    return Patient()


@pytest.fixture
def metrics() -> Metrics:
    return Metrics("trial", "pwff")


@pytest.fixture
def port(patient: Patient, metrics: Metrics) -> Iterator[int]:
    with monitor("0", patient.vitals(), metrics.page) as port:
        yield port


def ask(port: int, path: str, method: str = "GET") -> tuple[int, dict[str, str], bytes]:
    """Return the answer's status, headers and body."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request(method, path)
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read()
    finally:
        connection.close()


def state(port: int, path: str) -> tuple[int, dict[str, Any]]:
    status, headers, body = ask(port, path)
    assert headers["Content-Type"] == "application/json"
    return status, json.loads(body)


def test_metrics_are_read_as_prometheus_reads_them(port: int, metrics: Metrics) -> None:
    metrics("refused", client="a", code="mac", reason="forged")
    status, headers, body = ask(port, "/metrics")
    assert (status, headers["Content-Type"].partition(";")[0]) == (200, "text/plain")
    families = {f.name: f for f in text_string_to_metric_families(body.decode())}
    counted = {
        s.labels["code"]: s.value
        for s in families["pwff_rejects"].samples
        if s.name.endswith("_total")
    }
    assert (counted["mac"], counted["replay"]) == (1, 0)


def test_a_run_is_healthy_while_its_thread_goes_round(port: int, patient: Patient) -> None:
    patient.clock.now = 30.0
    assert state(port, "/healthz") == (200, {"ok": True, "seconds_since_tick": 30.0})
    patient.clock.now = 31.0
    status, said = state(port, "/healthz")
    assert (status, said["ok"]) == (503, False)
    assert "no tick of the protocol thread for 31 s" in said["reason"]
    patient.ticked_at = 31.0
    assert state(port, "/healthz")[0] == 200
    patient.ticked_at = None
    assert state(port, "/healthz")[0] == 503


@pytest.mark.parametrize(
    ("name", "bad", "check"),
    [
        ("connected", False, "broker_connected"),
        ("store_open", False, "store_open"),
        ("finished", True, "run_not_finished"),
    ],
)
def test_a_run_is_ready_if_nothing_is_missing(
    name: str, bad: bool, check: str, port: int, patient: Patient
) -> None:
    good = {"broker_connected": True, "store_open": True, "run_not_finished": True}
    assert state(port, "/readyz") == (200, {"ok": True, **good})
    setattr(patient, name, bad)
    assert state(port, "/readyz") == (503, {"ok": False, **good, check: False})


def test_another_path_is_not_there(port: int) -> None:
    for path in ("/", "/metrics/", "/healthz/../etc/passwd", "/Metrics"):
        assert ask(port, path)[0] == 404, path


def test_only_reading_is_answered(port: int) -> None:
    for method in ("POST", "PUT", "DELETE", "OPTIONS"):
        status, headers, _ = ask(port, "/metrics", method)
        assert (status, headers["Allow"]) == (405, "GET, HEAD")
    assert ask(port, "/metrics", "BREW")[0] == 501


def test_head_answers_without_a_body(port: int) -> None:
    status, headers, body = ask(port, "/healthz", "HEAD")
    assert (status, body) == (200, b"")
    assert int(headers["Content-Length"]) > 0


def test_it_says_nothing_of_the_software_below(port: int) -> None:
    _, headers, _ = ask(port, "/healthz")
    assert headers["Server"].strip() == "pwff"


def test_connections_that_say_nothing_take_no_more_than_their_room(port: int) -> None:
    silent = [socket.create_connection(("127.0.0.1", port), timeout=10) for _ in range(16)]
    with socket.create_connection(("127.0.0.1", port), timeout=10) as one_more:
        assert one_more.recv(1) == b""  # closed at once
    for connection in silent:
        connection.close()


def test_a_port_in_use_is_told_with_a_remedy(port: int, patient: Patient) -> None:
    address = f"127.0.0.1:{port}"
    with pytest.raises(InputError, match=f"'{address}'.*give a free port"):  # noqa: SIM117
        with monitor(address, patient.vitals(), bytes):
            pass


def test_nothing_listens_after_the_run(patient: Patient) -> None:
    with monitor("0", patient.vitals(), bytes) as port:
        pass
    with pytest.raises(ConnectionRefusedError):
        ask(port, "/healthz")


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("9464", "127.0.0.1", 9464),
        (":9464", "127.0.0.1", 9464),
        ("0.0.0.0:80", "0.0.0.0", 80),  # noqa: S104 - an operator's own choice
        ("localhost:0", "localhost", 0),
        ("[::1]:9464", "::1", 9464),
    ],
)
def test_an_address_names_this_machine_alone_unless_it_says_more(
    text: str, host: str, port: int
) -> None:
    assert parse_address(text) == (host, port)


@pytest.mark.parametrize(
    "text", ["", "localhost", "localhost:", ":65536", "::1:80", "a:-1", "a b:1", "a:²", "[]x:1"]
)
def test_what_is_no_address_is_refused_by_its_key(text: str) -> None:
    with pytest.raises(InputError, match=r"monitor = .* HOST:PORT"):
        parse_address(text)
