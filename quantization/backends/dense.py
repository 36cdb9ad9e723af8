"""Weights in fp32, as they are."""

from __future__ import annotations

import torch
from torch import Tensor


class Fp32Matrix:
    """A weight in fp32, in whatever order it lies in memory.

    Args:
        weight: Shape (outputs, inputs), fp32; a transposed view, or one of a mapped file, is used
            as it is.
    """

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight
        self.outputs, self.inputs = weight.shape

    @property
    def nbytes(self) -> int:
        """Memory of the weight, bytes."""
        return self._weight.nbytes

    def times(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return ``x @ W.T``, plus a bias. Shape (N, inputs) -> (N, outputs)."""
        return x @ self._weight.T if bias is None else torch.addmm(bias, x, self._weight.T)

    def times_transposed(self, g: Tensor) -> Tensor:
        """Return ``g @ W``. Shape (N, outputs) -> (N, inputs)."""
        return g @ self._weight

    def rows(self, index: Tensor) -> Tensor:
        """Return some rows. Shape (N,) -> (N, inputs)."""
        return self._weight[index]

    def dense(self) -> Tensor:
        """Return the weight itself. Shape (outputs, inputs)."""
        return self._weight


def hold_fp32(weight: Tensor, device: str) -> Fp32Matrix:
    """Hold a weight of any float type in fp32; one that is there already is not copied."""
    return Fp32Matrix(weight.to(device, torch.float32))
