"""What is counted without memory is what a step of transformers and peft takes."""

from __future__ import annotations

import ctypes
import json
import logging
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from cloud_aggregator.emulation import room as fleet_room
from cloud_aggregator.emulation.emulate import emulate
from cloud_aggregator.experiment import load_experiment
from device_profiles.step_memory import EVALUATION_EXAMPLES
from edge_client import room as device_room
from edge_client.data.prompts import Encoded
from edge_client.passes import passes_of, score
from edge_client.peft.build import build_model
from edge_client.peft.memory_count import MemoryCount
from edge_client.plain_memory import CountError, plain_memory, plain_memory_apart
from edge_client.preflight import FreeMemory, NotEnoughMemoryError
from quantization.errors import BaseModelError
from quantization.identity import identify
from tests.edge_client.test_families import OTHERS, write_model

SIZES = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4, "vocab_size": 2000}
MODULES: dict[str, Any] = {
    "adapter_size": 6,
    "placement": "wide",
    "lora_count": 12,
    "lora_rank": 4,
}


def batch(examples: int, tokens: int, vocabulary: int) -> list[Encoded]:
    rows = np.random.default_rng(0).integers(0, vocabulary, (examples, tokens))
    return [Encoded(tokens=row, response_start=1) for row in rows]


@pytest.mark.parametrize("family", OTHERS)
@pytest.mark.parametrize("vocabulary", [500, 20_000])  # of blocks, and of logits, is most
def test_a_step_without_values_takes_what_a_step_takes(
    family: str, vocabulary: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # in inference mode torch does not tell of the operations that a loss is made of
    monkeypatch.setattr(torch, "inference_mode", torch.no_grad)
    folder = write_model(tmp_path, family, **{**SIZES, "vocab_size": vocabulary})
    identity = identify(str(folder))
    model = build_model(identity, "fp32", **MODULES)
    passes = passes_of(model, None, checkpoint=False)
    passes.loss_gradient(batch(2, 8, vocabulary), None)
    with MemoryCount() as trained:
        passes.loss_gradient(batch(4, 100, vocabulary), None)
    with MemoryCount() as measured:
        score(model, batch(EVALUATION_EXAMPLES, 100, vocabulary))
    most = max(trained.peak_bytes, measured.peak_bytes)
    said = plain_memory(identity, **MODULES, batch_size=4, max_length=100)
    assert said.working == pytest.approx(most, rel=0.02)
    assert said.base == sum(4 * p.numel() for p in model.model.parameters()) - said.before // 3


def test_a_process_of_its_own_counts_the_same(tmp_path: Path) -> None:
    identity = identify(str(write_model(tmp_path, "llama")))
    settings = {**MODULES, "lora_count": 5, "batch_size": 2, "max_length": 50}
    assert plain_memory_apart(identity, **settings) == plain_memory(identity, **settings)
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "hidden_act": "none such"}))
    with pytest.raises(BaseModelError, match=r"cannot be loaded: .*none such"):
        plain_memory(identity, **settings)
    with pytest.raises(CountError, match="none such"):
        plain_memory_apart(identity, **settings)


_PROCESS = """
import json, sys
from pathlib import Path
import torch
import edge_client.service
from edge_client.peft.build import build_model
from edge_client.state import ClientState
from edge_client.trainer import evaluate, train
from quantization.identity import identify
from tests.edge_client.test_plain_memory import MODULES, batch

torch.set_num_threads(1)
identity = identify(sys.argv[1])
model = build_model(identity, "fp32", **MODULES)
examples = batch(16, 256, identity.vocabulary)
done = train(model, ClientState(round=0, personal={}), examples, steps=3, batch_size=4,
             learning_rate=1e-6, seed=0, words=("a", 1))
evaluate(model, examples)
lines = Path("/proc/self/status").read_text().splitlines()
print(1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")))
"""


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "mallopt") or not Path("/proc/self/status").exists(),
    reason="needs Linux and glibc: the high-water mark of a process, and its heap",
)
def test_a_process_takes_the_memory_that_is_predicted(tmp_path: Path) -> None:
    sizes = {
        "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 6, "vocab_size": 12_000,
        "max_position_embeddings": 256,
    }  # fmt: skip
    folder = write_model(tmp_path, "llama", **sizes)
    done = subprocess.run(
        [sys.executable, "-c", _PROCESS, str(folder)], check=True, capture_output=True, text=True
    )
    said = plain_memory(identify(str(folder)), **MODULES, batch_size=4, max_length=256)
    assert said.total == pytest.approx(int(done.stdout), rel=0.15)


def a_device(folder: Path) -> tuple[Any, ...]:
    """Return what a device's room is asked with: configuration, base, and what it is."""
    modules = {k: v for k, v in MODULES.items() if k != "placement"}
    client = SimpleNamespace(placement=MODULES["placement"])
    return client, identify(str(folder)), SimpleNamespace(**modules), None


@pytest.mark.parametrize("more", [0, -1])
def test_a_device_without_room_is_refused_and_one_with_just_enough_is_not(
    more: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = a_device(write_model(tmp_path, "llama", **SIZES))
    needed = plain_memory(asked[1], **MODULES, batch_size=4, max_length=256).total
    free = FreeMemory(bytes=needed + more, source="a test")
    monkeypatch.setattr(device_room, "free_memory", lambda: free)
    if more == 0:
        device_room.check_room(*asked)
        return
    with pytest.raises(NotEnoughMemoryError, match=r"4 examples of 256 tokens .* a smaller base"):
        device_room.check_room(*asked)


def test_a_step_that_depends_on_values_is_told_and_refuses_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stretched = {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}
    asked = a_device(write_model(tmp_path, "llama", **SIZES, **stretched))
    with pytest.raises(CountError, match="DataDependent"):
        plain_memory(asked[1], **MODULES, batch_size=4, max_length=256)
    with caplog.at_level(logging.WARNING):
        device_room.check_room(*asked)
    assert "is not predicted (DataDependent" in caplog.text


@pytest.mark.parametrize("transport", ["memory", "mqtt"])
def test_a_run_that_would_not_fit_is_refused_before_anything_is_written(
    transport: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = FreeMemory(bytes=100_000_000, source="a test")
    monkeypatch.setattr(fleet_room, "free_memory", lambda: free)
    given = {"model": str(write_model(tmp_path, "qwen2")), "transport": transport, "clients": 2}
    with pytest.raises(NotEnoughMemoryError, match=r"and 0.10 GB are free .*a smaller --model"):
        emulate(load_experiment(None, given), tmp_path / "run")
    assert not (tmp_path / "run").exists()
