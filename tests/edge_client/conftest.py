"""What the tests of the device side share: bases, examples, device records, a scripted cloud."""

from __future__ import annotations

import queue
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest

from device_profiles.channel import Link
from device_profiles.methods import ModuleShape, Objective, RewardShares, find_method
from device_profiles.modules import adapter_tensors, lora_sites, lora_tensors
from device_profiles.profile import find_profile
from device_profiles.reward_heads import initial_rewards
from edge_client.costs import stage_layout
from edge_client.data.instructions import Example
from edge_client.data.own_data import OwnData
from edge_client.data.preferences import Pair
from edge_client.data.prompt_files import Prompt
from edge_client.local_client import LocalClient, Setup
from edge_client.peft.packed_model import PackedModel
from edge_client.peft.tuned_model import TunedModel
from edge_client.reward.judging import Judging, reward_layout
from edge_client.state import StateStore
from edge_client.works import build_works
from messaging import topics
from messaging.layout import Layout, Tensors, TensorSpec, Vector
from messaging.memory import MemoryNetwork
from messaging.protocol import (
    Channel,
    DeviceRecord,
    Manifest,
    Message,
    Preference,
    Stage,
    Task,
    decode,
    encode,
)
from quantization.base_model import Base, load_base, set_threads
from quantization.frozen_gpt2 import load_frozen
from quantization.identity import BaseIdentity, identify

Kind = TypeVar("Kind")

WAIT_SECONDS = 30.0  # for another thread; a test that waits so long has failed
ADAPTER_SIZE = 4
RANK = 2

EXAMPLES = [
    Example(instruction="Name the number after three.", output="The number is four."),
    Example(instruction="Say what a bridge is for.", output="A bridge carries people."),
    Example(instruction="Name a river.", input="In the text.", output="The river."),
    Example(instruction="Write a request.", output="Name the task that is after the context."),
    Example(instruction="Name the input.", input="Below is a bridge.", output="A bridge is below."),
]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    set_threads(1)


@pytest.fixture(scope="session")
def identity(tiny_checkpoint: Path) -> BaseIdentity:
    """Identity of the tiny base of 12 blocks."""
    return identify(str(tiny_checkpoint))


@pytest.fixture
def base(identity: BaseIdentity) -> Base:
    """Load the tiny base, plain and the test's own."""
    return load_base(identity)


@pytest.fixture
def tuned(identity: BaseIdentity) -> Callable[..., TunedModel]:
    """Make tuned models, each on a base of its own."""

    def make(count: int = 36, placement: str = "qkv", size: int = ADAPTER_SIZE) -> TunedModel:
        return TunedModel(
            load_base(identity),
            adapter_size=size,
            placement=placement,
            lora_count=count,
            lora_rank=RANK,
        )

    return make


def random_tensors(
    identity: BaseIdentity, count: int = 36, placement: str = "qkv", seed: int = 0
) -> Tensors:
    """Return adapters and the first LoRA modules with no entry that is zero."""
    rng = np.random.default_rng(seed)
    shapes = [
        *adapter_tensors(identity.shape, ADAPTER_SIZE),
        *lora_tensors(lora_sites(identity.shape, placement)[:count], RANK),
    ]
    return {s.name: rng.normal(0, 0.3, s.shape).astype(np.float32) for s in shapes}


def adapter_layout(identity: BaseIdentity) -> Layout:
    """Return the layout of a run that shares its adapters."""
    return Layout(
        tuple(
            TensorSpec(name=t.name, shape=t.shape, scale_axis=t.bottleneck_axis)
            for t in adapter_tensors(identity.shape, ADAPTER_SIZE)
        )
    )


def modules(identity: BaseIdentity) -> ModuleShape:
    """Return the modules of the run ``trial``."""
    return ModuleShape(
        base=identity.shape, adapter_size=ADAPTER_SIZE, placement="qkv", lora_rank=RANK
    )


def a_setup(layout: Layout, *, chunk_bytes: int = 4096, **changes: Any) -> Setup:
    """Return what the clients of the run ``trial`` have in common."""
    return Setup(
        run="trial",
        layouts={"instruction": layout, "reward": layout},
        placement="qkv",
        adapter_size=ADAPTER_SIZE,
        lora_rank=RANK,
        chunk_bytes=chunk_bytes,
        **changes,
    )


def a_device(client: str = "pi5-01", **changes: Any) -> DeviceRecord:
    """Return a device's record."""
    fields: dict[str, Any] = {
        "id": client,
        "profile": "raspberry-pi-5-8gb",
        "lora_count": 12,
        "lora_rank": RANK,
        "lora_rank_rule": "given",
        "adapter_count": 36,
        "adapter_size": ADAPTER_SIZE,
        "placement": "qkv",
        "precision": "fp32",
        "threads": 1,
        "base_bytes": 200_000,
        "examples": len(EXAMPLES) - 1,
        "held_out_examples": 1,
        "categories": {},
        "trainable_parameters": 6000,
        "shared_parameters": 5328,
        "preference": Preference(helpfulness=0.5, harmlessness=0.5),
        "channel": Channel(
            snr_db=5.0,
            bandwidth_hz=1e6,
            transmit_watts=1.0,
            fading="rayleigh",
            coherence_seconds=0.01,
        ),
        "costs": "modelled",
    }
    return DeviceRecord(**{**fields, **changes})


def a_task(client: str = "pi5-01", **changes: Any) -> Task:
    """Return a training task of round 1 without a global state."""
    fields: dict[str, Any] = {
        "run": "trial",
        "client": client,
        "work": "train",
        "stage": "instruction",
        "round": 1,
        "state": None,
        "seed": 7,
        "local_steps": 3,
        "batch_size": 2,
        "learning_rate": 0.01,
        "max_length": 96,
    }
    return Task(**{**fields, **changes})


