"""The shapes at which costs can be priced, held against GPT-2 small by hand."""

from __future__ import annotations

import pytest

from device_profiles.errors import InputError
from device_profiles.modules import PLACEMENTS, BaseShape, lora_sites
from device_profiles.pricing import PRICED_SHAPES, cost_basis

SMALL = BaseShape(layers=12, width=768, inner=3072)


def test_gpt2_small_has_124439808_weights() -> None:
    base, parameters = PRICED_SHAPES["gpt2-small"]
    assert base == SMALL
    d = 768
    # attention, its output, the two of the MLP with their biases, and two norms a block;
    # 50,257 tokens and 1,024 positions once (the head is tied), and the last norm
    block = d * 3 * d + 3 * d + d * d + d + 2 * (d * 4 * d) + 4 * d + d + 2 * 2 * d
    assert parameters == 12 * block + (50_257 + 1024) * d + 2 * d == 124_439_808


def test_a_run_on_a_narrow_base_of_as_many_blocks_is_priced_at_the_named_shape() -> None:
    learning = BaseShape(layers=12, width=128, inner=512)
    basis = cost_basis("gpt2-small", learning, 8)
    assert (basis.name, basis.base, basis.lora_rank) == ("gpt2-small", SMALL, 8)
    assert basis.parameters == 124_439_808
    for placement in PLACEMENTS:  # the same sites: a device's count means the same on both
        paths = [[site.path for site in lora_sites(b, placement)] for b in (learning, basis.base)]
        assert paths[0] == paths[1]


@pytest.mark.parametrize("layers", [1, 11, 13, 24])
def test_a_base_of_another_number_of_blocks_is_refused_with_both_numbers(layers: int) -> None:
    learning = BaseShape(layers=layers, width=128, inner=512)
    with pytest.raises(
        InputError,
        match=f"priced_at = 'gpt2-small' has 12 blocks and the base {layers}; price at 'base'",
    ):
        cost_basis("gpt2-small", learning, 96)
