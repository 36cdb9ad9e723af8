"""What the tests of reward models share: a small head in numpy, pairs that can be told apart."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from device_profiles.reward_heads import initial_heads
from messaging.layout import Tensors

WIDTH, HIDDEN = 4, 6  # 9 features
NAME = "reward.helpfulness"


def a_head(seed: int = 0) -> Tensors:
    """Return a head whose tensors are all different from zero."""
    rng = np.random.default_rng(seed)
    first = initial_heads(["helpfulness"], WIDTH, HIDDEN, seed=seed)
    return {n: (t + rng.normal(0, 0.3, t.shape)).astype(np.float32) for n, t in first.items()}


def by_hand(tensors: Tensors, features: Any) -> Any:
    """Return scores in float64, one row and one unit at a time."""
    w, b, v, c = (
        tensors[f"{NAME}.{part}"].astype(np.float64)
        for part in ("inner.weight", "inner.bias", "outer.weight", "outer.bias")
    )
    found = []
    for row in np.asarray(features, np.float64):
        units = [math.fsum(w[j] * row) + b[j] for j in range(len(b))]
        active = [u * 0.5 * (1 + math.erf(u / math.sqrt(2))) for u in units]
        found.append(math.fsum(v[0] * np.array(active)) + c[0])
    return np.array(found)


def some_features(rows: int, seed: int = 0) -> Tensor:
    """Return features without structure."""
    values = np.random.default_rng(seed).normal(size=(rows, 2 * WIDTH + 1))
    return torch.from_numpy(values.astype(np.float32))


@pytest.fixture
def separable() -> tuple[Tensor, Tensor]:
    """Return 200 pairs of which the chosen side is ahead by 1 or more in one feature."""
    rng = np.random.default_rng(7)
    chosen = rng.normal(size=(200, 2 * WIDTH + 1))
    rejected = rng.normal(size=chosen.shape)
    rejected[:, 2] = chosen[:, 2] - rng.uniform(1, 3, 200)
    return (
        torch.from_numpy(chosen.astype(np.float32)),
        torch.from_numpy(rejected.astype(np.float32)),
    )
