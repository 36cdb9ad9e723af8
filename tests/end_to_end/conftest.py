"""What the end-to-end tests share: the command as a user calls it, and brokers on real sockets."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from messaging.broker import embedded_broker, embedded_kind

Run = dict[str, Any]

#: Enough to go through every part of a run, and no more.
SMALL = ["--clients", "3", "--rounds", "2", "--local-steps", "2", "--batch-size", "2",
         "--max-length", "96"]  # fmt: skip

_MACHINE = ("engine", "workers", "transport")


def is_nursery(process: psutil.Process) -> bool:
    """Return whether a process starts a run's workers."""
    return "cloud_aggregator.emulation.nursery_process" in process.cmdline()


def workers_of(run: psutil.Process) -> list[psutil.Process]:
    """Return the workers of a run."""
    return [worker for child in run.children() if is_nursery(child) for worker in child.children()]


def environment() -> dict[str, str]:
    """Return an environment in which no model hub is asked."""
    return {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


def start(*arguments: str, cwd: Path | None = None) -> subprocess.Popen[str]:
    """Start ``pwff`` as a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "pwff", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=cwd,
        env=environment(),
    )


def pwff(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run ``pwff`` to its end."""
    return subprocess.run(
        [sys.executable, "-m", "pwff", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment(),
        timeout=600,
        check=False,
    )


def read_run(folder: Path) -> Run:
    """Return a run's record."""
    record: Run = json.loads((folder / "run.json").read_text())
    return record


def comparable(folder: Path) -> tuple[Run, dict[str, str]]:
    """Return what two runs with the same seed must share: the record and the global states."""
    record = read_run(folder)
    for key in _MACHINE:
        record.pop(key)
    for round_ in record["rounds"]:
        round_.pop("observed")
    hashes = {
        path.parent.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.glob("global/*/shared.safetensors"))
    }
    return record, hashes


def await_line(process: subprocess.Popen[str], found: Callable[[str], bool]) -> str:
    """Return the first line of a process's output for which ``found`` holds."""
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        seen.append(line)
        if found(line):
            return line
    raise AssertionError("the process ended without the line:\n" + "".join(seen))


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a small run without a socket, against which others are held."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    done = pwff("emulate", *SMALL, "--transport", "memory", "--out", str(folder))
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture
def broker() -> Iterator[str]:
    """Yield the address of a broker that runs for one test: mosquitto where it is installed."""
    if embedded_kind() is None:
        pytest.skip("no MQTT broker is installed (mosquitto or iotcore)")
    with embedded_broker() as url:
        yield url
