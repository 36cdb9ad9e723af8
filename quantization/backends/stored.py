"""Products with a weight that is held small and unpacked to fp32, part by part, for each product.

The parts go through one scratch buffer a thread, so a product needs at most ``SCRATCH_ELEMENTS``
numbers beside its result, however large the weight; the embedding's head is the one that matters.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

#: 16 MiB: every projection of GPT-2 small in one part, its head in ten.
SCRATCH_ELEMENTS = 2**22
#: What is rounded at a time while a base is loaded; each takes several numbers meanwhile.
ROUNDED_ELEMENTS = 2**18

_local = threading.local()


class Store(Protocol):
    """A weight of shape (outputs, inputs) as it is held."""

    @property
    def outputs(self) -> int:
        """Number of rows."""

    @property
    def inputs(self) -> int:
        """Number of columns."""

    @property
    def nbytes(self) -> int:
        """Memory, bytes."""

    @property
    def scale(self) -> Tensor | None:
        """What row i is multiplied by after unpacking, shape (outputs,); None for nothing."""

    @property
    def device(self) -> torch.device:
        """Where it is held."""

    def unpack(self, start: int, stop: int) -> Tensor:
        """Return rows ``start`` to ``stop`` in fp32, unscaled; valid until the next call."""

    def take(self, index: Tensor) -> Tensor:
        """Return some rows in fp32, scaled, in memory of their own."""


class StoredMatrix:
    """A frozen matrix over a store."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.outputs, self.inputs = store.outputs, store.inputs

    @property
    def nbytes(self) -> int:
        """Memory of the store, bytes."""
        return self._store.nbytes

    def times(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return ``x @ W.T``, plus a bias. Shape (N, inputs) -> (N, outputs)."""
        out = x.new_empty((len(x), self.outputs))
        for start, stop, part in self._parts():
            torch.mm(x, part.T, out=out[:, start:stop])
        return scaled(out, self._store.scale, bias)

    def times_transposed(self, g: Tensor) -> Tensor:
        """Return ``g @ W``. Shape (N, outputs) -> (N, inputs)."""
        if self._store.scale is not None:
            g = g * self._store.scale
        out = g.new_zeros((len(g), self.inputs))
        for start, stop, part in self._parts():
            out.addmm_(g[:, start:stop], part)
        return out

    def rows(self, index: Tensor) -> Tensor:
        """Return some rows. Shape (N,) -> (N, inputs)."""
        return self._store.take(index)

    def dense(self) -> Tensor:
        """Return the whole weight. Shape (outputs, inputs)."""
        out = torch.empty((self.outputs, self.inputs), device=self._store.device)
        for start, stop, part in self._parts():
            out[start:stop] = part
        return out if self._store.scale is None else out.mul_(self._store.scale[:, None])

    def _parts(self) -> Iterator[tuple[int, int, Tensor]]:
        for start, stop in parts(self.outputs, self.inputs):
            yield start, stop, self._store.unpack(start, stop)


def scaled(out: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    """Multiply the columns of a product and add a bias, in place. Shape (N, outputs)."""
    if scale is not None and bias is not None:
        return torch.addcmul(bias, out, scale, out=out)
    if scale is not None:
        return out.mul_(scale)
    return out if bias is None else out.add_(bias)


def parts(outputs: int, inputs: int) -> Iterator[tuple[int, int]]:
    """Cut the rows of a matrix into parts that scratch has room for."""
    return _cut(outputs, inputs, SCRATCH_ELEMENTS)


def pieces(outputs: int, inputs: int) -> Iterator[tuple[int, int]]:
    """Cut the rows of a matrix into pieces to be rounded one by one."""
    return _cut(outputs, inputs, ROUNDED_ELEMENTS)


def _cut(outputs: int, inputs: int, elements: int) -> Iterator[tuple[int, int]]:
    step = max(1, elements // inputs)
    for start in range(0, outputs, step):
        yield start, min(start + step, outputs)


def scratch(rows: int, columns: int, device: torch.device) -> Tensor:
    """Return room for a part, fp32, uninitialised. Shape (rows, columns).

    On the CPU it is the same memory at each call from a thread; a GPU's allocator reuses memory by
    itself, and in the order of its streams.
    """
    if device.type != "cpu":
        return torch.empty((rows, columns), device=device)
    held: Tensor | None = getattr(_local, "scratch", None)
    if held is None or held.numel() < rows * columns:
        with torch.inference_mode(mode=False):  # it is written again outside of it
            held = _local.scratch = torch.empty(max(rows * columns, SCRATCH_ELEMENTS))
    return held[: rows * columns].view(rows, columns)
