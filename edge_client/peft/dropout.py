"""Dropout on what LoRA modules are given: masks that belong to a place, drawn again when wanted.

A mask is a function of the run's seed, the client, the round, the step and the module. Nothing
depends on how often it is drawn or in which order, so a block that is computed twice is given the
same, and a training that goes on after a stop gives the same bits.
Shape letters: N tokens of a batch, D inputs of a projection.
Source: as peft has it, `B A dropout(x)` with a mask for each module and the frozen path untouched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from device_profiles.seeds import stream

_LEVELS = 1 << 16  # a draw is 16 bits: the share is exact to 1 in 65,536


@dataclass(frozen=True, kw_only=True)
class LoraDropout:
    """The masks of one step.

    Attributes:
        share: Of the entries that are left out, 0 <= share < 1.
        seed: Of the run.
        words: What the step is: client, round, number.
    """

    share: float
    seed: int
    words: tuple[str | int, ...]

    def at(self, part: int) -> LoraDropout:
        """Return the masks of one part of the step's batch."""
        return replace(self, words=(*self.words, part))

    @property
    def scale(self) -> float:
        """What is kept counts so much more, so that the mean stays what it was."""
        return _LEVELS / (_LEVELS - self._left_out)

    @property
    def _left_out(self) -> int:
        return min(round(self.share * _LEVELS), _LEVELS - 1)

    def kept(self, site: str, shape: Sequence[int], device: torch.device) -> Tensor:
        """Return which inputs a module sees. Shape as given, of bool."""
        draws = stream(self.seed, "lora-dropout", *self.words, site)
        drawn = draws.integers(0, _LEVELS, tuple(shape), dtype=np.uint16)
        return torch.from_numpy(drawn >= self._left_out).to(device)


@dataclass(frozen=True, kw_only=True)
class Masks:
    """The masks of the modules on one projection, and what their scale is. Shapes (N, D)."""

    kept: list[Tensor]
    scale: float
