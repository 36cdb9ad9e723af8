"""A fleet from one command, over a real broker, with real worker processes."""

from __future__ import annotations

import importlib.util
import signal
from pathlib import Path

import psutil
import pytest

from messaging.broker import embedded_broker, find_mosquitto
from tests.end_to_end.conftest import (
    SMALL,
    await_line,
    comparable,
    pwff,
    read_run,
    start,
    workers_of,
)

pytestmark = pytest.mark.broker


@pytest.mark.parametrize("kind", ["mosquitto", "iotcore"])
def test_the_bits_are_the_same_over_mqtt_and_in_memory(
    kind: str, undisturbed: Path, tmp_path: Path
) -> None:
    if kind == "mosquitto" and find_mosquitto() is None:
        pytest.skip("mosquitto is not installed")
    if kind == "iotcore" and importlib.util.find_spec("iotcore") is None:
        pytest.skip("iotcore is not installed")
    with embedded_broker(kind=kind) as url:
        done = pwff(
            "emulate", *SMALL, "--broker", url, "--workers", "2", "--out", str(tmp_path / "r")
        )
    assert done.returncode == 0, done.stdout + done.stderr
    assert comparable(tmp_path / "r") == comparable(undisturbed)


def test_a_run_is_done_and_says_what_it_did(undisturbed: Path) -> None:
    run = read_run(undisturbed)
    assert (run["status"], run["stop_reason"]) == ("done", "rounds")
    assert [len(r["accepted"]) for r in run["rounds"]] == [3, 3]
    assert {c["adapter_count"] for c in run["clients"]} == {36}
    assert {c["lora_count"] for c in run["clients"]} <= {12, 24, 36}
    # 36 adapters of size 10 on width 128: 36 * (2*128*10 + 128 + 10)
    assert {c["shared_parameters"] for c in run["clients"]} == {97_128}
    uploads = [c for r in run["rounds"] for c in r["clients"]]
    assert all(0 <= c["upload_bytes"] / (4 * 97_128) - 1 < 0.01 for c in uploads)
    assert (undisturbed / "report.html").stat().st_size > 10_000
    events = (undisturbed / "metrics.jsonl").read_text().splitlines()
    assert sum('"event": "round"' in line for line in events) == 2


def test_interrupted_and_resumed_it_ends_with_the_same_bits(
    undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    process = start("emulate", *SMALL, "--out", str(out))
    await_line(process, lambda line: line.startswith("round 1/2"))
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert "--resume" in said
    assert read_run(out)["status"] == "stopped"
    again = pwff("emulate", "--resume", "--out", str(out))
    assert again.returncode == 0, again.stdout + again.stderr
    assert comparable(out) == comparable(undisturbed)


def test_a_killed_worker_is_started_again_and_changes_no_bit(
    undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    process = start("emulate", *SMALL, "--workers", "2", "--out", str(out))
    await_line(process, lambda line: line.startswith("before:"))
    workers_of(psutil.Process(process.pid))[0].send_signal(signal.SIGKILL)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert comparable(out) == comparable(undisturbed)


def test_workers_leave_when_their_run_is_killed(tmp_path: Path) -> None:
    process = start("emulate", *SMALL, "--workers", "2", "--out", str(tmp_path / "run"))
    await_line(process, lambda line: line.startswith("before:"))
    run = psutil.Process(process.pid)
    there = [*run.children(recursive=True)]
    assert len(workers_of(run)) == 2
    process.kill()
    process.communicate(timeout=60)
    assert not psutil.wait_procs(there, timeout=60)[1]


def test_alone_on_each_device_nothing_is_uploaded(tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = pwff(
        "emulate", *SMALL, "--method", "local-only", "--transport", "memory", "--out", str(out)
    )
    assert done.returncode == 0, done.stdout + done.stderr
    run = read_run(out)
    assert run["summary"]["upload_bytes_total"] == 0
    assert not list(out.glob("global/*/*"))
    assert all(c["train_loss"] > 0 for r in run["rounds"] for c in r["clients"])


def test_a_slow_device_is_late_in_modelled_time_and_left_out(
    undisturbed: Path, tmp_path: Path
) -> None:
    # The first round of the same seed models the same times, whatever the deadline.
    known = read_run(undisturbed)["rounds"][0]["clients"]
    took = sorted((c["compute_seconds"] + c["uplink_seconds"], c["id"]) for c in known)
    deadline = (took[0][0] + took[1][0]) / 2
    out = tmp_path / "run"
    done = pwff(
        "emulate", *SMALL, "--rounds", "1", "--transport", "memory", "--out", str(out),
        "--deadline-seconds", str(deadline),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (round_,) = read_run(out)["rounds"]
    first, *others = [client for _, client in took]
    assert round_["accepted"] == [first]
    assert {c["id"]: c["status"] for c in round_["clients"]} == {
        first: "aggregated",
        **dict.fromkeys(others, "late"),
    }


def test_int8_updates_are_a_quarter_of_the_bytes(undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = pwff("emulate", *SMALL, "--codec", "int8", "--transport", "memory", "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    sent = read_run(out)["summary"]["upload_bytes_total"]
    assert sent <= 0.26 * read_run(undisturbed)["summary"]["upload_bytes_total"]
    assert comparable(out)[1] != comparable(undisturbed)[1]
