"""A base that was taken apart and put together again is the same base."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from quantization.frozen_gpt2 import load_frozen
from quantization.identity import identify
from quantization.parts import put_together, take_apart
from quantization.precision import PRECISIONS, available


@pytest.mark.parametrize("precision", PRECISIONS)
def test_products_of_a_base_put_together_are_bit_for_bit_those_of_the_base(
    precision: str, tiny_checkpoint: Path
) -> None:
    if available()[precision].backend is None:
        pytest.skip(f"{precision} does not run here")
    base = load_frozen(identify(str(tiny_checkpoint)), precision)
    again = put_together(*take_apart(base))
    assert (again.identity, again.precision) == (base.identity, base.precision)
    assert again.tokenizer("a bridge").input_ids == base.tokenizer("a bridge").input_ids
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    for one, other in zip(base.weights.blocks, again.weights.blocks, strict=True):
        for name in ("qkv", "attention_out", "mlp_in"):
            before, after = getattr(one, name), getattr(other, name)
            assert torch.equal(
                before.matrix.times(x, before.bias), after.matrix.times(x, after.bias)
            )
            g = before.matrix.times(x)
            assert torch.equal(before.matrix.times_transposed(g), after.matrix.times_transposed(g))
    rows = torch.tensor([3, 0, 511])
    assert torch.equal(base.weights.embedding.rows(rows), again.weights.embedding.rows(rows))
    assert torch.equal(base.weights.positions, again.weights.positions)


def test_arrays_are_used_where_they_lie_and_may_be_read_only(tiny_checkpoint: Path) -> None:
    rest, arrays = take_apart(load_frozen(identify(str(tiny_checkpoint)), "int8"))
    for array in arrays:
        array.flags.writeable = False
    base = put_together(rest, arrays)
    places = {array.ctypes.data for array in arrays}
    assert base.weights.positions.data_ptr() in places
    assert len(rest) < sum(array.nbytes for array in arrays)  # no weight is in it
    assert {np.dtype(array.dtype).name for array in arrays} == {"float32", "int8"}
