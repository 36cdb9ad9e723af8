"""A broker for a run that brings none: mosquitto where it is on PATH, else the iotcore package.

Both run as child processes on 127.0.0.1 with a configuration written here, never with their
defaults (mosquitto drops messages silently past its queue; iotcore listens on every interface and
caps a packet at 20 KB). Neither asks who connects, so neither is bound to another address. iotcore
0.4 hands a new subscriber at most 100 retained messages (measured; no setting changes it).
A small guard process stands between, which stops the broker when this process is gone, however
that came about.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from messaging.errors import AddressError, BrokerUnavailableError
from messaging.mqtt import MqttNetwork, parse_address

HOST = "127.0.0.1"
START_SECONDS = 15.0
KINDS = ("mosquitto", "iotcore")

_MOSQUITTO = """\
listener {port} {host}
allow_anonymous true
max_queued_messages 100000
max_packet_size 300000
set_tcp_nodelay true
persistence false
log_type error
log_type warning
"""

_IOTCORE = """\
id = 0

[router]
id = 0
max_connections = 10010
max_outgoing_packet_count = 200
max_segment_size = 8388608
max_segment_count = 8

[v5.1]
name = "v5"
listen = "{host}:{port}"
next_connection_delay_ms = 1

[v5.1.connections]
connection_timeout_ms = 60000
max_payload_size = 300000
max_inflight_count = 100
dynamic_filters = true
"""

# rumqttd logs each packet as an error.
_SERVE_IOTCORE = """\
import logging, sys, iotcore
logging.getLogger("rumqttd").setLevel(logging.CRITICAL)
iotcore.Broker(config_path=sys.argv[1]).run_forever()
"""

# A parent-death signal would not do: it is cleared when mosquitto, started as root, changes its
# user. Nor would a pipe: a forked worker keeps its other end open.
_GUARD = """\
import os, shutil, signal, subprocess, sys
parent, folder, *command = sys.argv[1:]
def stop(*_):
    os.kill(broker.pid, signal.SIGTERM)
def watch(*_):
    if os.getppid() != int(parent):
        os.kill(broker.pid, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)
broker = subprocess.Popen(command)
signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGALRM, watch)
signal.setitimer(signal.ITIMER_REAL, 1, 1)
sys.exit(broker.wait())
"""


def find_mosquitto() -> str | None:
    """Return the path of the mosquitto program; Debian keeps it in ``/usr/sbin``."""
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"])
    return shutil.which("mosquitto", path=path)


def embedded_kind() -> str | None:
    """Return which broker ``embedded_broker`` would start: mosquitto, iotcore or none."""
    return next((kind for kind in KINDS if is_installed(kind)), None)


def is_installed(kind: str) -> bool:
    """Return whether ``embedded_broker`` could start a broker of this kind."""
    if kind == "mosquitto":
        return find_mosquitto() is not None
    return kind == "iotcore" and importlib.util.find_spec("iotcore") is not None


def free_port() -> int:
    """Return a port of 127.0.0.1 that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def _check_port(port: int) -> None:
    if not 1 <= port <= 65_535:
        raise AddressError(f"broker port {port}; choose 1 to 65535, or none for a free one")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as err:
            raise AddressError(
                f"port {port} of {HOST} cannot be had ({err.strerror}); choose another, or give "
                f"the broker that listens there as --broker mqtt://{HOST}:{port}"
            ) from err


def _command(kind: str, port: int, folder: Path) -> list[str]:
    if kind == "mosquitto":
        config = folder / "mosquitto.conf"
        config.write_text(_MOSQUITTO.format(host=HOST, port=port))
        return [find_mosquitto() or kind, "-c", str(config)]
    config = folder / "iotcore.toml"
    config.write_text(_IOTCORE.format(host=HOST, port=port))
    return [sys.executable, "-c", _SERVE_IOTCORE, str(config)]


@contextlib.contextmanager
def embedded_broker(*, kind: str | None = None, port: int | None = None) -> Iterator[str]:
    """Run a broker for as long as the block lasts; yield its address.

    Args:
        kind: ``mosquitto`` or ``iotcore``; by default the first of them that is installed.
        port: By default a free one.

    Raises:
        AddressError: If ``kind`` is unknown or ``port`` is taken.
        BrokerUnavailableError: If no broker is installed, or it does not answer.
    """
    if kind is not None and kind not in KINDS:
        raise AddressError(f"unknown broker '{kind}'; choose one of {', '.join(KINDS)}")
    kind = kind or embedded_kind()
    if kind is None or not is_installed(kind):
        raise BrokerUnavailableError(
            f"no {kind or 'MQTT broker'} is installed here: install mosquitto, or "
            "`pip install 'pwff[broker]'`, or give a broker with --broker mqtt://HOST:PORT"
        )
    if port is not None:
        _check_port(port)
    port = free_port() if port is None else port
    with tempfile.TemporaryDirectory(prefix="pwff-broker-") as folder:
        log = Path(folder) / "broker.log"
        with log.open("wb") as out:
            guard = [sys.executable, "-I", "-S", "-c", _GUARD, str(os.getpid()), folder]
            child = subprocess.Popen(
                guard + _command(kind, port, Path(folder)),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                cwd=folder,
                start_new_session=True,  # Ctrl-C is for the run, which stops the broker last
            )
        url = f"mqtt://{HOST}:{port}"
        try:
            _await(child, url, kind, log)
            yield url
        finally:
            _stop(child)


def _await(child: subprocess.Popen[bytes], url: str, kind: str, log: Path) -> None:
    address = parse_address(url)
    deadline = time.monotonic() + START_SECONDS
    while child.poll() is None and time.monotonic() < deadline:
        try:
            socket.create_connection((address.host, address.port), timeout=1).close()
        except OSError:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(0.05)
            continue
        MqttNetwork(url).require(START_SECONDS)
        return
    said = log.read_text(errors="replace").strip().splitlines()
    raise BrokerUnavailableError(
        f"the embedded broker ({kind}) did not start: {said[-1] if said else 'it said nothing'}"
    )


def _stop(child: subprocess.Popen[bytes]) -> None:
    """End guard and broker, which are one process group; the guard is gone after the broker."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGTERM)
    try:
        child.wait(5)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
