"""A served run as whoever operates it sees it: its pages, its log, its keys and what it wrote."""

from __future__ import annotations

import json
import logging
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cloud_aggregator.door import DoorLimits
from cloud_aggregator.guards import LimitsSection
from cloud_aggregator.inbox import Inbox
from cloud_aggregator.metrics import CountedNetwork, Metrics
from cloud_aggregator.server import Aggregator
from cloud_aggregator.service import serve
from cloud_aggregator.service_config import Service, load_service
from device_profiles.errors import InputError
from messaging.broker import HOST, free_port
from messaging.errors import SecretError
from messaging.key_files import RunKeys
from messaging.secret_files import write_new
from messaging.transport import is_connected, largest_packet
from tests.cloud_aggregator.conftest import Clock, Puppet, Stage, settings_of
from tests.cloud_aggregator.test_service import (  # noqa: F401 - a fixture
    a_service,
    checkpoint,
    write,
)


def ask(port: int, page: str) -> tuple[int, str]:
    """Return status and text of a page."""
    try:
        with urllib.request.urlopen(f"http://{HOST}:{port}{page}", timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as err:
        return err.code, err.read().decode()


def test_a_served_run_answers_at_its_monitor_and_no_longer_when_it_is_over(
    checkpoint: Path,  # noqa: F811
) -> None:
    port = free_port()
    pages: dict[str, tuple[int, str]] = {}

    def look(server: Aggregator) -> None:
        pages.update({page: ask(port, page) for page in ("/metrics", "/healthz", "/readyz")})
        server.stop()

    service = a_service(checkpoint, monitor=f"{HOST}:{port}")
    serve(service, notify=lambda _event, **_fields: None, on_start=look)
    assert 'pwff_run_info{method="pwff",run="trial"} 1.0' in pages["/metrics"][1]
    assert pages["/healthz"][0] == 503  # the protocol thread has not begun
    status, text = pages["/readyz"]
    assert (status, json.loads(text)["broker_connected"]) == (503, False)
    with pytest.raises(urllib.error.URLError):
        ask(port, "/metrics")


def test_health_follows_the_ticks_of_the_inbox(stage: Stage) -> None:
    clock = Clock()
    server = stage.aggregator(settings_of(virtual_time=False), clock=clock)
    vitals = server.vitals()
    assert not vitals.health()["ok"]
    puppets = [Puppet(stage.network, name) for name in ("a", "b", "c")]
    for puppet in puppets:
        puppet.hello()
    stage.start(server)
    puppets[0].expect_task("evaluate", 0)  # whoever sends it has gone round once
    assert vitals.health() == {"ok": True, "seconds_since_tick": 0.0}
    assert vitals.readiness() == {
        "ok": True, "broker_connected": True, "store_open": True, "run_not_finished": True,
    }  # fmt: skip


def test_an_inbox_knows_when_it_last_ticked() -> None:
    clock = Clock()
    inbox = Inbox(take=lambda _topic, _payload: None, tick=lambda _now: None, clock=clock)
    assert inbox.ticked_at is None
    clock.now = 5.0
    inbox.put("", b"")
    assert not inbox.wait(lambda: False, 0.0)
    assert inbox.ticked_at is None
    asked = iter([False, True])
    assert inbox.wait(lambda: next(asked), 1.0)
    assert inbox.ticked_at == 5.0


def test_each_refusal_is_counted_by_its_code(checkpoint: Path) -> None:  # noqa: F811
    service = a_service(checkpoint)

    def refuse(server: Aggregator) -> None:
        server._desk.received("pwff/v1/trial/c/a/up/control", b"{")
        server._door.deliver("pwff/v1/trial/c/../up/control", b"{")
        server._tell_refusals()
        server.stop()

    told: list[tuple[str, dict[str, Any]]] = []
    serve(service, notify=lambda event, **f: told.append((event, f)), on_start=refuse)
    refused = [(f["client"], f["code"], f.get("count", 1)) for e, f in told if e == "refused"]
    assert refused == [("a", "schema", 1), ("", "identity", 1)]
    lines = (service.out / "metrics.jsonl").read_text().splitlines()
    assert sum(json.loads(line)["event"] == "refused" for line in lines) == 2


def test_what_is_refused_together_is_counted_as_so_many() -> None:
    metrics = Metrics("trial", "pwff")
    metrics("refused", client="", code="rate", reason="", count=40)
    metrics("refused", client="a", code="rate", reason="")
    metrics("refused", client="a", code="unheard-of", reason="")
    values = {
        s.labels["code"]: s.value
        for family in text_string_to_metric_families(metrics.page().decode())
        for s in family.samples
        if s.name == "pwff_rejects_total" and s.value
    }
    assert values == {"rate": 41.0, "other": 1.0}


def test_the_keys_of_another_run_or_open_to_others_are_refused(
    checkpoint: Path,  # noqa: F811
) -> None:
    path = checkpoint.parent / "keys.toml"
    write_new(path, RunKeys.generate("other").file(), secret=True)
    service = a_service(checkpoint, security={"keys": path})
    with pytest.raises(SecretError, match="is of run 'other', and 'trial' needs its own"):
        serve(service, notify=lambda _event, **_fields: None, on_start=lambda s: s.stop())
    path.chmod(0o644)
    with pytest.raises(SecretError, match="chmod 600"):
        serve(service, notify=lambda _event, **_fields: None, on_start=lambda s: s.stop())


def test_a_run_without_keys_on_a_broker_elsewhere_is_warned_of(
    checkpoint: Path,  # noqa: F811
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for broker, warned in (("mqtt://127.0.0.1:9", False), ("mqtts://192.0.2.1:9", True)):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            serve(
                a_service(checkpoint, broker=broker),
                notify=lambda _event, **_fields: None,
                on_start=lambda server: server.stop(),
            )
        assert ("this run has no keys" in caplog.text) == warned
    keys = RunKeys.generate("trial")
    monkeypatch.setenv("PWFF_MASTER_KEY", keys.master.hex())
    monkeypatch.setenv("PWFF_SIGNING_KEY", keys.signing_key.seed.hex())
    caplog.clear()
    service = a_service(checkpoint, broker="mqtts://192.0.2.1:9")
    serve(service, notify=lambda _event, **_fields: None, on_start=lambda server: server.stop())
    assert "no keys" not in caplog.text
    for path in service.out.rglob("*"):
        assert not path.is_file() or keys.master.hex().encode() not in path.read_bytes()


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ('monitor = "nowhere"', "monitor = 'nowhere' is no address"),
        ('[security]\nkey = "x"', "unknown key 'security.key'; did you mean 'keys'?"),
        ('[security]\nprivate_key = "x"', "private_key is given without certificate"),
        ('[security]\nusername = "x"', "username is given alone"),
        ("[limits]\nmessages_per_second = 0", "limits.messages_per_second = 0"),
        ("[limits]\nwaiting_bytes = 1", "limits.waiting_bytes = 1"),
    ],
)
def test_a_mistake_in_what_guards_a_run_is_told(lines: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as told:
        load_service(write(tmp_path, f"{write(tmp_path).read_text()}{lines}\n"))
    assert words in str(told.value)


def test_the_limits_of_a_file_are_those_of_the_door() -> None:
    assert LimitsSection().door == DoorLimits()
    assert Service.model_fields["limits"].default == LimitsSection()


class _Line:
    """A transport that says what it takes, and whether it stands."""

    largest_packet = 65_536

    def __init__(self, *, stands: bool) -> None:
        self._stands = stands

    def start(self) -> None:
        """Connect."""

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """Send nothing."""

    def close(self) -> None:
        """Leave."""

    def is_connected(self) -> bool:
        """Return what the test says."""
        return self._stands


@pytest.mark.parametrize("stands", [True, False])
def test_a_counted_connection_says_what_the_connection_says(stands: bool) -> None:
    network: Any = SimpleNamespace(open=lambda **_options: _Line(stands=stands))
    counted = CountedNetwork(network, Metrics("trial", "pwff")).open(
        client_id="c", filters=[], deliver=lambda *_: None, connected=lambda: None
    )
    assert is_connected(counted) == stands
    assert largest_packet(counted) == 65_536
