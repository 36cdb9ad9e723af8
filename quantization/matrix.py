"""What a frozen weight can do, whatever it is held in.

Shape letters: N rows of a batch (its tokens, one after the other).
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class FrozenMatrix(Protocol):
    """A frozen weight of shape (outputs, inputs), as ``nn.Linear`` holds it.

    Arguments and products are fp32 and on the weight's device. Autograd does not record the
    products: who differentiates calls ``times`` on the way there and ``times_transposed`` on the
    way back. Both equal the products with ``dense()`` to rounding, which is that of int8 for the
    precision ``int8-dynamic`` and that of fp32 for the others.
    """

    @property
    def outputs(self) -> int:
        """Number of rows."""

    @property
    def inputs(self) -> int:
        """Number of columns."""

    @property
    def nbytes(self) -> int:
        """Memory that it is held in, scales included, bytes."""

    def times(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return ``x @ W.T``, plus a bias. Shape (N, inputs) -> (N, outputs)."""

    def times_transposed(self, g: Tensor) -> Tensor:
        """Return ``g @ W``, the gradient to the input. Shape (N, outputs) -> (N, inputs)."""

    def rows(self, index: Tensor) -> Tensor:
        """Return some rows, as an embedding's lookup does. Shape (N,) -> (N, inputs)."""

    def dense(self) -> Tensor:
        """Return the whole weight in fp32. Shape (outputs, inputs)."""
