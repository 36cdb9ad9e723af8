"""Worker processes: how they begin, and what becomes of those that end."""

from __future__ import annotations

import os
import queue
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from cloud_aggregator.emulation import nursery as nursery_module
from cloud_aggregator.emulation.fleet import WorkerSpec
from cloud_aggregator.emulation.nursery import Nursery, dismiss, prepare, take
from cloud_aggregator.emulation.pool import WorkerPool
from cloud_aggregator.errors import RunFailedError
from device_profiles.errors import InputError

LIMIT = 120.0

#: A nursery where nothing forks, as on a Mac.
SPAWNING = """
import cloud_aggregator.emulation.nursery_process as it
it._FORKS = False
it._Process().run()
"""


def spec_of(folder: Path, model: str) -> WorkerSpec:
    """Return a worker without clients."""
    return WorkerSpec(
        run="trial",
        run_folder=str(folder),
        features="nowhere",
        model=model,
        binding="0" * 64,
        data="kit",
        data_sha256="0" * 64,
        stages=["instruction"],
        seed=0,
        preferences={},
        prompts=None,
        hashes={},
        trunk_precision="int8",
        placement="qkv",
        adapter_size=10,
        lora_rank=16,
        threads=1,
        chunk_bytes=122_880,
        method="pwff",
        priced=None,
        clients=[],
    )


@pytest.fixture(params=["fork", "spawn"])
def nursery(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Nursery]:
    """Yield what starts workers, in either way."""
    if request.param == "fork" and sys.platform != "linux":
        pytest.skip("workers are forked on Linux")
    if request.param == "spawn":
        monkeypatch.setattr(Nursery, "command", [sys.executable, "-c", SPAWNING])
    with Nursery() as nursery:
        yield nursery


def test_a_workers_bad_input_ends_the_run_with_its_sentence_and_is_not_tried_again(
    nursery: Nursery, tmp_path: Path
) -> None:
    spec = spec_of(tmp_path, str(tmp_path / "nowhere"))
    failures: queue.Queue[Exception] = queue.Queue()
    broker = "mqtt://someone:secret@127.0.0.1:1"
    pool = WorkerPool(nursery, [spec], tmp_path, broker=broker, failed=failures.put)
    try:
        failure = failures.get(timeout=LIMIT)
    finally:
        pool.close()
    assert isinstance(failure, InputError)
    assert str(tmp_path / "nowhere") in str(failure)
    assert "secret" not in (tmp_path / "0.json").read_text() + (tmp_path / "0.log").read_text()
    assert failures.empty()


def test_a_worker_that_cannot_even_read_its_orders_is_tried_again_and_then_given_up(
    nursery: Nursery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(WorkerSpec, "model_dump_json", lambda _self: "no JSON")
    failures: queue.Queue[Exception] = queue.Queue()
    pool = WorkerPool(
        nursery, [spec_of(tmp_path, "mini")], tmp_path, broker="", failed=failures.put
    )
    try:
        failure = failures.get(timeout=LIMIT)
    finally:
        pool.close()
    assert isinstance(failure, RunFailedError)
    assert "a worker ended with 1: " in str(failure)
    assert (tmp_path / "0.log").read_text().count("Traceback") >= 4  # the first and three more
    assert failures.empty()


def test_a_nursery_that_is_killed_is_told_once_for_each_worker(tmp_path: Path) -> None:
    codes: queue.Queue[int | None] = queue.Queue()
    with Nursery() as nursery:
        os.kill(nursery.pids[0], signal.SIGKILL)
        for number in range(2):
            nursery.start(number, tmp_path / "x", tmp_path / "y", {}, codes.put)
            assert codes.get(timeout=LIMIT) is None


def test_a_nursery_that_cannot_begin_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Nursery, "command", [sys.executable, "-c", "raise SystemExit('no torch')"])
    failures: queue.Queue[Exception] = queue.Queue()
    with Nursery() as nursery:
        specs = [spec_of(tmp_path, "mini")]
        pool = WorkerPool(nursery, specs, tmp_path, broker="", failed=failures.put)
        failure = failures.get(timeout=LIMIT)
        pool.close()
    assert str(failure) == "the process that starts workers: no torch"


def test_a_nursery_that_was_started_early_is_the_one_that_is_taken() -> None:
    prepare(["--clients", "4"])
    prepare(["--clients", "4"])  # not a second one
    (early,) = nursery_module._early
    with take() as taken:
        assert taken is early
        with take() as other:
            assert other is not early
    prepare(["--clients", "4"])
    (pid,) = nursery_module._early[0].pids
    dismiss()
    assert not psutil.pid_exists(pid)
    dismiss()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["-h"],
        ["--list"],
        ["--transport", "memory"],
        ["--engine=ray"],
        ["--engine", "ray"],
    ],
)
def test_a_command_that_wants_no_workers_starts_none(arguments: list[str]) -> None:
    prepare(arguments)
    assert not nursery_module._early
