"""Shapes at which delay and energy can be priced while learning happens on a smaller base.

A small base shows what a method learns; what a round costs is shown on the shape that the paper
used. Both stand in the record.
"""

from __future__ import annotations

from dataclasses import dataclass

from device_profiles.errors import InputError
from device_profiles.modules import BaseShape


@dataclass(frozen=True, kw_only=True)
class CostBasis:
    """What costs are computed on: a base's shape, its number of weights, and LoRA's rank there."""

    name: str
    base: BaseShape
    parameters: int
    lora_rank: int


#: (shape, weights with the tied head counted once), by name.
PRICED_SHAPES: dict[str, tuple[BaseShape, int]] = {
    "gpt2-small": (
        BaseShape(layers=12, width=768, inner=3072, vocabulary=50_257, positions=1024),
        124_439_808,
    ),
}


def cost_basis(name: str, learning: BaseShape, lora_rank: int) -> CostBasis:
    """Return the basis of that name for a run that learns on a base of another shape.

    Raises:
        InputError: If the two shapes have different numbers of sites.
    """
    base, parameters = PRICED_SHAPES[name]
    if base.layers != learning.layers:
        raise InputError(
            f"priced_at = {name!r} has {base.layers} blocks and the base {learning.layers}; "
            "price at 'base', or learn on a base with as many blocks"
        )
    return CostBasis(name=name, base=base, parameters=parameters, lora_rank=lora_rank)
