"""Weights in fp32, as they are."""

from __future__ import annotations

import torch
from torch import Tensor

#: The library behind torch's product (MKL) is slow where a few rows meet very many outputs, as at
#: GPT-2's head: parts of this many outputs took 0.60 to 0.73 of the time for 8 to 160 rows
#: (AMD EPYC, torch 2.13; one row and up to 3,072 outputs gain nothing).
_WIDE, _PART, _FEW_ROWS = 8192, 1024, 4


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
        if self.outputs >= _WIDE and len(x) >= _FEW_ROWS and x.device.type == "cpu":
            return self._times_by_parts(x, bias)
        return x @ self._weight.T if bias is None else torch.addmm(bias, x, self._weight.T)

    def _times_by_parts(self, x: Tensor, bias: Tensor | None) -> Tensor:
        out = x.new_empty(len(x), self.outputs)
        for start in range(0, self.outputs, _PART):
            part = slice(start, start + _PART)
            torch.mm(x, self._weight[part].T, out=out[:, part])
        return out if bias is None else out.add_(bias)

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
