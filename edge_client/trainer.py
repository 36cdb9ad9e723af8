"""Local work on one client's data: a few optimiser steps, or a look at its held-out part.

Exactly the adapters and LoRA modules train. Losses are nats per response token, the end token
included. Shape letters: P response tokens of a batch, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from device_profiles.errors import InputError
from device_profiles.seeds import stream
from edge_client.data.batches import make_batch, training_order
from edge_client.data.packing import micro_batches, pack
from edge_client.data.prompts import Encoded
from edge_client.peft.flat_state import joined, named
from edge_client.peft.packed_model import PackedModel
from edge_client.peft.tuned_model import TunedModel
from edge_client.state import ClientState
from messaging.layout import Tensors, Vector

_BETAS = (0.9, 0.999)
_EPSILON = 1e-8
_CLIP_NORM = 1.0
_EVALUATION_BATCH = 16
_DIVERGED = 1e6  # nats; the protocol carries no more, and none that is not finite


@dataclass(frozen=True, kw_only=True)
class Training:
    """What a round of local training gave.

    Attributes:
        tensors: Every trainable tensor after the last step.
        first_moments: Adam's, by tensor name.
        second_moments: Likewise.
        steps: Optimiser steps taken so far, earlier rounds included.
        loss: Mean over the steps, nats per response token.
        rows: Examples that went through the model.
        tokens: Their tokens, without padding; tokens that examples have in common count each time.
    """

    tensors: Tensors
    first_moments: Tensors
    second_moments: Tensors
    steps: int
    loss: float
    rows: int
    tokens: int


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Held-out results: mean nats and share predicted (argmax), over ``tokens`` response tokens."""

    loss: float
    accuracy: float
    tokens: int


def train(
    model: PackedModel | TunedModel,
    state: ClientState,
    examples: Sequence[Encoded],
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    words: tuple[str | int, ...],
    accumulate: int | None = None,
    checkpoint: bool = False,
) -> Training:
    """Take ``steps`` of AdamW from what is on the model, with the moments of ``state``.

    The batches are a function of ``seed`` and ``words`` alone.

    Args:
        model: With the client's tensors on it; they are trained in place.
        state: Adam's moments and steps so far.
        examples: At least 1.
        steps: At least 1.
        batch_size: At least 1; a client with fewer examples takes them all.
        learning_rate: Without schedule.
        seed: Of the run.
        words: Client and round.
        accumulate: Go through a batch in parts of at most so many tokens (an example that is
            longer goes alone), with the gradients of the whole; none for all at once.
        checkpoint: Keep less of the forward pass and compute it twice, with the same gradients.

    Raises:
        InputError: If training diverges.
    """
    passes = _passes(model, accumulate, checkpoint)
    values = passes.values
    optimiser = torch.optim.AdamW(
        [values], lr=learning_rate, betas=_BETAS, eps=_EPSILON, weight_decay=0.0, fused=True
    )
    names = model.trainable()
    if state.first_moments:
        optimiser.state[values] = {
            "step": torch.tensor(float(state.steps), device=values.device),
            "exp_avg": torch.from_numpy(joined(state.first_moments, names)).to(values),
            "exp_avg_sq": torch.from_numpy(joined(state.second_moments, names)).to(values),
        }
    order = training_order(
        len(examples), steps, min(batch_size, len(examples)), stream(seed, "batches", *words)
    )
    losses, rows, tokens = [], 0, 0
    for indices in order:
        batch = [examples[i] for i in indices]
        losses.append(passes.loss_gradient(batch))
        if not losses[-1] < _DIVERGED:
            raise InputError(
                f"learning_rate = {learning_rate:g}: the loss is {losses[-1]:g} at step "
                f"{len(losses)}; choose a lower one"
            )
        if values.numel():
            torch.nn.utils.clip_grad_norm_([values], _CLIP_NORM)
            optimiser.step()
        rows += len(batch)
        tokens += sum(len(example.tokens) for example in batch)
    passes.finish()
    moments = optimiser.state[values]
    return Training(
        tensors=model.take(),
        first_moments=named(_array(moments["exp_avg"]), names) if moments else {},
        second_moments=named(_array(moments["exp_avg_sq"]), names) if moments else {},
        steps=state.steps + len(losses),
        loss=sum(losses) / len(losses),
        rows=rows,
        tokens=tokens,
    )


