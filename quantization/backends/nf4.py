"""Weights in NF4, 16 levels fitted to a normal distribution and one scale for each 64 of a row.

Two codes share a byte, the first of a pair in its upper half, as bitsandbytes has them; so its
kernels can unpack what is rounded here, and a base has the same bits whoever unpacks it. A row is
padded to whole blocks: no block spans two rows, and a row can be looked up by itself.

Source: Dettmers et al., QLoRA: Efficient Finetuning of Quantized LLMs (2023), appendix E.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantization.backends.stored import StoredMatrix, pieces, scratch

BLOCK = 64
LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


class Nf4Codes:
    """A weight in NF4: two codes a byte, and the scales of the blocks.

    Attributes:
        codes: Shape (outputs, columns / 2), uint8.
        scales: Largest magnitude of each block, shape (outputs, columns / 64), fp32.
        columns: Inputs, rounded up to whole blocks.

    Raises:
        ValueError: If a weight is infinite or not a number.
    """

    def __init__(self, weight: Tensor, device: str) -> None:
        self.outputs, self.inputs = weight.shape
        self.columns = -(-self.inputs // BLOCK) * BLOCK
        codes = torch.empty((self.outputs, self.columns // 2), dtype=torch.uint8)
        scales = torch.empty((self.outputs, self.columns // BLOCK))
        for start, stop in pieces(self.outputs, self.columns):
            piece = torch.zeros((stop - start, self.columns))
            piece[:, : self.inputs] = weight[start:stop]
            codes[start:stop], scales[start:stop] = round_blocks(piece)
        if not scales.isfinite().all():
            raise ValueError("a weight is not a finite number")
        self.codes, self.scales = codes.to(device), scales.to(device)

    @property
    def nbytes(self) -> int:
        """Memory, bytes."""
        return self.codes.nbytes + self.scales.nbytes


class Nf4Store:
    """Codes that torch unpacks: a byte picks its pair of levels from a table of 256."""

    scale = None

    def __init__(self, held: Nf4Codes) -> None:
        self._held = held
        self.outputs, self.inputs, self.nbytes = held.outputs, held.inputs, held.nbytes
        self.device = held.codes.device
        levels = torch.tensor(LEVELS, device=self.device)
        pairs = torch.cartesian_prod(levels, levels)  # (256, 2)
        self._table = pairs.view(torch.int64).flatten()  # a pair is moved as one number of 8 bytes

    def unpack(self, start: int, stop: int) -> Tensor:
        """Return rows in fp32; valid until the next call."""
        out = scratch(stop - start, self._held.columns, self.device)
        return self._fill(out, self._held.codes[start:stop], self._held.scales[start:stop])

    def take(self, index: Tensor) -> Tensor:
        """Return some rows in fp32."""
        out = torch.empty((len(index), self._held.columns), device=self.device)
        return self._fill(out, self._held.codes[index], self._held.scales[index])

    def _fill(self, out: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
        pairs = out.view(torch.int64).view(-1)
        torch.index_select(self._table, 0, codes.reshape(-1).to(torch.int32), out=pairs)
        out.view(-1, BLOCK).mul_(scales.reshape(-1, 1))
        return out[:, : self.inputs]


def round_blocks(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round whole blocks to the nearest levels.

    Shape (N, C), fp32 -> codes (N, C / 2) uint8, scales (N, C / 64).
    """
    blocks = x.view(len(x), -1, BLOCK)
    scales = torch.maximum(blocks.amax(2), -blocks.amin(2))
    levels = torch.tensor(LEVELS)
    middles = (levels[1:] + levels[:-1]) / 2
    relative = blocks / torch.where(scales == 0, 1.0, scales)[:, :, None]
    codes = torch.bucketize(relative.view(len(x), -1), middles, out_int32=True).to(torch.uint8)
    return codes[:, 0::2] << 4 | codes[:, 1::2], scales


def hold_nf4(weight: Tensor, device: str) -> StoredMatrix:
    """Hold a weight in NF4."""
    return StoredMatrix(Nf4Store(Nf4Codes(weight, device)))
