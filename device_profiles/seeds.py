"""Random streams that belong to a place: the same (seed, words) give the same stream anywhere."""

from __future__ import annotations

import hashlib

import numpy as np


def stream(seed: int, *words: str | int) -> np.random.Generator:
    """Return a counter-based generator keyed by the run's seed and what it is for.

    ``stream(7, "channel", 3, "pi5-02")`` does not depend on what was drawn elsewhere, on the
    order of clients or on the number of workers. A numpy integer counts as the integer it is.
    """
    place = tuple(word if isinstance(word, str) else int(word) for word in (seed, *words))
    key = hashlib.sha256(repr(place).encode()).digest()[:16]
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "big")))


def number(seed: int, *words: str | int) -> int:
    """Return one 63-bit seed for a library that wants an integer."""
    return int(stream(seed, *words).integers(0, 2**63 - 1))
