"""Every trainable tensor of a client in one buffer, and every gradient in another.

The adapters come first, then the LoRA modules in the order in which they are filled: what a client
shares and what a client with fewer modules has are both the beginning of the buffer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from device_profiles.modules import NamedShape
from messaging.layout import Tensors, Vector


class FlatState:
    """Named views of one buffer of values and one of gradients, both zero at first.

    Args:
        shapes: Of the tensors, in their order.
    """

    def __init__(
        self, shapes: Sequence[NamedShape], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.shapes = list(shapes)
        ends = list(accumulate((s.size for s in shapes), initial=0))
        self.values = torch.zeros(ends[-1], dtype=dtype, device=device)
        self.gradient = torch.zeros_like(self.values)
        self._ends = ends

    def size(self, count: int) -> int:
        """Return how many entries the first ``count`` tensors have."""
        return self._ends[count]

    def views(self, count: int) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the first ``count`` tensors by name: values and gradients, both views."""
        views = {}
        for shape, start in zip(self.shapes[:count], self._ends, strict=False):
            part = slice(start, start + shape.size)
            views[shape.name] = (
                self.values[part].view(shape.shape),
                self.gradient[part].view(shape.shape),
            )
        return views


def named(vector: Vector, like: Mapping[str, Tensor]) -> Tensors:
    """Return a vector's parts by name (views into it), shaped and ordered as ``like``."""
    tensors, start = {}, 0
    for name, values in like.items():
        tensors[name] = vector[start : start + values.numel()].reshape(tuple(values.shape))
        start += values.numel()
    return tensors


def joined(tensors: Tensors, like: Mapping[str, Tensor]) -> Vector:
    """Return tensors as one vector in the order of ``like``, zero where one is absent."""
    vector = np.zeros(sum(values.numel() for values in like.values()), np.float32)
    for name, place in named(vector, like).items():
        if name in tensors:
            place[...] = tensors[name]
    return vector