def evaluate(model: PackedModel | TunedModel, examples: Sequence[Encoded]) -> Evaluation:
    """Return loss and accuracy on the responses of at least 1 example (teacher forcing).

    Raises:
        InputError: If training has diverged.
    """
    by_length = sorted(examples, key=lambda e: len(e.tokens))
    loss, right, count = 0.0, 0, 0
    for start in range(0, len(by_length), _EVALUATION_BATCH):
        batch = by_length[start : start + _EVALUATION_BATCH]
        nats, hits = _score(model, batch)
        loss += nats
        right += hits
        count += _response_tokens(batch)
    if not loss / count < _DIVERGED:
        raise InputError(
            f"the held-out loss is {loss / count:g}: training diverged; choose a lower "
            "learning_rate"
        )
    return Evaluation(loss=loss / count, accuracy=right / count, tokens=count)


def _response_tokens(batch: Sequence[Encoded]) -> int:
    return sum(len(example.tokens) - example.response_start for example in batch)


# -- both kinds of model: all that trains is one parameter -----------------------------------------


class _Passes(Protocol):
    values: nn.Parameter

    def loss_gradient(self, batch: Sequence[Encoded]) -> float:
        """Return the mean loss and leave its gradient on ``values``."""

    def finish(self) -> None:
        """Leave the trained values on the model."""


class _PackedPasses:
    def __init__(self, model: PackedModel, accumulate: int | None, checkpoint: bool) -> None:
        self.values = model.parameter()
        self._model, self._accumulate, self._checkpoint = model, accumulate, checkpoint

    def loss_gradient(self, batch: Sequence[Encoded]) -> float:
        count, loss = _response_tokens(batch), 0.0
        for i, part in enumerate(micro_batches(batch, self._accumulate)):
            packed = pack(part, self._model.device)
            nats = self._model.loss_gradient(
                packed, weight=1 / count, add=i > 0, checkpoint=self._checkpoint
            )
            loss += float(nats)
        return loss / count

    def finish(self) -> None:
        """Do nothing: the values are the model's own."""


class _PaddedPasses:
    def __init__(self, model: TunedModel) -> None:
        self._model = model
        self._parameters = list(model.trainable().values())
        joined = [p.detach().reshape(-1) for p in self._parameters]
        self.values = nn.Parameter(torch.cat(joined) if joined else torch.zeros(0))

    def loss_gradient(self, batch: Sequence[Encoded]) -> float:
        self.finish()
        padded = make_batch(batch, self._model.base.end_token)
        logits = self._model.logits_at(padded.tokens, padded.places)  # (P, V)
        loss = torch.nn.functional.cross_entropy(logits.float(), padded.targets)
        if self._parameters:
            parts = torch.autograd.grad(loss, self._parameters)
            self.values.grad = torch.cat([part.reshape(-1) for part in parts])
        return loss.item()

    @torch.no_grad()
    def finish(self) -> None:
        sizes = [p.numel() for p in self._parameters]
        for parameter, part in zip(self._parameters, torch.split(self.values, sizes), strict=True):
            parameter.copy_(part.view_as(parameter))


def _passes(model: PackedModel | TunedModel, accumulate: int | None, checkpoint: bool) -> _Passes:
    if isinstance(model, PackedModel):
        return _PackedPasses(model, accumulate, checkpoint)
    if accumulate is not None or checkpoint:
        raise InputError(
            "accumulate and checkpoint are of packed training; use a PackedModel, or leave them out"
        )
    return _PaddedPasses(model)


def _array(vector: torch.Tensor) -> Vector:
    array: Vector = vector.to("cpu", torch.float32).numpy()
    return array


def _score(model: PackedModel | TunedModel, batch: Sequence[Encoded]) -> tuple[float, int]:
    """Return the summed loss, nats, and how many targets are predicted."""
    if isinstance(model, PackedModel):
        loss, hits = model.score(pack(batch, model.device))
        return float(loss), int(hits)
    padded = make_batch(batch, model.base.end_token)
    with torch.inference_mode():
        logits = model.logits_at(padded.tokens, padded.places).float()  # (P, V)
        loss = torch.nn.functional.cross_entropy(logits, padded.targets, reduction="sum")
        return float(loss), int((logits.argmax(-1) == padded.targets).sum())
