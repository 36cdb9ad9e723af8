"""This project's engine, and a plain loop; each says when its rounds ended."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from fleets.job import (
    ADAPTER_SIZE,
    HELD_OUT_SHARE,
    LEARNING_RATE,
    LORA_COUNT,
    MAX_LENGTH,
    PLACEMENT,
    Job,
)
from messaging.layout import Tensors


def run_loop(kind: str, job: Job) -> tuple[list[float], Tensors, float]:
    """One process, one model, one client after another."""
    import torch

    from fleets.work import STEPS, Turn, prepared

    torch.set_num_threads(2)
    work = prepared(job)
    make, steps, measure = STEPS[kind]
    model, adapters = make(work), work.adapters()
    owns = [work.own() for _ in range(job.clients)]
    examples = [len(work.examples(client)) for client in range(job.clients)]
    times: list[float] = []
    first: Tensors = {}
    loss = 0.0
    for number in range(1, job.rounds + 1):
        totals = {n: np.zeros(t.shape) for n, t in adapters.items()}
        for client in range(job.clients):
            after = steps(work, model, Turn(client, number, adapters, owns[client]))
            for name, tensor in after.items():
                totals[name] += examples[client] / sum(examples) * tensor
        adapters = {n: t.astype(np.float32) for n, t in totals.items()}
        losses = [
            measure(work, model, Turn(client, number, adapters, owns[client]))
            for client in range(job.clients)
        ]
        if not first:
            first, loss = adapters, float(np.mean(losses))
        times.append(time.time())
    return times, first, loss


def run_emulation(job: Job) -> tuple[list[float], Tensors, float]:
    """This project over MQTT, as ``pwff emulate`` runs it; it measures at the beginning too."""
    from safetensors.numpy import load_file

    from cloud_aggregator.emulation.emulate import emulate
    from cloud_aggregator.experiment import Experiment

    times: list[float] = []

    def notify(event: str, **_fields: Any) -> None:
        if event == "round":
            times.append(time.time())

    experiment = Experiment(
        model=job.model,
        data=job.data,
        clients=job.clients,
        rounds=str(job.rounds),
        local_steps=str(job.steps),
        batch_size=job.batch,
        learning_rate=LEARNING_RATE,
        max_length=MAX_LENGTH,
        partition="iid",
        held_out_share=HELD_OUT_SHARE,
        lora_count=LORA_COUNT,
        adapter_size=ADAPTER_SIZE,
        placement=PLACEMENT,
        precision="fp32",
        patience=0,
        seed=job.seed,
    )
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        record = emulate(experiment, out, notify=notify)
        loss = float(np.mean([c.eval_loss or 0.0 for c in record.rounds[0].clients]))
        return times, load_file(out / "global" / "1" / "shared.safetensors"), loss
