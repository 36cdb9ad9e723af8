"""Both kinds of model as a training sees them: all that trains is one parameter.

Shape letters: P response tokens of a batch, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import nn

from device_profiles.errors import InputError
from edge_client.data.batches import make_batch
from edge_client.data.packing import micro_batches, pack
from edge_client.data.prompts import Encoded
from edge_client.peft.build import Tunable
from edge_client.peft.dropout import LoraDropout
from edge_client.peft.packed_model import PackedModel
from edge_client.peft.tuned_model import TunedModel


class Passes(Protocol):
    """A model whose trainable tensors are one parameter."""

    values: nn.Parameter

    def loss_gradient(self, batch: Sequence[Encoded], drop: LoraDropout | None) -> float:
        """Return the mean loss and leave its gradient on ``values``."""

    def finish(self) -> None:
        """Leave the trained values on the model."""


class _PackedPasses:
    def __init__(self, model: PackedModel, accumulate: int | None, checkpoint: bool) -> None:
        self.values = model.parameter()
        self._model, self._accumulate, self._checkpoint = model, accumulate, checkpoint

    def loss_gradient(self, batch: Sequence[Encoded], drop: LoraDropout | None) -> float:
        count, loss = response_tokens(batch), 0.0
        for i, part in enumerate(micro_batches(batch, self._accumulate)):
            # What examples have in common is computed once, and would then be dropped alike.
            packed = pack(part, self._model.device, share=drop is None)
            nats = self._model.loss_gradient(
                packed,
                weight=1 / count,
                add=i > 0,
                checkpoint=self._checkpoint,
                drop=None if drop is None else drop.at(i),
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

    def loss_gradient(self, batch: Sequence[Encoded], drop: LoraDropout | None) -> float:
        self.finish()
        padded = make_batch(batch, self._model.base.end_token)
        self._model.drop = drop
        try:
            # without a name for the logits they are gone before the way back
            loss = torch.nn.functional.cross_entropy(
                self._model.logits_at(padded.tokens, padded.places).float(), padded.targets
            )
        finally:
            self._model.drop = None  # whoever measures next sees everything
        if self._parameters:
            parts = torch.autograd.grad(loss, self._parameters)
            self.values.grad = torch.cat([part.reshape(-1) for part in parts])
        return loss.item()

    @torch.no_grad()
    def finish(self) -> None:
        sizes = [p.numel() for p in self._parameters]
        for parameter, part in zip(self._parameters, torch.split(self.values, sizes), strict=True):
            parameter.copy_(part.view_as(parameter))


def passes_of(model: Tunable, accumulate: int | None, checkpoint: bool) -> Passes:
    """Return the passes of a model.

    Args:
        model: Packed or padded.
        accumulate: Go through a batch in parts of at most so many tokens; none for all at once.
        checkpoint: Keep less of the forward pass and compute it twice.

    Raises:
        InputError: If these are asked of a padded model.
    """
    if isinstance(model, PackedModel):
        return _PackedPasses(model, accumulate, checkpoint)
    if accumulate is not None or checkpoint:
        raise InputError(
            "accumulate and checkpoint are of packed training; use a PackedModel, or leave them out"
        )
    return _PaddedPasses(model)


def score(model: Tunable, batch: Sequence[Encoded]) -> tuple[float, int]:
    """Return the summed loss, nats, and how many targets are predicted."""
    if isinstance(model, PackedModel):
        loss, hits = model.score(pack(batch, model.device))
        return float(loss), int(hits)
    padded = make_batch(batch, model.base.end_token)
    with torch.inference_mode():
        logits = model.logits_at(padded.tokens, padded.places).float()  # (P, V)
        loss = torch.nn.functional.cross_entropy(logits, padded.targets, reduction="sum")
        return float(loss), int((logits.argmax(-1) == padded.targets).sum())


def response_tokens(batch: Sequence[Encoded]) -> int:
    """Return how many tokens a batch is trained to predict."""
    return sum(len(example.tokens) - example.response_start for example in batch)
