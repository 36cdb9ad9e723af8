"""AdamW whose moments go in and out as named arrays, so that a device can keep them between rounds.

The one optimiser of all three stages; each says its own epsilon, decay and norm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from device_profiles.errors import InputError
from edge_client.peft.flat_state import joined, named
from messaging.layout import Tensors, Vector

_BETAS = (0.9, 0.999)


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
        epsilon: Added to the root of the second moment, above 0.
        weight_decay: Decoupled: a step multiplies by 1 - learning_rate * weight_decay; >= 0.
        clip_norm: Norm of the whole gradient at most; none leaves it as it is.
        moments: Of earlier steps.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        like: Mapping[str, Tensor],
        *,
        learning_rate: float,
        epsilon: float = 1e-8,
        weight_decay: float = 0.0,
        clip_norm: float | None = None,
        moments: Moments | None = None,
    ) -> None:
        self.learning_rate = learning_rate
        self._parameters, self._like, self._clip_norm = list(parameters), dict(like), clip_norm
        self._optimiser = torch.optim.AdamW(
            self._parameters,
            lr=learning_rate,
            betas=_BETAS,
            eps=epsilon,
            weight_decay=weight_decay,
            fused=True,
        )
        self._steps = 0
        if moments is not None and moments.steps:
            self._resume(moments)

    def step(self) -> float | None:
        """Take a step along the gradients that are there.

        Returns:
            Their norm before it was cut; none where nothing is cut.

        Raises:
            InputError: If that norm is not a finite number.
        """
        norm = None
        if self._clip_norm is not None:
            norm = float(torch.nn.utils.clip_grad_norm_(self._parameters, self._clip_norm))
            if not norm < float("inf"):
                raise InputError(
                    f"learning_rate = {self.learning_rate:g}: the gradient's norm is {norm:g} "
                    f"after {self._steps} steps; choose a lower one"
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
