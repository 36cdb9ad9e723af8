"""A training that is killed, stopped or finds no room goes on, to the bits of one that was not."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from device_profiles.channel import Link
from device_profiles.modules import initial_adapters
from device_profiles.profile import find_profile
from edge_client import disk
from edge_client.data.own_data import OwnData
from edge_client.disk import DiskError
from edge_client.local_client import LocalClient, Result
from edge_client.peft.packed_model import PackedModel
from edge_client.progress import Interruption, Progress, Standing, StoppedError
from edge_client.stage_work import GlobalStates
from edge_client.state import TRAINING_FILE
from edge_client.works import build_works
from messaging.protocol import Task
from quantization.base_model import set_threads
from quantization.frozen_gpt2 import load_frozen
from quantization.identity import BaseIdentity, identify
from tests.edge_client.conftest import (
    ADAPTER_SIZE,
    EXAMPLES,
    RANK,
    a_device,
    a_setup,
    a_task,
    adapter_layout,
)

STEPS, EVERY = 8, 2


class Watched(Progress):
    """A checkpoint that calls a test after each step, before it is taken note of."""

    def __init__(self, folder: Path, after: Callable[[int, Interruption], None]) -> None:
        super().__init__(folder, Interruption(), every_steps=EVERY)
        self.seen: list[int] = []
        self._after = after

    def stepped(self, fingerprint: str, steps: int, standing: Callable[[], Standing]) -> None:
        """Tell the test, then take note."""
        self.seen.append(steps)
        self._after(steps, self.interruption)
        super().stepped(fingerprint, steps, standing)


def undisturbed(_steps: int, _interruption: Interruption) -> None:
    """Let the training go on."""


def die(steps: int, _interruption: Interruption) -> None:
    """Leave nothing a chance to clean up."""
    if steps == 5:
        os.kill(os.getpid(), signal.SIGKILL)


def stop(steps: int, interruption: Interruption) -> None:
    """Ask for an end, as SIGTERM does."""
    if steps == 3:
        interruption.stop()


def a_client(identity: BaseIdentity, folder: Path, progress: Progress) -> LocalClient:
    """Return a client whose state is in ``folder``."""
    model = PackedModel(
        load_frozen(identity),
        adapter_size=ADAPTER_SIZE,
        placement="qkv",
        lora_count=12,
        lora_rank=RANK,
    )
    setup, device = a_setup(adapter_layout(identity)), a_device()
    data = OwnData(examples=EXAMPLES[:4], held_out=EXAMPLES[4:])
    works = build_works(setup, model, device, data, judging=None, folder=folder, progress=progress)
    return LocalClient(
        setup,
        works,
        base=identity,
        device=device,
        profile=find_profile("raspberry-pi-5-8gb"),
        link=Link(snr_db=5.0, bandwidth_hz=1e6, transmit_watts=0.5),
        folder=folder,
        clock=lambda: 0.0,
    )


def the_task(**changes: Any) -> Task:
    """Return the training of round 2; it has moments and a residual to carry on."""
    fields = {"round": 2, "local_steps": STEPS, "codec": "int8", "outcome": "aggregated"}
    return a_task(**{**fields, **changes})


def train(
    identity: BaseIdentity,
    folder: Path,
    after: Callable[[int, Interruption], None] = undisturbed,
    task: Task | None = None,
    start: float = 0.0,
) -> tuple[Result, list[int]]:
    """Train round 2, after round 1 if it is not there; return what came and which steps ran."""
    layout = adapter_layout(identity)
    shared = layout.pack(initial_adapters(identity.shape, ADAPTER_SIZE, 7)) + np.float32(start)
    states = GlobalStates(shared=shared)
    progress = Watched(folder, after)
    client = a_client(identity, folder, progress)
    if not (folder / "state-000001.safetensors").exists():
        first = Progress(folder, Interruption())
        a_client(identity, folder, first).perform(a_task(codec="int8"), states)
    return client.perform(task or the_task(), states), progress.seen


def killed(checkpoint: str, folder: str) -> None:
    """Train in a process of its own, and be killed in the middle."""
    set_threads(1)
    train(identify(checkpoint), Path(folder), die)


def files(folder: Path) -> dict[str, bytes]:
    """Return what a client keeps."""
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.fixture(scope="module")
def reference(
    identity: BaseIdentity, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Result, dict[str, bytes]]:
    """Return what an undisturbed round gives, and what is on the disk then."""
    folder = tmp_path_factory.mktemp("undisturbed")
    result, seen = train(identity, folder)
    assert seen == list(range(1, STEPS))  # after the last step the state itself is written
    return result, files(folder)


def test_a_training_that_is_killed_goes_on_from_its_checkpoint_to_the_same_bits(
    identity: BaseIdentity,
    tiny_checkpoint: Path,
    tmp_path: Path,
    reference: tuple[Result, dict[str, bytes]],
) -> None:
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=killed, args=(str(tiny_checkpoint), str(tmp_path)))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert (tmp_path / TRAINING_FILE).exists()
    assert not (tmp_path / "state-000002.safetensors").exists()
    result, seen = train(identity, tmp_path)
    assert seen == [5, 6, 7]  # killed after step 5, written down after step 4
    assert result == reference[0]
    assert files(tmp_path) == reference[1]


def test_a_training_that_is_stopped_loses_no_step_and_no_bit(
    identity: BaseIdentity, tmp_path: Path, reference: tuple[Result, dict[str, bytes]]
) -> None:
    with pytest.raises(StoppedError):
        train(identity, tmp_path, stop)
    result, seen = train(identity, tmp_path)
    assert seen == [4, 5, 6, 7]
    assert result == reference[0]
    assert files(tmp_path) == reference[1]


@pytest.mark.parametrize(
    ("changes", "start"),
    [({"learning_rate": 0.02}, 0.0), ({"seed": 8}, 0.0), ({"max_length": 40}, 0.0), ({}, 0.01)],
)
def test_a_checkpoint_of_another_training_is_not_gone_on_from(
    identity: BaseIdentity, tmp_path: Path, changes: dict[str, Any], start: float
) -> None:
    with pytest.raises(StoppedError):
        train(identity, tmp_path / "stopped", stop)
    task = the_task(**changes)
    results = {}
    for name in ("stopped", "fresh"):
        results[name], seen = train(identity, tmp_path / name, task=task, start=start)
        assert seen == list(range(1, STEPS))
    if not start and "seed" not in changes:  # round 1 went the same way
        assert results["stopped"] == results["fresh"]


@pytest.mark.parametrize("damage", [b"", b"\x00" * 100, None])
def test_a_damaged_checkpoint_costs_the_round_and_no_bit(
    identity: BaseIdentity,
    tmp_path: Path,
    reference: tuple[Result, dict[str, bytes]],
    caplog: pytest.LogCaptureFixture,
    damage: bytes | None,
) -> None:
    with pytest.raises(StoppedError):
        train(identity, tmp_path, stop)
    path = tmp_path / TRAINING_FILE
    path.write_bytes(path.read_bytes()[:-4] if damage is None else damage)
    with caplog.at_level(logging.WARNING):
        result, seen = train(identity, tmp_path)
    assert "is damaged" in caplog.text
    assert (seen[0], result) == (1, reference[0])
    assert files(tmp_path) == reference[1]


def test_a_full_disk_ends_a_training_with_a_sentence_and_it_goes_on_when_there_is_room(
    identity: BaseIdentity,
    tmp_path: Path,
    reference: tuple[Result, dict[str, bytes]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:

        def full(steps: int, _interruption: Interruption) -> None:
            if steps == 6:
                patch.setattr(disk.os, "fsync", refuse)

        def refuse(_handle: int) -> None:
            raise OSError(28, "No space left on device")

        with pytest.raises(DiskError, match=r"cannot write .*: No space left .* make room") as told:
            train(identity, tmp_path, full)
    assert told.value.exit_code == 1
    result, seen = train(identity, tmp_path)
    assert (seen, result) == ([5, 6, 7], reference[0])
    assert files(tmp_path) == reference[1]
