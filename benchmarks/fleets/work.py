"""Identical work for every engine: ten clients, their data, their modules and their batches.

An engine gets the shared adapters of a round and a client's own part (LoRA, moments), and gives
back the adapters after the client's steps. What a step is differs: ``padded_steps`` is transformers
and peft as a user writes it, padded to the batch's longest row with labels of -100, ``own_steps``
is this project's packed step. Both take the same batches with the same AdamW, clipped at 1. After
each round every client measures the new adapters on its held-out examples (``*_measure``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from device_profiles.fleet import draw_fleet, find_fleet
from device_profiles.modules import first_lora_sites, initial_adapters, initial_lora, lora_rank
from device_profiles.seeds import stream
from edge_client.data.batches import make_batch, training_order
from edge_client.data.instructions import load_instructions
from edge_client.data.partition import partition
from edge_client.data.prompts import Encoded, encode_example
from edge_client.state import ClientState
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
from quantization.identity import identify


@dataclass
class Own:
    """What a client keeps between rounds."""

    lora: Tensors
    first: Tensors = field(default_factory=dict)
    second: Tensors = field(default_factory=dict)
    steps: int = 0


@dataclass(frozen=True)
class Turn:
    """A client's part of a round: ``own`` is changed in place."""

    client: int
    number: int
    adapters: Tensors
    own: Own


@lru_cache(maxsize=1)
def prepared(job: Job) -> Prepared:
    """Return what all clients have in common, read once a process."""
    return Prepared(job)


class Prepared:
    """Names, data and first values."""

    def __init__(self, job: Job) -> None:
        from quantization.tokenizer import load_tokenizer

        self.job = job
        self.identity = identify(job.model)
        self.rank = lora_rank(self.identity.shape, None)[0]
        self.names = [d.id for d in draw_fleet(find_fleet("mixed"), job.clients, job.seed)]
        self._rows = load_instructions(job.data).examples
        self._parts = partition(
            self._rows,
            clients=job.clients,
            kind="iid",
            alpha=1.0,
            skew=0.0,
            held_out_share=HELD_OUT_SHARE,
            seed=job.seed,
        )
        self._tokenizer: Any = load_tokenizer(self.identity)

    def adapters(self) -> Tensors:
        """Return the adapters that a run begins with."""
        return initial_adapters(self.identity.shape, ADAPTER_SIZE, self.job.seed)

    def own(self) -> Own:
        """Return what a client begins with."""
        sites = first_lora_sites(self.identity.shape, PLACEMENT, LORA_COUNT)
        return Own(initial_lora(sites, self.rank, self.job.seed))

    def examples(self, client: int) -> list[Encoded]:
        """Return a client's own examples."""
        return self._encoded(self._parts[client].train)

    def held_out(self, client: int) -> list[Encoded]:
        """Return the examples that a client is measured on."""
        return self._encoded(self._parts[client].held_out)

    def _encoded(self, places: Sequence[int]) -> list[Encoded]:
        longest = min(MAX_LENGTH, self.identity.positions)
        return [encode_example(self._rows[i], self._tokenizer, longest) for i in places]

    @property
    def sizes(self) -> dict[str, Any]:
        """The modules on the base."""
        return {
            "adapter_size": ADAPTER_SIZE,
            "placement": PLACEMENT,
            "lora_count": LORA_COUNT,
            "lora_rank": self.rank,
        }


def own_model(work: Prepared) -> Any:
    """Return the packed model."""
    from edge_client.peft.packed_model import PackedModel
    from quantization.frozen_gpt2 import load_frozen

    return PackedModel(load_frozen(work.identity, "fp32"), **work.sizes)


def padded_model(work: Prepared) -> Any:
    """Return transformers' model with peft's LoRA and hooked adapters."""
    from edge_client.peft.tuned_model import TunedModel
    from quantization.base_model import load_base

    return TunedModel(load_base(work.identity), **work.sizes)


