"""The mean of updates weighted by examples, summed in float64 in client order.

The sum runs over one update at a time, so memory does not grow with the number of clients, and its
bits depend on which updates were accepted, never on when they arrived.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from messaging.layout import Vector


def weighted_mean(updates: Iterable[tuple[Vector, int]]) -> Vector:
    """Return the example-weighted mean of (update, examples), taken in the order given.

    Args:
        updates: Each of shape (P,), with at least one example.

    Raises:
        ValueError: If there is no update, or the examples do not sum to a positive number.
    """
    total: np.ndarray[tuple[int], np.dtype[np.float64]] | None = None
    weight = 0
    for vector, examples in updates:
        part = vector.astype(np.float64) * examples
        total = part if total is None else np.add(total, part, out=total)
        weight += examples
    if total is None or weight <= 0:
        raise ValueError(f"{weight} examples in all; a mean needs at least one update with one")
    return (total / weight).astype(np.float32)
