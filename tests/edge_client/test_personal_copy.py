"""A device's own copy near the global state: what changes with it, and what must not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from device_profiles.channel import Link
from device_profiles.modules import initial_adapters
from device_profiles.profile import find_profile
from edge_client.data.own_data import OwnData
from edge_client.data.prompts import encode_example
from edge_client.local_client import LocalClient, Result
from edge_client.peft.packed_model import PackedModel
from edge_client.progress import Interruption, Progress, Standing, StoppedError
from edge_client.stage_work import GlobalStates
from edge_client.state import StateStore, personal_copy
from edge_client.trainer import evaluate
from edge_client.works import build_works
from messaging.layout import Tensors
from messaging.protocol import Task
from quantization.frozen_gpt2 import FrozenBase, load_frozen
from quantization.identity import BaseIdentity
from tests.edge_client.conftest import (
    ADAPTER_SIZE,
    EXAMPLES,
    RANK,
    a_device,
    a_setup,
    a_task,
    adapter_layout,
)

ALL = {"proximal": 0.5, "lora_dropout": 0.2, "stopping_patience": 2, "validation_every": 1}


class Stops(Progress):
    """A checkpoint that asks for an end after one step of one training, as SIGTERM does."""

    def __init__(self, folder: Path, at: tuple[str, int] | None) -> None:
        super().__init__(folder, Interruption())
        self.taken: list[tuple[str, int]] = []
        self._at, self._name = at, ""

    def beside(self, name: str) -> Progress:
        """Return one that stops likewise."""
        other = Stops(self._folder, self._at)
        other.interruption = self.interruption
        other._path, other._name = super().beside(name)._path, name
        other.taken = self.taken
        return other

    def stepped(self, fingerprint: str, steps: int, standing: Callable[[], Standing]) -> None:
        """Take note, after asking for an end if it is time."""
        self.taken.append((self._name, steps))
        if (self._name, steps) == self._at:
            self.interruption.stop()
        super().stepped(fingerprint, steps, standing)


class Desk:
    """One client whose state lies in a folder."""

    def __init__(self, identity: BaseIdentity, base: FrozenBase, folder: Path) -> None:
        self._identity, self._base, self._folder = identity, base, folder
        self.layout = adapter_layout(identity)
        self.start = self.layout.pack(initial_adapters(identity.shape, ADAPTER_SIZE, 7))
        self.model = PackedModel(
            base, adapter_size=ADAPTER_SIZE, placement="qkv", lora_count=12, lora_rank=RANK
        )

    def client(self, name: str, progress: Progress | None = None) -> LocalClient:
        """Return the client as it is when it is started."""
        setup, device = a_setup(self.layout), a_device()
        folder = self._folder / name
        data = OwnData(examples=EXAMPLES[:4], held_out=EXAMPLES[4:], others=EXAMPLES[:2])
        works = build_works(
            setup, self.model, device, data, judging=None, folder=folder, progress=progress
        )
        return LocalClient(
            setup,
            works,
            base=self._identity,
            device=device,
            profile=find_profile("raspberry-pi-5-8gb"),
            link=Link(snr_db=5.0, bandwidth_hz=1e6, transmit_watts=0.5),
            folder=folder,
            clock=lambda: 0.0,
        )

    def do(self, name: str, stop: tuple[str, int] | None = None, **task: Any) -> Result:
        """Do a task on the first global state."""
        progress = Stops(self._folder / name, stop)
        return self.client(name, progress).perform(a_task(**task), GlobalStates(shared=self.start))

    def store(self, name: str) -> StateStore:
        """Return what a client keeps."""
        return StateStore(self._folder / name)

    def copy(self, name: str, round_: int = 1) -> Tensors:
        """Return its personal model."""
        return personal_copy(self.store(name).load(round_))

    def files(self, name: str) -> dict[str, bytes]:
        """Return what lies in its folder."""
        return {p.name: p.read_bytes() for p in (self._folder / name).iterdir()}


@pytest.fixture(scope="module")
def base(identity: BaseIdentity) -> FrozenBase:
    return load_frozen(identity)


@pytest.fixture
def desk(identity: BaseIdentity, base: FrozenBase, tmp_path: Path) -> Desk:
    return Desk(identity, base, tmp_path)


def shared_distance(desk: Desk, name: str, round_: int = 1) -> float:
    """Return how far the copy of what is shared lies from the global state."""
    copy = desk.copy(name, round_)
    mine = desk.layout.pack({n: t for n, t in copy.items() if n in desk.layout.names})
    return float(np.linalg.norm(mine - desk.start))


def test_the_upload_and_the_devices_part_of_the_global_model_are_those_without_a_copy(
    desk: Desk,
) -> None:
    plain, held = desk.do("plain"), desk.do("held", proximal=0.5)
    assert held.blob == plain.blob
    assert held.train_loss == plain.train_loss
    one, other = desk.store("plain").load(1), desk.store("held").load(1)
    for group in ("personal", "first_moments", "second_moments"):
        mine, its = getattr(one, group), getattr(other, group)
        assert set(mine) == set(its)
        assert all(np.array_equal(mine[n], its[n]) for n in mine)


def test_training_twice_costs_twice_the_compute_and_not_a_byte_more(desk: Desk) -> None:
    plain, held = desk.do("plain"), desk.do("held", proximal=0.5)
    # the same three steps of two examples each, drawn anew: the tokens differ, the sum is of both
    ratio = held.costs.compute_seconds / plain.costs.compute_seconds
    assert 1.7 < ratio < 2.3
    assert held.costs.uplink_bits == plain.costs.uplink_bits


def test_a_stronger_pull_keeps_the_copy_nearer_to_the_global_state(desk: Desk) -> None:
    for name, pull in (("weak", 1e-3), ("strong", 1e3)):
        desk.do(name, proximal=pull, local_steps=6)
    assert shared_distance(desk, "strong") < 0.5 * shared_distance(desk, "weak")


def test_the_copy_goes_on_from_itself_and_is_pulled_to_the_newest_state(desk: Desk) -> None:
    desk.do("one", proximal=1e-3)
    desk.do("one", proximal=1e-3, round=2)
    desk.do("other", proximal=1e-3, round=2)  # begins with round 2
    first, second = desk.copy("one", 2), desk.copy("other", 2)
    assert any(not np.array_equal(first[n], second[n]) for n in first)
    numbers = desk.store("one").load(2).numbers
    assert numbers["ditto_steps"] == 6  # three a round


def test_it_is_the_copy_that_is_measured(desk: Desk) -> None:
    desk.do("one", proximal=0.5, learning_rate=0.05)
    measured = desk.do("one", work="evaluate", proximal=0.5)
    desk.model.activate(12)
    desk.model.put(desk.copy("one"))
    tokenizer: Any = desk.model.base.tokenizer
    own = evaluate(desk.model, [encode_example(e, tokenizer, 96) for e in EXAMPLES[4:]])
    others = evaluate(desk.model, [encode_example(e, tokenizer, 96) for e in EXAMPLES[:2]])
    assert (measured.eval_loss, measured.eval_accuracy) == (own.loss, own.accuracy)
    assert (measured.others_loss, measured.others_accuracy) == (others.loss, others.accuracy)
    assert desk.do("plain", work="evaluate").eval_loss != measured.eval_loss


def test_how_many_steps_were_kept_is_told_of_the_round_that_was_trained(desk: Desk) -> None:
    desk.do("one", stopping_patience=1, validation_every=1, local_steps=3)
    told = desk.do("one", work="evaluate", stopping_patience=1).kept_steps
    assert told == desk.store("one").load(1).steps
    assert desk.do("one", work="evaluate", round=2, stopping_patience=1).kept_steps is None
    assert desk.do("plain", work="evaluate").kept_steps is None


@pytest.mark.parametrize("at", [("", 2), ("personal", 2)])
def test_a_round_that_is_stopped_in_either_training_goes_on_to_the_same_bits(
    desk: Desk, at: tuple[str, int]
) -> None:
    task = {**ALL, "local_steps": 5, "learning_rate": 0.02}
    whole = desk.do("whole", **task)
    with pytest.raises(StoppedError):
        desk.do("stopped", at, **task)
    progress = Stops(desk.store("stopped").folder, None)
    local = desk.client("stopped", progress)
    again = local.perform(_as_task(task), GlobalStates(shared=desk.start))
    assert again == whole
    assert desk.files("stopped") == desk.files("whole")
    done_before = {("", n) for n in range(1, 5)} if at[0] else {("", 1), ("", 2)}
    assert not done_before & set(progress.taken)  # no step is taken twice


def _as_task(task: dict[str, Any]) -> Task:
    return a_task(**task)
