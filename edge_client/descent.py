"""AdamW whose moments go in and out as named arrays, so that a device can keep them between rounds.

The one optimiser of all three stages; each says its own epsilon, decay and norm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

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
        parameters: Trained in place, each with its gradient on it.
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
        self._epsilon, self._weight_decay = epsilon, weight_decay
        moments = moments or Moments()
        self._steps = moments.steps
        self._first, self._second = (
            self._begun(tensors if moments.steps else None)
            for tensors in (moments.first, moments.second)
        )
        self._counts = [
            torch.tensor(float(moments.steps), device=p.device) for p in self._parameters
        ]

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
        self._update()
        self._steps += 1
        return norm

    @torch.no_grad()
    def _update(self) -> None:
        """Take the step: torch's own kernel, without the class around it.

        That class imports the compiler when it is made, 0.7 s and 30 MB of a process that never
        compiles (torch 2.13, an AMD EPYC).
        """
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        beta1, beta2 = _BETAS
        adamw(
            [*self._parameters],
            gradients,
            self._views(self._first),
            self._views(self._second),
            [],
            self._counts,
            fused=True,
            amsgrad=False,
            maximize=False,
            beta1=beta1,
            beta2=beta2,
            lr=self.learning_rate,
            weight_decay=self._weight_decay,
            eps=self._epsilon,
        )

    def moments(self) -> Moments:
        """Return copies of Adam's moments, and the steps so far, earlier ones included."""
        if not self._steps:
            return Moments()
        return Moments(
            first=self._named(self._first), second=self._named(self._second), steps=self._steps
        )

    def _begun(self, tensors: Tensors | None) -> Tensor:
        """Return a moment of all parameters, one after the other."""
        like = self._parameters[0]
        if tensors is None:
            size = sum(p.numel() for p in self._parameters)
            return torch.zeros(size, dtype=like.dtype, device=like.device)
        return torch.from_numpy(joined(tensors, self._like)).to(like, copy=True)

    def _views(self, moment: Tensor) -> list[Tensor]:
        parts = torch.split(moment, [p.numel() for p in self._parameters])
        return [v.view(p.shape) for v, p in zip(parts, self._parameters, strict=True)]

    def _named(self, moment: Tensor) -> Tensors:
        vector: Vector = moment.to("cpu", torch.float32, copy=True).numpy()
        return named(vector, self._like)
