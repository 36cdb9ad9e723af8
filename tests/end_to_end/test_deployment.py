"""The aggregator and clients as separate programs against a real broker, as they are deployed."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from messaging.broker import embedded_broker, free_port
from tests.end_to_end.conftest import await_line, pwff, read_run, start

pytestmark = pytest.mark.broker

EXAMPLES = Path(__file__).parents[2] / "examples"


def write_data(folder: Path) -> Path:
    """Write a device's own few rows."""
    path = folder / "rows.jsonl"
    rows = [
        {"instruction": f"Name the number after {i}.", "output": f"The number is {i + 1}."}
        for i in range(10)
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def configure(example: str, place: Path, values: dict[str, object]) -> str:
    """Write an example configuration with some of its values changed; return its path."""
    text = (EXAMPLES / example).read_text()
    for key, value in values.items():
        line = f"{key} = {json.dumps(value)}"
        text, found = re.subn(rf"(?m)^#? ?{key} = .*$", line, text)
        if not found:
            text = f"{line}\n{text}"
    path = place / f"{example.removesuffix('.toml')}-{len(list(place.iterdir()))}.toml"
    path.write_text(text)
    return str(path)


def a_cloud(folder: Path, url: str, **values: object) -> str:
    """Write the cloud's example configuration for a small run."""
    small = {"clients": 2, "minimum_clients": 2, "rounds": 2, "local_steps": 2, "batch_size": 2}
    run = {"broker": url, "out": str(folder / "run"), "run": "trial"}
    return configure("cloud.toml", folder, {**small, **run, **values})


def a_client(example: str, folder: Path, url: str, client: str, **values: object) -> str:
    """Write a device's example configuration for a small run."""
    device = {"broker": url, "run": "trial", "client": client, "folder": str(folder / client)}
    return configure(example, folder, {**device, "data": str(write_data(folder)), **values})


@pytest.fixture
def processes() -> list[subprocess.Popen[str]]:
    """Collect processes, and see that none outlives the test."""
    return []


@pytest.fixture(autouse=True)
def _no_process_is_left(processes: list[subprocess.Popen[str]]):  # type: ignore[no-untyped-def]  # noqa: ANN202
    yield
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.communicate()


def finish(process: subprocess.Popen[str]) -> str:
    """Wait for a process that must end well; return what it said."""
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return said


@pytest.mark.parametrize("first", ["aggregator", "clients"])
def test_started_in_any_order_three_programs_finish_a_run(
    first: str, broker: str, tmp_path: Path, processes: list[subprocess.Popen[str]]
) -> None:
    cloud = ["aggregator", "--config", a_cloud(tmp_path, broker)]
    laptop = ["client", "--config", a_client("laptop.toml", tmp_path, broker, "laptop-1")]
    jetson = ["client", "--config", a_client("jetson.toml", tmp_path, broker, "jetson-1")]
    order = [cloud, laptop, jetson] if first == "aggregator" else [laptop, jetson, cloud]
    for arguments in order:
        process = start(*arguments)
        processes.append(process)
        if arguments is not order[-1]:
            await_line(process, lambda line: "connected" in line)
    for process in processes:
        finish(process)
    run = read_run(tmp_path / "run")
    assert (run["status"], run["engine"]) == ("done", "deployment")
    assert [c["id"] for c in run["clients"]] == ["jetson-1", "laptop-1"]
    assert [c["costs"] for c in run["clients"]] == ["measured", "measured"]
    assert all(r["accepted"] for r in run["rounds"])
    assert run["summary"]["eval_accuracy_after"] is not None


def test_services_wait_for_a_broker_that_comes_later(
    tmp_path: Path, processes: list[subprocess.Popen[str]]
) -> None:
    port = free_port()
    url = f"mqtt://127.0.0.1:{port}"
    cloud = start("aggregator", "--config", a_cloud(tmp_path, url, clients=1, minimum_clients=1))
    processes.append(cloud)
    await_line(cloud, lambda line: "no broker at" in line)
    laptop = start("client", "--config", a_client("laptop.toml", tmp_path, url, "laptop-1"))
    processes.append(laptop)
    await_line(laptop, lambda line: "no broker at" in line)
    with embedded_broker(port=port):
        finish(cloud)
        finish(laptop)
    assert read_run(tmp_path / "run")["status"] == "done"


def test_a_client_that_is_killed_and_started_again_finishes_the_run(
    broker: str, tmp_path: Path, processes: list[subprocess.Popen[str]]
) -> None:
    cloud = start(
        "aggregator",
        "--config",
        a_cloud(tmp_path, broker, clients=1, minimum_clients=1, local_steps=20),
    )
    config = a_client("laptop.toml", tmp_path, broker, "laptop-1")
    doomed = start("client", "--config", config)
    processes += [cloud, doomed]
    await_line(cloud, lambda line: line.startswith("before:"))
    doomed.send_signal(signal.SIGKILL)
    again = start("client", "--config", config)
    processes.append(again)
    finish(cloud)
    finish(again)
    run = read_run(tmp_path / "run")
    assert [r["accepted"] for r in run["rounds"]] == [["laptop-1"], ["laptop-1"]]


def test_a_stopped_aggregator_goes_on_where_it_was(
    broker: str, tmp_path: Path, processes: list[subprocess.Popen[str]]
) -> None:
    config = a_cloud(tmp_path, broker, clients=1, minimum_clients=1)
    cloud = start("aggregator", "--config", config)
    laptop = start("client", "--config", a_client("laptop.toml", tmp_path, broker, "laptop-1"))
    processes += [cloud, laptop]
    await_line(cloud, lambda line: line.startswith("round 1/2"))
    cloud.send_signal(signal.SIGTERM)
    said, _ = cloud.communicate(timeout=120)
    assert cloud.returncode == 130, said
    again = start("aggregator", "--config", config)
    processes.append(again)
    finish(again)
    finish(laptop)
    assert [r["round"] for r in read_run(tmp_path / "run")["rounds"]] == [1, 2]


def test_a_device_on_another_placement_is_refused_with_a_sentence(
    broker: str, tmp_path: Path, processes: list[subprocess.Popen[str]]
) -> None:
    cloud = start("aggregator", "--config", a_cloud(tmp_path, broker, clients=1, minimum_clients=1))
    processes.append(cloud)
    await_line(cloud, lambda line: "connected" in line)
    done = pwff(
        "client",
        "--config",
        a_client("laptop.toml", tmp_path, broker, "laptop-1", placement="wide"),
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "placement" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_port_that_is_taken_is_told() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"port {port}"), embedded_broker(port=port):
            pass


def test_bad_configurations_end_with_two_and_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text('run = "x"\nbrokr = "mqtt://localhost"\n')
    for command in ("aggregator", "client"):
        done = pwff(command, "--config", str(tmp_path / "bad.toml"))
        assert done.returncode == 2, done.stdout + done.stderr
        assert "brokr" in done.stderr
        assert "broker" in done.stderr
