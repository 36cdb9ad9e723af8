"""A head: features of a response, or of a state, to one score.

Shape letters: N rows, F features, H hidden units.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from device_profiles.errors import InputError
from device_profiles.reward_heads import head_name, trunk_prefix
from messaging.layout import Tensors

_PARTS = ("inner.weight", "inner.bias", "outer.weight", "outer.bias")


class Head(nn.Module):
    """One objective's network with one hidden layer.

    Its parameters are frozen, and stand in the order of ``tensors``.

    Args:
        tensors: Of one objective, as ``device_profiles.reward_heads.head_tensors`` lists them; they
            are copied.

    Raises:
        InputError: If a tensor is absent, one too many, or the shapes do not fit one another.
    """

    def __init__(self, tensors: Tensors) -> None:
        super().__init__()
        self._names = list(tensors)
        parts = {name: ".".join(name.split(".")[-2:]) for name in tensors}
        if sorted(parts.values()) != sorted(_PARTS):
            raise InputError(
                f"a reward head of the tensors {', '.join(sorted(tensors)) or 'none'}; give those "
                f"of one objective: {', '.join(_PARTS)}"
            )
        for name, part in parts.items():
            values = torch.from_numpy(np.array(tensors[name], np.float32))
            parameter = nn.Parameter(values, requires_grad=False)
            self.register_parameter(part.replace(".", "_"), parameter)
        hidden = self.inner_weight.shape[0]
        if [tuple(self.inner_bias.shape), tuple(self.outer_weight.shape)] != [
            (hidden,),
            (1, hidden),
        ] or self.outer_bias.shape != (1,):
            shapes = ", ".join(f"{part} {tensors[name].shape}" for name, part in parts.items())
            raise InputError(f"the tensors of a reward head do not fit one another: {shapes}")

    inner_weight: Tensor
    inner_bias: Tensor
    outer_weight: Tensor
    outer_bias: Tensor

    @property
    def features(self) -> int:
        """Features F that it reads."""
        return self.inner_weight.shape[1]

    def forward(self, features: Tensor) -> Tensor:
        """Return scores. Shape (N, F) -> (N,)."""
        inner = nn.functional.linear(features, self.inner_weight, self.inner_bias)  # (N, H)
        active = nn.functional.gelu(inner)
        return nn.functional.linear(active, self.outer_weight, self.outer_bias)[:, 0]

    def take(self) -> Tensors:
        """Return copies of its tensors by name."""
        return {
            name: parameter.detach().to("cpu", torch.float32, copy=True).numpy()
            for name, parameter in zip(self._names, self.parameters(), strict=True)
        }


def of_objective(tensors: Mapping[str, npt.NDArray[np.float32]], objective: str) -> Tensors:
    """Return the tensors of one objective's head out of those of several reward models.

    Raises:
        InputError: If there are none.
    """
    mine, trunk = f"{head_name(objective)}.", trunk_prefix(objective)
    own = {n: t for n, t in tensors.items() if n.startswith(mine) and not n.startswith(trunk)}
    if not own:
        raise InputError(f"no reward head of objective '{objective}' among {len(tensors)} tensors")
    return own


def trunk_tensors_of(tensors: Mapping[str, npt.NDArray[np.float32]], objective: str) -> Tensors:
    """Return what of one objective's trunk is its own, by the names that it has on a base.

    That is adapters, or changes of the base's own weights.
    """
    prefix = trunk_prefix(objective)
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


@torch.no_grad()
def scores(head: Head, features: Tensor) -> npt.NDArray[np.float64]:
    """Return scores in float64, without a graph. Shape (N, F) -> (N,)."""
    found: npt.NDArray[np.float64] = head(features).to("cpu", torch.float64).numpy()
    return found
