"""A critic: what an objective's reward model will say in the end, guessed before each action.

It is a head on what the reward model reads: features of the frozen trunk, with the reward model's
own adapters on it where it has any, frozen too. So they are computed once a step and kept for all
epochs. It starts as a copy of the reward model's head, and gives values on the scale of re-centred
scores.
Shape letters: N actions, F features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from edge_client.alignment.advantages import Stream
from edge_client.alignment.descent import EPSILON
from edge_client.alignment.losses import clipped_value
from edge_client.descent import Descent, Moments
from messaging.layout import Tensors


class Head(Protocol):
    """A small network that autograd can go through."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Return what trains."""

    def __call__(self, features: Tensor) -> Tensor:
        """Return scores. Shape (N, F) -> (N,)."""


class Critic:
    """One objective's values; it computes where its head lies.

    Args:
        build: Makes a head of named tensors; its parameters must be these, in their order.
        tensors: Of the reward model's head, or of this critic after an earlier step. They are
            copied: the reward model stays as it is.
        mean: Of the reward model's raw scores on the reference set.
        deviation: Of the same, above 0.
        learning_rate: Above 0.
        clip_norm: Norm of the gradient at most.
        moments: Adam's, of earlier steps, by the names of ``tensors``.

    Raises:
        ValueError: If the head's parameters are not the tensors.
    """

    def __init__(
        self,
        build: Callable[[Tensors], Head],
        tensors: Tensors,
        *,
        mean: float = 0.0,
        deviation: float = 1.0,
        learning_rate: float,
        clip_norm: float = 1.0,
        moments: Moments | None = None,
    ) -> None:
        self._head = build({name: np.array(t, np.float32) for name, t in tensors.items()})
        self._parameters = dict(zip(tensors, self._head.parameters(), strict=True))
        for name, parameter in self._parameters.items():
            if not np.array_equal(parameter.detach().cpu().numpy(), tensors[name]):
                raise ValueError(f"a critic's head does not hold '{name}' where it was expected")
            parameter.requires_grad_(True)  # the reward model's own head is frozen
        self._device = next(iter(self._parameters.values())).device
        self._mean, self._deviation = mean, deviation
        self._descent = Descent(
            list(self._parameters.values()),
            self._parameters,
            learning_rate=learning_rate,
            epsilon=EPSILON,
            clip_norm=clip_norm,
            moments=moments,
        )

    def values(self, features: Tensor) -> Stream:
        """Return the value of the state before each action. Shape (N, F) -> (N,)."""
        with torch.no_grad():
            return self._centred(features).to("cpu", torch.float64).numpy()

    def improve(self, features: Tensor, old: Stream, returns: Stream, clip: float) -> float:
        """Take a step towards the returns; return the mean clipped loss before it.

        Args:
            features: Shape (N, F).
            old: Values at the beginning of this batch of responses. Shape (N,).
            returns: Shape (N,).
            clip: How far from ``old`` a value may go.

        Raises:
            InputError: If the gradient is not finite.
        """
        for parameter in self._parameters.values():
            parameter.grad = None
        values = self._centred(features)
        before, wanted = (torch.from_numpy(stream).to(values) for stream in (old, returns))
        losses, slopes = clipped_value(values.detach(), before, wanted, clip)
        values.backward(slopes / len(slopes))  # type: ignore[no-untyped-call]
        self._descent.step()
        return float(losses.mean())

    def tensors(self) -> Tensors:
        """Return copies of the head's tensors by name."""
        return {
            name: parameter.detach().to("cpu", torch.float32, copy=True).numpy()
            for name, parameter in self._parameters.items()
        }

    def moments(self) -> Moments:
        """Return copies of Adam's moments by the same names."""
        return self._descent.moments()

    def _centred(self, features: Tensor) -> Tensor:
        return (self._head(features.to(self._device)) - self._mean) / self._deviation
