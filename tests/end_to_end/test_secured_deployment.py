"""From `pwff certs` to running services, as docs/deployment.md has it, and to SIGTERM."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from messaging.broker import HOST, find_mosquitto, free_port
from tests.end_to_end.conftest import await_line, pwff, read_run, start
from tests.end_to_end.test_deployment import a_client, a_cloud

pytestmark = pytest.mark.broker
GRACE = 60.0  # TimeoutStopSec of the units, the shorter of the two
CLIENT = "laptop-1"


@pytest.fixture
def secured(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """Yield the folder of `pwff certs` and the address of the broker that it configured."""
    if find_mosquitto() is None:
        pytest.skip("mosquitto is not installed: apt-get install mosquitto")
    secrets, port = tmp_path / "secrets", free_port()
    (tmp_path / "data").mkdir()
    done = pwff(
        "certs", str(secrets), "--run", "trial", "--client", CLIENT, "--port", str(port),
        "--installed", str(secrets / "broker"), "--data", str(tmp_path / "data"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    config = secrets / "broker" / "mosquitto.conf"
    if os.geteuid() == 0:
        config.write_text(config.read_text() + "user root\n")  # the folder is root's alone
    process = subprocess.Popen(
        [find_mosquitto() or "", "-c", str(config)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield secrets, f"mqtts://localhost:{port}"
    finally:
        process.terminate()
        process.wait(20)


def security(place: Path, name: str, **more: Path) -> str:
    """Return the section of a configuration that names what `pwff certs` made."""
    files = {
        "ca": place / "ca.pem",
        "certificate": place / f"{name}.pem",
        "private_key": place / f"{name}.key",
        **more,
    }
    return "\n[security]\n" + "".join(f'{key} = "{path}"\n' for key, path in files.items())


def ask(port: int, page: str) -> tuple[int, str]:
    """Return status and text of a page of the monitor."""
    try:
        with urllib.request.urlopen(f"http://{HOST}:{port}{page}", timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as err:
        return err.code, err.read().decode()


def leave(process: subprocess.Popen[str]) -> list[dict[str, object]]:
    """Send SIGTERM; return the lines of the log that followed, once it left within its grace."""
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=GRACE)
    assert process.returncode == 130, said
    assert time.monotonic() - began < GRACE
    return [json.loads(line) for line in said.splitlines() if line.startswith("{")]


def test_a_secured_deployment_runs_is_watched_and_leaves_at_sigterm(
    secured: tuple[Path, str], tmp_path: Path
) -> None:
    secrets, url = secured
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        monitor = probe.getsockname()[1]
    cloud = Path(
        a_cloud(tmp_path, url, clients=1, minimum_clients=1, local_steps=100_000,
                monitor=f"{HOST}:{monitor}")
    )  # fmt: skip
    place = secrets / "aggregator"
    keys = {"keys": place / "trial.keys.toml"}
    cloud.write_text(cloud.read_text() + security(place, "aggregator", **keys))
    alive = tmp_path / "alive"
    device = Path(a_client("laptop.toml", tmp_path, url, CLIENT, alive_file=str(alive)))
    place = secrets / "clients" / CLIENT
    device.write_text(device.read_text() + security(place, CLIENT, key=place / "trial.key.toml"))
    processes = [
        start("aggregator", "--config", str(cloud), "--log-format", "json"),
        start("client", "--config", str(device), "--log-format", "json"),
    ]
    try:
        line = json.loads(
            await_line(processes[0], lambda text: '"event": "task"' in text and '"train"' in text)
        )
        assert (line["run"], line["round"]) == ("trial", 1)
        assert ask(monitor, "/healthz")[0] == 200
        assert ask(monitor, "/readyz")[0] == 200
        page = ask(monitor, "/metrics")[1]
        assert 'pwff_clients{state="training"} 1.0' in page
        assert "pwff_connections_total 1.0" in page
        assert alive.exists()
        # the device is at its hundred thousand steps, and the aggregator waits for it
        client_log = leave(processes[1])
        assert all(entry["run"] == "trial" and entry["client"] == CLIENT for entry in client_log)
        leave(processes[0])
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.communicate()
    record = read_run(tmp_path / "run")
    assert (record["status"], record["stop_reason"]) == ("stopped", "interrupted")
    assert [c["id"] for c in record["clients"]] == [CLIENT]
    assert (tmp_path / CLIENT / "trial").is_dir()


def test_a_device_whose_key_others_can_read_ends_with_a_sentence(tmp_path: Path) -> None:
    key = tmp_path / "trial.key.toml"
    key.write_text("")
    key.chmod(0o644)
    place = Path(a_client("laptop.toml", tmp_path, f"mqtt://{HOST}:1", CLIENT))
    place.write_text(place.read_text() + f'\n[security]\nkey = "{key}"\n')
    done = pwff("client", "--config", str(place))
    assert done.returncode == 2
    assert f"open to others (mode 644); make it its owner's alone: chmod 600 {key}" in done.stderr
    assert "Traceback" not in done.stderr
