"""The weights of ``nf4``, unpacked by the kernels of bitsandbytes."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from quantization.backends.nf4 import BLOCK, Nf4Codes
from quantization.backends.stored import StoredMatrix


class BitsandbytesStore:
    """Codes that bitsandbytes unpacks."""

    scale = None

    def __init__(self, held: Nf4Codes) -> None:
        self._held = held
        self.outputs, self.inputs, self.nbytes = held.outputs, held.inputs, held.nbytes
        self.device = held.codes.device

    def unpack(self, start: int, stop: int) -> Tensor:
        """Return rows in fp32."""
        return self._fill(self._held.codes[start:stop], self._held.scales[start:stop])

    def take(self, index: Tensor) -> Tensor:
        """Return some rows in fp32."""
        return self._fill(self._held.codes[index], self._held.scales[index])

    def _fill(self, codes: Tensor, scales: Tensor) -> Tensor:
        dequantize, state = _library()
        shape = torch.Size((len(codes), self._held.columns))
        held = state(
            absmax=scales.reshape(-1),
            shape=shape,
            dtype=torch.float32,
            blocksize=BLOCK,
            quant_type="nf4",
        )
        out: Tensor = dequantize(codes.reshape(-1, 1), held)
        return out.view(shape)[:, : self.inputs]


@lru_cache
def _library() -> tuple[Callable[..., Tensor], Callable[..., Any]]:
    """Import bitsandbytes; it logs which optional kernels it did not find."""
    log = logging.getLogger("bitsandbytes")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from bitsandbytes.functional import QuantState, dequantize_4bit
    finally:
        log.setLevel(before)
    return dequantize_4bit, QuantState


def hold_nf4_bitsandbytes(weight: Tensor, device: str) -> StoredMatrix:
    """Hold a weight in NF4.

    Raises:
        ImportError: If bitsandbytes is not installed.
    """
    _library()
    return StoredMatrix(BitsandbytesStore(Nf4Codes(weight, device)))