def own_steps(work: Prepared, model: Any, turn: Turn) -> Tensors:
    """Take a client's steps of a round by this project's trainer; return its adapters."""
    from edge_client.trainer import train

    adapters, own = turn.adapters, turn.own
    model.activate(LORA_COUNT)
    model.put({**own.lora, **adapters})
    state = ClientState(
        round=turn.number - 1,
        personal=own.lora,
        first_moments=own.first,
        second_moments=own.second,
        steps=own.steps,
    )
    done = train(
        model,
        state,
        work.examples(turn.client),
        steps=work.job.steps,
        batch_size=work.job.batch,
        learning_rate=LEARNING_RATE,
        seed=work.job.seed,
        words=(work.names[turn.client], turn.number),
    )
    own.first, own.second, own.steps = done.first_moments, done.second_moments, done.steps
    own.lora = {n: t for n, t in done.tensors.items() if n not in adapters}
    return {n: t for n, t in done.tensors.items() if n in adapters}


def padded_steps(work: Prepared, model: Any, turn: Turn) -> Tensors:
    """Take the same steps by torch's autograd on padded batches; return the client's adapters."""
    import torch
    from torch.nn.functional import cross_entropy

    adapters, own = turn.adapters, turn.own
    model.activate(LORA_COUNT)
    model.put({**own.lora, **adapters})
    trained = model.trainable()
    parameters = list(trained.values())
    optimiser = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)
    for name, parameter in trained.items() if own.first else ():
        optimiser.state[parameter] = {
            "step": torch.tensor(float(own.steps)),
            "exp_avg": torch.from_numpy(own.first[name]).clone(),
            "exp_avg_sq": torch.from_numpy(own.second[name]).clone(),
        }
    examples = work.examples(turn.client)
    size = min(work.job.batch, len(examples))
    seeds = stream(work.job.seed, "batches", work.names[turn.client], turn.number)
    for indices in training_order(len(examples), work.job.steps, size, seeds):
        padded = make_batch([examples[i] for i in indices], model.base.end_token)
        labels = torch.full_like(padded.tokens, -100)
        labels[padded.places] = padded.targets
        logits = model.model(padded.tokens).logits
        loss = cross_entropy(logits.flatten(0, 1), labels.flatten())
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        own.steps += 1
    states = {name: optimiser.state[p] for name, p in trained.items()}
    own.first = {n: s["exp_avg"].numpy() for n, s in states.items()}
    own.second = {n: s["exp_avg_sq"].numpy() for n, s in states.items()}
    after = {n: np.array(t) for n, t in model.take().items()}
    own.lora = {n: t for n, t in after.items() if n not in adapters}
    return {n: t for n, t in after.items() if n in adapters}


def own_measure(work: Prepared, model: Any, turn: Turn) -> float:
    """Return a client's loss on its held-out examples, nats a token."""
    from edge_client.trainer import evaluate

    model.activate(LORA_COUNT)
    model.put({**turn.own.lora, **turn.adapters})
    return evaluate(model, work.held_out(turn.client)).loss


def padded_measure(work: Prepared, model: Any, turn: Turn) -> float:
    """Return the same from padded batches."""
    import torch
    from torch.nn.functional import cross_entropy

    model.activate(LORA_COUNT)
    model.put({**turn.own.lora, **turn.adapters})
    examples, total, count = work.held_out(turn.client), 0.0, 0
    with torch.no_grad():
        for start in range(0, len(examples), work.job.batch):
            padded = make_batch(examples[start : start + work.job.batch], model.base.end_token)
            logits = model.model(padded.tokens).logits[padded.places]
            total += float(cross_entropy(logits, padded.targets, reduction="sum"))
            count += len(padded.targets)
    return total / count


STEPS = {
    "own": (own_model, own_steps, own_measure),
    "padded": (padded_model, padded_steps, padded_measure),
}
