"""Weights rounded to bf16; products in fp32, since few processors multiply bf16 faster."""

from __future__ import annotations

import torch
from torch import Tensor

from quantization.backends.stored import StoredMatrix, scratch


class Bf16Store:
    """A weight in bf16, row by row."""

    scale = None

    def __init__(self, weight: Tensor, device: str) -> None:
        self._weight = torch.empty(weight.shape, dtype=torch.bfloat16, device=device).copy_(weight)
        self.outputs, self.inputs = weight.shape

    @property
    def nbytes(self) -> int:
        """Memory, bytes."""
        return self._weight.nbytes

    @property
    def device(self) -> torch.device:
        """Where it is held."""
        return self._weight.device

    def unpack(self, start: int, stop: int) -> Tensor:
        """Return rows in fp32; valid until the next call."""
        return scratch(stop - start, self.inputs, self.device).copy_(self._weight[start:stop])

    def take(self, index: Tensor) -> Tensor:
        """Return some rows in fp32."""
        return self._weight[index].to(torch.float32)


def hold_bf16(weight: Tensor, device: str) -> StoredMatrix:
    """Hold a weight in bf16, rounded to nearest."""
    return StoredMatrix(Bf16Store(weight, device))