def some_pairs(objective: Objective, first: int, count: int) -> list[Pair]:
    """Return pairs of prompts of their own, numbered from ``first``."""
    ends = {"helpfulness": ("It is four.", "No."), "harmlessness": ("Please wait.", "Go and run.")}
    better, worse = ends[objective]
    return [
        Pair(instruction=f"Name the {objective} {i}.", chosen=f"{better} {i}", rejected=worse)
        for i in range(first, first + count)
    ]


def own_data(objectives: Sequence[Objective]) -> OwnData:
    """Return what a client of three stages holds: six pairs an objective, two of them held out."""
    pairs = {name: some_pairs(name, 0, 4) for name in objectives}
    held_out = {name: some_pairs(name, 4, 2) for name in objectives}

    def prompts(side: dict[Objective, list[Pair]]) -> list[Prompt]:
        return [Prompt(instruction=pair.instruction) for own in side.values() for pair in own]

    return OwnData(
        examples=EXAMPLES[:4],
        held_out=EXAMPLES[4:],
        pairs=pairs,
        held_out_pairs=held_out,
        prompts=prompts(pairs),
        held_out_prompts=prompts(held_out),
    )


@dataclass(frozen=True, kw_only=True)
class Academy:
    """Clients that learn in three stages, on one model and one trunk.

    Attributes:
        folder: Of the clients' folders, each named after its client.
        reward_shares: What a reward model is made of, beside the trunk.
    """

    model: PackedModel
    judging: Judging
    folder: Path
    reward_shares: RewardShares = "head"

    @property
    def shape(self) -> ModuleShape:
        """Modules of the run."""
        return replace(modules(self.model.base.identity), reward_shares=self.reward_shares)

    def setup(self, method: str = "pwff") -> Setup:
        """Return what the clients of a run of three stages have in common."""
        names: tuple[Stage, ...] = ("instruction", "reward", "alignment")
        layouts = {name: stage_layout(name, find_method(method), self.shape) for name in names}
        setup = a_setup(layouts["instruction"], method=method)
        return replace(setup, layouts=layouts, reward_shares=self.reward_shares)

    def make(
        self,
        client: str = "pi5-01",
        *,
        method: str = "pwff",
        data: OwnData | None = None,
        **device: Any,
    ) -> LocalClient:
        """Make a client; what is in its folder is its state."""
        setup, record = self.setup(method), a_device(client, preference_pairs=8, **device)
        folder = self.folder / client
        data = data or own_data(find_method(method).objectives)
        works = build_works(setup, self.model, record, data, judging=self.judging, folder=folder)
        return LocalClient(
            setup,
            works,
            base=self.model.base.identity,
            device=record,
            profile=find_profile("raspberry-pi-5-8gb"),
            link=Link(snr_db=5.0, bandwidth_hz=1e6, transmit_watts=0.5),
            folder=folder,
            clock=lambda: 0.0,
        )

    def elsewhere(self, name: str) -> Academy:
        """Return the same with empty folders."""
        return replace(self, folder=self.folder / name)

    def store(self, client: str = "pi5-01") -> StateStore:
        """Return what a client keeps."""
        return StateStore(self.folder / client)

    def adapters(self, seed: int = 0) -> Vector:
        """Return adapters that have learned something. Shape (layout size,)."""
        tensors = random_tensors(self.model.base.identity, count=0, seed=seed)
        return 0.1 * adapter_layout(self.model.base.identity).pack(tensors)

    def heads(self, *objectives: Objective) -> Vector:
        """Return reward models. Shape (layout size,)."""
        tensors = initial_rewards(objectives, self.judging.shape, seed=5)
        return reward_layout(objectives, self.judging.shape).pack(tensors)


@pytest.fixture(scope="session")
def shared_judging(identity: BaseIdentity) -> Judging:
    """Return a trunk; nothing that a client does changes it."""
    return Judging(load_frozen(identity, "fp32"))


@pytest.fixture
def academy(identity: BaseIdentity, shared_judging: Judging, tmp_path: Path) -> Academy:
    """Return a model of the test's own, and an empty folder."""
    model = PackedModel(
        shared_judging.base,
        adapter_size=ADAPTER_SIZE,
        placement="qkv",
        lora_count=36,
        lora_rank=RANK,
    )
    assert model.base.identity == identity
    return Academy(model=model, judging=shared_judging, folder=tmp_path)


class Cloud:
    """A scripted aggregator: hears everything that devices say, and says what the test tells it."""

    def __init__(self, network: MemoryNetwork, run: str = "trial") -> None:
        self._run = run
        self._heard: queue.Queue[bytes] = queue.Queue()
        self._transport = network.open(
            client_id="cloud",
            filters=topics.everything_up(run),
            deliver=lambda _topic, payload: self._heard.put(payload),
            connected=lambda: None,
        )
        self._transport.start()

    def hear(self, kind: type[Kind]) -> Kind:
        """Return the next message, which must be of this kind."""
        message = decode(self._heard.get(timeout=WAIT_SECONDS))
        assert isinstance(message, kind), message
        return message

    def hear_chunk(self) -> bytes:
        """Return the next payload, which must be a chunk."""
        payload = self._heard.get(timeout=WAIT_SECONDS)
        assert payload[:1] != b"{"
        return payload

    def say(self, client: str, message: Message) -> None:
        """Send a message to a device."""
        self.send(client, encode(message))

    def send(self, client: str, payload: bytes) -> None:
        """Send bytes to a device."""
        self._transport.publish(topics.down(self._run, client), payload)

    def post(self, manifest: Manifest) -> None:
        """Publish the retained manifest."""
        self._transport.publish(topics.manifest(self._run), encode(manifest), retain=True)
