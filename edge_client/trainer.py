"""Local work on one client's data: a few optimiser steps, or a look at its held-out part.

Exactly the adapters and LoRA modules train. Losses are nats per response token, the end token
included. Shape letters: P response tokens of a batch, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

import numpy as np
import torch
from torch import nn

from device_profiles.errors import InputError
from device_profiles.seeds import stream
from edge_client.data.batches import make_batch, training_order
from edge_client.data.packing import micro_batches, pack
from edge_client.data.prompts import Encoded
from edge_client.descent import Descent, Moments
from edge_client.peft.flat_state import joined, named
from edge_client.peft.packed_model import PackedModel
from edge_client.peft.tuned_model import TunedModel
from edge_client.progress import Interruption, Progress, Standing
from edge_client.state import ClientState
from messaging.layout import Tensors, Vector

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
    progress: Progress | None = None,
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
        progress: Where it is written down how far the training is; what was begun there from the
            same start, settings and examples goes on, to the same bits.

    Raises:
        InputError: If training diverges.
        StoppedError: If the device is to leave; ``progress`` has where the training stands.
        DiskError: If the disk does not take that.
    """
    passes = _passes(model, accumulate, checkpoint)
    values = passes.values
    names = model.trainable()
    moments = Moments(
        first=state.first_moments,
        second=state.second_moments,
        steps=state.steps if state.first_moments else 0,
    )
    losses: list[float] = []
    rows, tokens, fingerprint = 0, 0, ""
    if progress is not None:
        settings = (steps, batch_size, learning_rate, seed, words, accumulate, checkpoint)
        fingerprint = _fingerprint(repr((settings, state.steps)), model.take(), moments, examples)
        begun = progress.begun(fingerprint)
        if begun is not None:
            losses, rows, tokens = list(begun.losses), begun.rows, begun.tokens
            moments = _stand(values, begun, names, moments.steps + len(losses))
    descent = Descent(
        [values], names, learning_rate=learning_rate, clip_norm=_CLIP_NORM, moments=moments
    )

    def standing() -> Standing:
        now = descent.moments()
        parts = [_array(values.detach()), joined(now.first, names), joined(now.second, names)]
        return Standing(losses=losses, rows=rows, tokens=tokens, values=np.stack(parts))

    order = training_order(
        len(examples), steps, min(batch_size, len(examples)), stream(seed, "batches", *words)
    )
    for indices in islice(order, len(losses), None):
        batch = [examples[i] for i in indices]
        losses.append(passes.loss_gradient(batch))
        if not losses[-1] < _DIVERGED:
            raise InputError(
                f"learning_rate = {learning_rate:g}: the loss is {losses[-1]:g} at step "
                f"{len(losses)}; choose a lower one"
            )
        if values.numel():
            descent.step()
        rows += len(batch)
        tokens += sum(len(example.tokens) for example in batch)
        if progress is not None and len(losses) < steps:
            progress.stepped(fingerprint, len(losses), standing)
    passes.finish()
    moments = descent.moments()
    return Training(
        tensors=model.take(),
        first_moments=moments.first,
        second_moments=moments.second,
        steps=state.steps + len(losses),
        loss=sum(losses) / len(losses),
        rows=rows,
        tokens=tokens,
    )


def _fingerprint(
    settings: str, tensors: Tensors, moments: Moments, examples: Sequence[Encoded]
) -> str:
    """Return a hash of all that a training's outcome depends on, the base left out."""
    seen = hashlib.sha256(settings.encode())
    for group in (tensors, moments.first, moments.second):
        for name, tensor in group.items():
            seen.update(name.encode() + repr(tensor.shape).encode())
            seen.update(np.ascontiguousarray(tensor).data)
    for example in examples:
        seen.update(np.asarray([example.response_start, *example.tokens], np.int64).data)
    return seen.hexdigest()


def _stand(
    values: nn.Parameter, begun: Standing, names: Mapping[str, torch.Tensor], steps: int
) -> Moments:
    """Put a training's values where they were; return its moments."""
    now, first, second = begun.values
    with torch.no_grad():
        values.copy_(torch.from_numpy(now))
    return Moments(first=named(first, names), second=named(second, names), steps=steps)


def evaluate(
    model: PackedModel | TunedModel,
    examples: Sequence[Encoded],
    interruption: Interruption | None = None,
) -> Evaluation:
    """Return loss and accuracy on the responses of at least 1 example (teacher forcing).

    Raises:
        InputError: If training has diverged.
        StoppedError: If the device is to leave in the middle of it.
    """
    by_length = sorted(examples, key=lambda e: len(e.tokens))
    loss, right, count = 0.0, 0, 0
    for start in range(0, len(by_length), _EVALUATION_BATCH):
        if interruption is not None:
            interruption.check()
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
