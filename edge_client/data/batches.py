"""Encoded examples as padded batches, in a seeded order.

Shape letters: B batch, T tokens of the longest example of the batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from edge_client.data.prompts import Encoded


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Rows padded on the right.

    Attributes:
        tokens: Shape (B, T).
        places: True where the next token belongs to a response. Shape (B, T).
        targets: Those next tokens. Shape (N,).
    """

    tokens: torch.Tensor
    places: torch.Tensor
    targets: torch.Tensor


def make_batch(examples: Sequence[Encoded], pad: int) -> Batch:
    """Return examples as one batch, padded to the longest."""
    longest = max(len(e.tokens) for e in examples)
    tokens = np.full((len(examples), longest), pad, dtype=np.int64)
    places = np.zeros((len(examples), longest), dtype=bool)
    for row, example in enumerate(examples):
        tokens[row, : len(example.tokens)] = example.tokens
        places[row, example.response_start - 1 : len(example.tokens) - 1] = True
    targets = np.concatenate([e.tokens[e.response_start :] for e in examples])
    return Batch(
        tokens=torch.from_numpy(tokens),
        places=torch.from_numpy(places),
        targets=torch.from_numpy(targets),
    )


def training_order(
    examples: int, steps: int, batch_size: int, generator: np.random.Generator
) -> Iterator[list[int]]:
    """Yield ``steps`` batches of indices: each example once before any comes again."""
    queue: list[int] = []
    for _ in range(steps):
        while len(queue) < batch_size:
            queue += generator.permutation(examples).tolist()
        yield queue[:batch_size]
        queue = queue[batch_size:]
