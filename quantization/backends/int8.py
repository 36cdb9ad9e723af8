"""Weights as whole numbers from -127 to 127 and one scale a row; torch alone.

The rounding is that of LLM.int8 without its outlier columns: row i is scale_i * q_i, scale_i its
largest magnitude over 127. The scales go on the product, not on the weight: of a row of W that is
one multiplication for each row of the batch instead of one for each input.

Source: Dettmers et al., LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale (2022).
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantization.backends.stored import StoredMatrix, pieces, scaled, scratch

_LARGEST = 127


class Int8Store:
    """A weight in int8, row by row.

    Raises:
        ValueError: If a weight is infinite or not a number.
    """

    scale: Tensor

    def __init__(self, weight: Tensor, device: str) -> None:
        self.outputs, self.inputs = weight.shape
        codes = torch.empty((self.outputs, self.inputs), dtype=torch.int8)
        scale = torch.empty(self.outputs)
        for start, stop in pieces(self.outputs, self.inputs):
            codes[start:stop], scale[start:stop] = round_rows(
                weight[start:stop].to("cpu", torch.float32)
            )
        if not scale.isfinite().all():
            raise ValueError("a weight is not a finite number")
        self.codes, self.scale = codes.to(device), scale.to(device)

    @property
    def nbytes(self) -> int:
        """Memory, bytes."""
        return self.codes.nbytes + self.scale.nbytes

    @property
    def device(self) -> torch.device:
        """Where it is held."""
        return self.codes.device

    def unpack(self, start: int, stop: int) -> Tensor:
        """Return rows in fp32, unscaled; valid until the next call."""
        return scratch(stop - start, self.inputs, self.device).copy_(self.codes[start:stop])

    def take(self, index: Tensor) -> Tensor:
        """Return some rows in fp32."""
        return self.codes[index] * self.scale[index, None]


class DynamicInt8Matrix:
    """A weight in int8 whose products round the batch to int8 as well, each row with its scale.

    Args:
        store: The weight.
        gradients: Whether gradients are rounded too. Not for a head: the gradient to logits has
            one large number a row, and rounding loses the many small ones beside it.

    Raises:
        ValueError: If the weight has one row or one column only.
    """

    def __init__(self, store: Int8Store, *, gradients: bool) -> None:
        if 1 in (store.outputs, store.inputs):
            # torch's int8 product returns what memory held before (pytorch issue 195066)
            raise ValueError("a weight of one row or column; take precision int8")
        self._store, self._exact, self._gradients = store, StoredMatrix(store), gradients
        self.outputs, self.inputs, self.nbytes = store.outputs, store.inputs, store.nbytes
        self.rows, self.dense = self._exact.rows, self._exact.dense

    def times(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return about ``x @ W.T``, plus a bias. Shape (N, inputs) -> (N, outputs)."""
        return scaled(_int8_product(x, self._store.codes.T), self._store.scale, bias)

    def times_transposed(self, g: Tensor) -> Tensor:
        """Return ``g @ W``, or about that. Shape (N, outputs) -> (N, inputs)."""
        if not self._gradients:
            return self._exact.times_transposed(g)
        return _int8_product(g * self._store.scale, self._store.codes)


def _int8_product(x: Tensor, codes: Tensor) -> Tensor:
    """Return about ``x @ codes``, in fp32."""
    rounded, scale = round_rows(x)
    product = torch._int_mm(rounded, codes)  # exact, int32
    return product.to(torch.float32).mul_(scale[:, None])


def round_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round each row to int8. Shape (N, D) -> codes (N, D) int8, scales (N,)."""
    scale = torch.maximum(x.amax(1), -x.amin(1)) / _LARGEST
    scale = torch.where(scale == 0, 1.0, scale)  # what is not a number stays none
    # not .to(): of one row it would keep any stride, with which torch's int8 product is wrong
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    return codes.copy_((x / scale[:, None]).round_()), scale


def hold_int8(weight: Tensor, device: str) -> StoredMatrix:
    """Hold a weight in int8."""
    return StoredMatrix(Int8Store(weight, device))


def hold_int8_dynamic(weight: Tensor, device: str) -> DynamicInt8Matrix:
    """Hold a weight in int8, to be multiplied by batches and gradients in int8."""
    return DynamicInt8Matrix(Int8Store(weight, device), gradients=True)


def hold_int8_dynamic_head(weight: Tensor, device: str) -> DynamicInt8Matrix:
    """Hold a weight in int8, to be multiplied by batches in int8 and gradients in fp32."""
    return DynamicInt8Matrix(Int8Store(weight, device), gradients=False)
