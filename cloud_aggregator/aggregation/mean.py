"""The mean of updates weighted by examples, summed in float64 in client order.

The sum runs over one update at a time, so memory does not grow with the number of clients, and its
bits depend on which updates were accepted, never on when they arrived. A device that holds only the
first tensors of the layout sends only those; each entry is averaged over the devices that hold it.

Shape letters: P entries of the layout.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from messaging.layout import Layout, Vector


def weighted_mean(updates: Iterable[tuple[Vector, int]], size: int) -> Vector:
    """Return the example-weighted mean of (update, examples), taken in the order given.

    Args:
        updates: The first entries of a vector of P, all or fewer, each with at least one example.
        size: P.

    Returns:
        Shape (P,); zero where no update has an entry.

    Raises:
        ValueError: If there is no update, an update is longer than P, or the examples do not sum to
            a positive number.
    """
    total = np.zeros(size, np.float64)
    weights: Counter[int] = Counter()
    for vector, examples in updates:
        if vector.size > size:
            raise ValueError(f"an update of {vector.size} entries; at most {size} are shared")
        total[: vector.size] += vector.astype(np.float64) * examples
        weights[vector.size] += examples
    if sum(weights.values()) <= 0:
        raise ValueError(
            f"{sum(weights.values())} examples in all; a mean needs at least one update with one"
        )
    return (total / _held_by(weights, size)).astype(np.float32)


def _held_by(weights: Counter[int], size: int) -> npt.NDArray[np.float64]:
    """Return by how many examples each entry is held, 1 where by none. Shape (P,)."""
    held = np.zeros(size, np.float64)
    for length, weight in weights.items():
        held[:length] += weight
    return np.where(held > 0, held, 1.0)


def mean_of_tensors(state: Vector, updates: Iterable[tuple[Vector, int]], layout: Layout) -> Vector:
    """Return the state plus the mean update: every tensor by itself. Shape (P,)."""
    return state + weighted_mean(updates, layout.size)
