"""An embedded broker runs as long as its block, and no longer than the process around it."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from messaging import broker as broker_module
from messaging.broker import HOST, embedded_broker, embedded_kind, free_port
from messaging.errors import AddressError, BrokerUnavailableError
from messaging.mqtt import MqttNetwork, parse_address

pytestmark = pytest.mark.broker
ROOT = Path(__file__).parents[2]


def processes() -> list[psutil.Process]:
    """Return what runs below this process."""
    return list(psutil.Process().children(recursive=True))


def is_alive(process: psutil.Process) -> bool:
    """Return whether a process runs; one that nobody reaped does not."""
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def test_a_broker_answers_in_its_block_and_is_gone_after_it(kind: str) -> None:
    before = processes()
    with embedded_broker(kind=kind) as url:
        MqttNetwork(url).require(5.0)
        running = [p for p in processes() if p not in before]
        assert len(running) == 2  # the guard and the broker
        port = parse_address(url).port
    assert not any(p.is_running() for p in running)
    with socket.socket() as probe:
        assert probe.connect_ex((HOST, port)) != 0


def test_a_broker_listens_on_this_machine_alone(kind: str) -> None:
    with embedded_broker(kind=kind) as url:
        port = parse_address(url).port
        heard = {
            c.laddr.ip
            for c in psutil.net_connections("tcp")
            if c.status == psutil.CONN_LISTEN and c.laddr.port == port
        }
    assert heard == {"127.0.0.1"}


def test_a_broker_stops_when_its_block_fails(kind: str) -> None:
    before = processes()
    with pytest.raises(ZeroDivisionError), embedded_broker(kind=kind):
        _ = 1 / 0
    assert processes() == before


def test_a_broker_starts_again_on_the_port_it_had(kind: str) -> None:
    port = free_port()
    for _ in range(2):
        with embedded_broker(kind=kind, port=port) as url:
            assert url == f"mqtt://127.0.0.1:{port}"
            MqttNetwork(url).require(5.0)


def test_a_broker_does_not_outlive_a_parent_that_was_killed(kind: str, tmp_path: Path) -> None:
    script = (
        "import sys; from messaging.broker import embedded_broker\n"
        f"with embedded_broker(kind={kind!r}) as url:\n"
        "    print(url, flush=True)\n"
        "    sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env=os.environ | {"TMPDIR": str(tmp_path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as parent:
        try:
            assert parent.stdout is not None
            assert parent.stdout.readline().startswith("mqtt://")
            below = psutil.Process(parent.pid).children(recursive=True)
            assert len(below) == 2
            assert len(list(tmp_path.iterdir())) == 1
        finally:
            parent.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 10.0
    while (alive := [p for p in below if is_alive(p)]) and time.monotonic() < deadline:
        psutil.wait_procs(alive, timeout=0.1)
    for process in alive:
        process.kill()
    assert alive == []
    assert list(tmp_path.iterdir()) == []


def test_a_port_that_is_taken_is_an_error_of_the_user(kind: str) -> None:
    with socket.create_server((HOST, 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(AddressError, match=f"port {port}.*choose another"):
            embedded_broker(kind=kind, port=port).__enter__()


@pytest.mark.parametrize("port", [0, -1, 65_536])
def test_a_port_that_cannot_be_is_an_error_of_the_user(kind: str, port: int) -> None:
    with pytest.raises(AddressError, match="1 to 65535"):
        embedded_broker(kind=kind, port=port).__enter__()


def test_an_unknown_broker_is_named_with_the_known_ones() -> None:
    with pytest.raises(AddressError, match=r"'emqx'.*mosquitto, iotcore"):
        embedded_broker(kind="emqx").__enter__()


def test_without_any_broker_the_remedies_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda *_args, **_kwargs: None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    assert embedded_kind() is None
    for kind in (None, "mosquitto", "iotcore"):
        with pytest.raises(BrokerUnavailableError, match=r"pip install 'pwff\[broker\]'"):
            embedded_broker(kind=kind).__enter__()


def test_a_broker_that_does_not_start_is_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    failing = [sys.executable, "-c", "import sys; sys.exit('no room in the inn')"]
    monkeypatch.setattr(broker_module, "is_installed", lambda _kind: True)
    monkeypatch.setattr(broker_module, "_command", lambda *_args: failing)
    before = processes()
    with pytest.raises(BrokerUnavailableError, match="no room in the inn"):
        embedded_broker(kind="mosquitto").__enter__()
    assert processes() == before
