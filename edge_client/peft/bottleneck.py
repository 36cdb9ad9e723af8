"""The bottleneck adapter: a small residual network after a site of a block.

Shape letters: B batch, T tokens, D model width, M bottleneck size.
Source: Houlsby et al. 2019, with three sites a block as arXiv 2404.13238v2 counts them.
"""

from __future__ import annotations

import torch
from torch import nn


class BottleneckAdapter(nn.Module):
    """``x + up(gelu(down(x)))`` with ``up`` zero at the start, so that it begins as the identity.

    Holds 2*D*M + D + M parameters.
    """

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, size)
        self.up = nn.Linear(size, width)
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the adapted hidden states. Shape (B, T, D) -> (B, T, D)."""
        narrow = nn.functional.gelu(self.down(hidden))  # (B, T, M)
        adapted: torch.Tensor = hidden + self.up(narrow)
        return adapted
