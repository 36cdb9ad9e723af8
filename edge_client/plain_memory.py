"""What a model of another family than GPT-2 takes in memory, counted by a step that takes none.

The packed step's tensors are counted by hand (``device_profiles.step_memory``). Those of a model
that transformers and peft compute are the libraries' own, and change with them. So one step is
gone through on tensors without values (torch's ``FakeTensorMode``), and what would be held is
counted from the operations that would make it: a second or two, whatever the size.

As a program (``python -m edge_client.plain_memory JSON``) it prints the same as JSON, for who does
not want torch in its own memory.

Shape letters: B batch, T tokens, D width.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from device_profiles.modules import BaseShape
from device_profiles.step_memory import (
    BEFORE_BYTES,
    EVALUATED_STATE_BYTES,
    EVALUATION_EXAMPLES,
    RUNTIME_BYTES,
    STATE_BYTES,
    StepMemory,
)
from quantization.identity import BaseIdentity

if TYPE_CHECKING:
    import torch

    from edge_client.peft.memory_count import MemoryCount
    from edge_client.peft.tuned_model import TunedModel


class CountError(Exception):
    """A step that torch does not go through without values: what it takes is not known."""


_MODEL_BYTES = 4  # of a trainable number: the model has it beside what is stepped
#: Fitted, as are the holes, to three models of 25 to 70 million weights (Linux, torch 2.13,
#: transformers 4.57, peft 0.21): transformers and peft, with what they import.
_LIBRARIES_BYTES = 243_000_000
#: Fitted. What glibc's heap holds beyond the tensors that come and go in it, as a share of those.
_HOLES_SHARE = 0.65


def plain_memory(
    identity: BaseIdentity,
    *,
    adapter_size: int,
    placement: str,
    lora_count: int,
    lora_rank: int,
    batch_size: int,
    max_length: int,
) -> StepMemory:
    """Return what a process that trains and measures one client at a time takes at its peak.

    Args:
        identity: Of the base; its weights are not read.
        adapter_size: M; 0 for no adapters.
        placement: Of LoRA.
        lora_count: The most that any of its clients trains.
        lora_rank: R.
        batch_size: Examples that go through at once, every one as long as ``max_length``.
        max_length: Tokens.

    Raises:
        InputError: If size, rank, count or placement do not fit the base.
        BaseModelError: If the libraries make nothing of its configuration.
        CountError: If the step depends on values (some ways to stretch positions do).
    """
    import torch

    from edge_client.peft.tuned_model import TunedModel
    from quantization.base_model import Base, unloaded_model
    from quantization.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(identity)
    length = min(max_length, identity.positions)
    with torch.device("meta"):  # neither library can make a module of tensors without values
        base = Base(identity=identity, model=unloaded_model(identity), tokenizer=tokenizer)
        model = TunedModel(
            base,
            adapter_size=adapter_size,
            placement=placement,
            lora_count=lora_count,
            lora_rank=lora_rank,
        )
    training, held_out = _counts(model, lora_count, batch_size, length)
    trainable = sum(p.numel() for p in model.trainable().values())
    before, heap = BEFORE_BYTES * trainable, max(training.heap_bytes, held_out.heap_bytes)
    phases = (
        (STATE_BYTES + _MODEL_BYTES, training),
        (EVALUATED_STATE_BYTES, held_out),  # in the heap that training left
    )
    memories = [
        StepMemory(
            base=identity.base_bytes,
            state=state * trainable,
            before=before,
            kept=0,
            working=count.peak_bytes,
            runtime=RUNTIME_BYTES + _LIBRARIES_BYTES,
            holes=int((1 + _HOLES_SHARE) * heap) - count.heap_bytes,
        )
        for state, count in phases
    ]
    return max(memories, key=lambda memory: memory.total)


def _counts(
    model: TunedModel, lora_count: int, batch_size: int, length: int
) -> tuple[MemoryCount, MemoryCount]:
    """Return what a step on a model makes, and what measuring does.

    Raises:
        CountError: If either depends on values.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from edge_client.peft.memory_count import MemoryCount

    try:
        with FakeTensorMode():
            _without_values(model.model)
            model.activate(lora_count)
            with MemoryCount() as training:
                _train(model, torch.zeros(batch_size, length, dtype=torch.long))
            with MemoryCount() as held_out, torch.no_grad():
                _score(model, torch.zeros(EVALUATION_EXAMPLES, length, dtype=torch.long))
    except Exception as err:  # of torch's own, and of no common kind
        raise CountError(f"{type(err).__name__}: {err}".partition("\n")[0]) from err
    return training, held_out


def _without_values(model: torch.nn.Module) -> None:
    """Give every module tensors that have a place, a processor's memory, and no values."""
    import torch

    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = torch.nn.Parameter(
                    torch.empty(parameter.shape, dtype=parameter.dtype), parameter.requires_grad
                )
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _train(model: TunedModel, tokens: torch.Tensor) -> None:
    """Do what a step does (``edge_client.passes``), each token but the first a target."""
    import torch

    parameters = list(model.trainable().values())
    loss = torch.nn.functional.cross_entropy(_logits(model, tokens), tokens[:, 1:].reshape(-1))
    parts = torch.autograd.grad(loss, parameters)
    torch.cat([part.reshape(-1) for part in parts])


def _score(model: TunedModel, tokens: torch.Tensor) -> None:
    import torch

    logits, targets = _logits(model, tokens), tokens[:, 1:].reshape(-1)
    torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    (logits.argmax(-1) == targets).sum()


def _logits(model: TunedModel, tokens: torch.Tensor) -> torch.Tensor:
    """Return the logits of all places but the last. Shape (B, T) -> (B * (T - 1), V)."""
    chosen = model.hidden(tokens)[:, :-1].flatten(0, 1)  # (B * (T - 1), D)
    logits: torch.Tensor = model.model.get_output_embeddings()(chosen)
    return logits.float()


def plain_memory_apart(identity: BaseIdentity, **settings: Any) -> StepMemory:
    """Return the same, counted by a process of its own.

    Args:
        identity: Of the base.
        settings: The others of ``plain_memory``.

    Raises:
        CountError: If that process fails.
    """
    given = json.dumps([asdict(identity), settings], default=str)  # folders
    done = subprocess.run(
        [sys.executable, "-m", __name__, given],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:]
        raise CountError(" ".join(last) or f"it ended with {done.returncode}")
    return StepMemory(**json.loads(done.stdout.splitlines()[-1]))


def _main(given: str) -> None:
    fields, settings = json.loads(given)
    for name in ("folder", "tokenizer_folder"):
        fields[name] = Path(fields[name])
    identity = BaseIdentity(**{**fields, "shape": BaseShape(**fields["shape"])})
    print(json.dumps(asdict(plain_memory(identity, **settings))))  # noqa: T201 - a program's output


if __name__ == "__main__":
    _main(sys.argv[1])
