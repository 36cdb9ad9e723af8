"""What the tests of exporting share: a run's folder written by hand, on the tiny base."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
from safetensors.numpy import save_file

from device_profiles.modules import (
    adapter_tensors,
    first_lora_sites,
    is_lora,
    lora_sites,
    lora_tensors,
)
from edge_client.state import ClientState, StateStore
from messaging.layout import Tensors
from quantization.base_model import set_threads
from quantization.identity import BaseIdentity, identify

ADAPTER_SIZE, RANK, LORA_COUNT = 4, 2, 12
CLIENT, ROUND = "pi5-01", 3

#: Method to what it trains and what of that it shares.
METHODS: dict[str, tuple[set[str], set[str]]] = {
    "pwff": ({"adapters", "lora"}, {"adapters"}),
    "vanilla-fl": ({"adapters", "lora"}, {"adapters", "lora"}),
    "fedlora": ({"lora"}, {"lora"}),
    "fedada": ({"adapters"}, {"adapters"}),
    "local-only": ({"adapters", "lora"}, set()),
}

MakeRun = Callable[..., Path]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    set_threads(1)


@pytest.fixture(scope="session")
def identity(tiny_checkpoint: Path) -> BaseIdentity:
    """Identity of the tiny base of 12 blocks."""
    return identify(str(tiny_checkpoint))


def all_tensors(identity: BaseIdentity, placement: str = "qkv", seed: int = 0) -> Tensors:
    """Return every adapter and every LoRA module that there can be, with no entry that is zero."""
    rng = np.random.default_rng(seed)
    shapes = [
        *adapter_tensors(identity.shape, ADAPTER_SIZE),
        *lora_tensors(lora_sites(identity.shape, placement), RANK),
    ]
    return {s.name: rng.normal(0, 0.3, s.shape).astype(np.float32) for s in shapes}


def held(identity: BaseIdentity, tensors: Tensors, placement: str, trained: set[str]) -> Tensors:
    """Return what a client of ``LORA_COUNT`` LoRA modules trains of all tensors."""
    shapes = adapter_tensors(identity.shape, ADAPTER_SIZE) if "adapters" in trained else []
    if "lora" in trained:
        shapes += lora_tensors(first_lora_sites(identity.shape, placement, LORA_COUNT), RANK)
    return {s.name: tensors[s.name] for s in shapes}


def write_run(
    folder: Path, identity: BaseIdentity, method: str, placement: str, **changes: Any
) -> Path:
    """Write the folder of a run with one client that has trained."""
    trained, shared = METHODS[method]
    everything = all_tensors(identity, placement)
    own = held(identity, everything, placement, trained)
    travels = {
        n: t for n, t in everything.items() if ("lora" if is_lora(n) else "adapters") in shared
    }
    client = {
        "id": CLIENT,
        "lora_count": LORA_COUNT if "lora" in trained else 0,
        "lora_rank": RANK if "lora" in trained else 0,
        "adapter_count": 36 if "adapters" in trained else 0,
        "adapter_size": ADAPTER_SIZE if "adapters" in trained else 0,
        "placement": placement,
        "precision": "fp32",
        "shared_parameters": sum(t.size for t in travels.values()),
    }
    record = {
        "run": "trial",
        "method": method,
        "model": {"sha256": identity.sha256, "tokenizer_sha256": identity.tokenizer_sha256},
        "clients": [client, {**client, "id": "laptop-02"}],
        "rounds": [{"round": number, "stage": "instruction"} for number in range(1, ROUND + 1)],
        **changes,
    }
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps(record))
    settings = {"model": str(identity.folder), "method": method}
    (folder / "config.toml").write_text(tomli_w.dumps({"experiment": settings}))
    # Only what is of the finished round is right; the next was begun and not recorded.
    for number in (ROUND - 1, ROUND, ROUND + 1) if travels else ():
        path = folder / "global" / str(number) / "shared.safetensors"
        path.parent.mkdir(parents=True)
        factor = np.float32(1 if number == ROUND else 1 + number)
        save_file({n: factor * t for n, t in travels.items()}, path)
    store = StateStore(folder / "clients" / CLIENT)
    for number in (ROUND, ROUND + 1):
        factor = np.float32(1 + number - ROUND)
        moments = {n: np.zeros_like(t) for n, t in own.items()}
        store.save(
            ClientState(
                round=number,
                personal={n: factor * t for n, t in own.items() if n not in travels},
                first_moments=moments,
                second_moments=moments,
            )
        )
    return folder


@pytest.fixture
def make_run(identity: BaseIdentity, tmp_path: Path) -> MakeRun:
    """Write the folder of a run with one client that has trained."""

    def make(method: str = "pwff", placement: str = "qkv", **changes: Any) -> Path:
        return write_run(tmp_path / "run", identity, method, placement, **changes)

    return make


@pytest.fixture
def trained(identity: BaseIdentity) -> Callable[..., Tensors]:
    """Return what the client of a run has trained."""

    def tensors(method: str = "pwff", placement: str = "qkv") -> Tensors:
        return held(identity, all_tensors(identity, placement), placement, METHODS[method][0])

    return tensors
