"""AdamW whose moments go in and out as named arrays, so that a device can keep them between rounds.

Gradients are cut to a norm before a step. There is no weight decay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from device_profiles.errors import InputError
from edge_client.peft.flat_state import joined, named
from edge_client.peft.packed_model import PackedModel
from messaging.layout import Tensors, Vector

_BETAS = (0.9, 0.999)
_EPSILON = 1e-5  # of the published details of PPO; 1e-8 lets tiny gradients take full steps


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Adam's moments by tensor name, and the steps taken so far; by default none."""

    first: Tensors = field(default_factory=dict)
    second: Tensors = field(default_factory=dict)
    steps: int = 0


class Descent:
    """An optimiser of parameters, all together.

    Args:
        parameters: Trained in place, with their gradients on them.
        like: What lies in the parameters one after the other, in name, shape and order.
        learning_rate: Above 0.
        clip_norm: Norm of the whole gradient at most.
        moments: Of earlier steps.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        like: Mapping[str, Tensor],
        *,
        learning_rate: float,
        clip_norm: float,
        moments: Moments | None = None,
    ) -> None:
        self.learning_rate = learning_rate
        self._parameters, self._like, self._clip_norm = list(parameters), dict(like), clip_norm
        self._optimiser = torch.optim.AdamW(
            self._parameters,
            lr=learning_rate,
            betas=_BETAS,
            eps=_EPSILON,
            weight_decay=0.0,
            fused=True,
        )
        self._steps = 0
        if moments is not None and moments.steps:
            self._resume(moments)

    def step(self) -> float:
        """Take a step along the gradients that are there; return their norm before it was cut.

        Raises:
            InputError: If it is not a finite number.
        """
        norm = float(torch.nn.utils.clip_grad_norm_(self._parameters, self._clip_norm))
        if not norm < float("inf"):
            raise InputError(
                f"learning_rate = {self.learning_rate:g}: the gradient's norm is {norm:g} after "
                f"{self._steps} steps; choose a lower one"
            )
        self._optimiser.step()
        self._steps += 1
        return norm

    def moments(self) -> Moments:
        """Return copies of Adam's moments, and the steps so far, earlier ones included."""
        if not self._steps:
            return Moments()
        return Moments(
            first=self._together("exp_avg"),
            second=self._together("exp_avg_sq"),
            steps=self._steps,
        )

    def _resume(self, moments: Moments) -> None:
        self._steps = moments.steps
        sizes = [p.numel() for p in self._parameters]
        both = [
            torch.split(torch.from_numpy(joined(tensors, self._like)), sizes)
            for tensors in (moments.first, moments.second)
        ]
        for parameter, first, second in zip(self._parameters, *both, strict=True):
            self._optimiser.state[parameter] = {
                "step": torch.tensor(float(moments.steps), device=parameter.device),
                "exp_avg": first.view(parameter.shape).to(parameter, copy=True),
                "exp_avg_sq": second.view(parameter.shape).to(parameter, copy=True),
            }

    def _together(self, moment: str) -> Tensors:
        parts = [self._optimiser.state[p][moment].reshape(-1) for p in self._parameters]
        vector: Vector = torch.cat(parts).to("cpu", torch.float32, copy=True).numpy()
        return named(vector, self._like)


def policy_descent(
    model: PackedModel, *, learning_rate: float, clip_norm: float, moments: Moments | None = None
) -> Descent:
    """Return an optimiser of all that trains on a model."""
    return Descent(
        [model.parameter()],
        model.trainable(),
        learning_rate=learning_rate,
        clip_norm=clip_norm,
        moments=moments,
    )
