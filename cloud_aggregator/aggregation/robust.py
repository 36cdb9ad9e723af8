"""Rules that a minority of bad updates cannot steer, and the check of an update on arrival.

An update is the change of a device's shared part, float32; a device that holds only the first
tensors of the layout sends only those, and a coordinate counts over the devices that hold it. Every
rule here counts each device once: how many examples it has is its own word, and ``mean`` alone
takes it. What nobody holds stays as it is, and where one device alone holds a coordinate, no rule
can tell whether it lies.

``norm-clipped`` takes one update at a time. The others read the spool several times, a block of
coordinates of all K devices at a time, so they hold at most ``BLOCK_BYTES`` of updates whatever K
is (a block is at least one coordinate), beside one whole update, the result, and in ``krum`` three
matrices K x K. They read it about ``4 P K / BLOCK_BYTES`` times, ``krum`` three times as often.

Shape letters: P entries of the layout, K devices, N of them that hold a block, W its width.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from cloud_aggregator.aggregation.mean import weighted_mean
from device_profiles.errors import InputError
from messaging.errors import ProtocolError
from messaging.layout import Vector

#: Begins a pass over the accepted updates, (update, examples) in client order, one at a time.
Updates = Callable[[], Iterator[tuple[Vector, int]]]
Floats = npt.NDArray[np.float64]

_Value = TypeVar("_Value", int, float)

BLOCK_BYTES = 64 * 2**20


@dataclass(frozen=True, kw_only=True)
class RobustSettings:
    """What the rules are told; each rule says which of it that needs.

    Attributes:
        clip_norm: Largest Euclidean norm of an update that counts whole, > 0 (``norm-clipped``).
        trim_share: Of a coordinate's holders, left out at each end, [0, 0.5) (``trimmed-mean``).
        byzantine: Bad updates that are reckoned with, >= 0 (``krum``).
    """

    clip_norm: float | None = None
    trim_share: float | None = None
    byzantine: int | None = None

    def __post_init__(self) -> None:
        """Refuse values out of their range.

        Raises:
            InputError: Naming the field.
        """
        if self.clip_norm is not None and not 0 < self.clip_norm < math.inf:
            raise InputError(f"clip_norm = {self.clip_norm}; give a number above 0")
        if self.trim_share is not None and not 0 <= self.trim_share < 0.5:
            raise InputError(f"trim_share = {self.trim_share}; give 0 to below 0.5")
        if self.byzantine is not None and self.byzantine < 0:
            raise InputError(f"byzantine = {self.byzantine}; give 0 or more")


def norm(vector: Vector) -> float:
    """Return the Euclidean norm, summed in float64."""
    wide = vector.astype(np.float64)
    return math.sqrt(float(wide @ wide))


def check_update(vector: Vector, limit: float) -> None:
    """Refuse an update that is larger than an honest one can be.

    Raises:
        ProtocolError: With code ``norm``, if its Euclidean norm is above ``limit`` or no number.
    """
    size = norm(vector)
    if not size <= limit:
        raise ProtocolError("norm", f"the update has a norm of {size:.4g}; at most {limit:g} count")


def clip(vector: Vector, limit: float) -> Floats:
    """Return the vector in float64, shortened to a Euclidean norm of ``limit`` if it is longer.

    Raises:
        ValueError: If an entry is not finite.
    """
    size = norm(vector)
    if not math.isfinite(size):
        raise ValueError(f"an update of norm {size}; updates are finite when they are accepted")
    return vector.astype(np.float64) * min(1.0, limit / size if size else 1.0)


def clipped(
    updates: Iterable[tuple[Vector, int]], settings: RobustSettings
) -> Iterator[tuple[Vector, int]]:
    """Yield each update, shortened to ``clip_norm`` if it is longer, as one example."""
    limit = told(settings.clip_norm, "clip_norm")
    for vector, _ in updates:
        yield clip(vector, limit).astype(np.float32), 1


def median(updates: Updates, size: int, _settings: RobustSettings) -> Vector:
    """Return each coordinate's median over its holders. Shape (P,).

    Of an even number it is the mean of the two in the middle. (Yin et al. 2018.)
    """
    return _by_coordinate(updates, size, lambda count: (count - 1) // 2)


def trimmed_mean(updates: Updates, size: int, settings: RobustSettings) -> Vector:
    """Return each coordinate's mean over its holders without the extremes. Shape (P,).

    Of N holders ``floor(trim_share * N)`` are left out at each end (Yin et al. 2018): too few
    holders for one of them to be left out have their plain mean.
    """
    share = told(settings.trim_share, "trim_share")
    # the small term is for shares such as 0.29, where 100 of them are a rounding below 29
    return _by_coordinate(updates, size, lambda count: math.floor(share * count + 1e-9))


def krum(updates: Updates, size: int, settings: RobustSettings) -> Vector:
    """Return the mean of the updates that lie closest to their neighbours. Shape (P,).

    Multi-Krum (Blanchard et al. 2017): of K updates, f of them bad, each has the sum of the squared
    distances to its K - f - 2 nearest others for a score, and all but the f highest are averaged;
    of equal scores, the earlier client's is kept. Where devices hold parts of different length, a
    squared distance is the mean over the coordinates that both hold, times P. Devices that hold
    nothing are not counted.

    Raises:
        InputError: If fewer than 2 f + 3 updates hold anything.
    """
    bad = told(settings.byzantine, "byzantine")
    lengths = _lengths(updates, size)
    holders = [i for i, length in enumerate(lengths) if length]
    least = fewest_for_krum(bad)
    if len(holders) < least:
        raise InputError(
            f"krum with byzantine = {bad} takes {least} updates and has {len(holders)}; ask more "
            "devices (clients, quorum) or reckon with fewer bad ones"
        )
    distances = _squared_distances(updates, lengths, size)[np.ix_(holders, holders)]
    np.fill_diagonal(distances, math.inf)
    nearest = np.sort(distances, axis=1)[:, : len(holders) - bad - 2]
    ranked = np.argsort(nearest.sum(axis=1), kind="stable")
    kept = {holders[i] for i in ranked[: len(holders) - bad]}
    return weighted_mean(((v, 1) for i, (v, _) in enumerate(updates()) if i in kept), size)


def fewest_for_krum(byzantine: int) -> int:
    """Return how many updates krum needs: K >= 2 f + 3 (Blanchard et al. 2017)."""
    return 2 * byzantine + 3


def told(value: _Value | None, field: str) -> _Value:
    """Return a setting that a rule needs.

    Raises:
        InputError: If it was not given.
    """
    if value is None:
        raise InputError(f"the chosen aggregation rule needs {field}; give it a value")
    return value


def _lengths(updates: Updates, size: int) -> list[int]:
    """Return how many of the P entries each update has, in client order."""
    lengths = [vector.size for vector, _ in updates()]
    if not lengths:
        raise ValueError("no update; a rule needs at least one")
    if max(lengths) > size:
        raise ValueError(f"an update of {max(lengths)} entries; at most {size} are shared")
    return lengths


def _by_coordinate(updates: Updates, size: int, left_out: Callable[[int], int]) -> Vector:
    """Return the mean of what is left of each coordinate's sorted values. Shape (P,).

    Args:
        updates: Read once a block.
        size: P.
        left_out: Says of a number of holders how many values are left out at each end.
    """
    result = np.zeros(size, np.float32)
    for start, block in _blocks(updates, _lengths(updates, size), 4):
        block.sort(axis=0)
        out = left_out(len(block))
        middle = block[out : len(block) - out]  # (N - 2 out, W)
        total = np.zeros(block.shape[1], np.float64)
        for row in middle:  # in the order of size: the same bits in any order of the clients
            total += row
        result[start : start + len(total)] = total / len(middle)
    return result


def _squared_distances(updates: Updates, lengths: list[int], size: int) -> Floats:
    """Return the squared distances of all pairs, by the Gram matrix of each block. Shape (K, K)."""
    count = len(lengths)
    distances, shared = np.zeros((count, count)), np.zeros((count, count))
    for start, block in _blocks(updates, lengths, 12):
        wide = block.astype(np.float64)
        gram = wide @ wide.T  # (N, N)
        own = np.diag(gram)
        holders = np.ix_(*[[i for i, length in enumerate(lengths) if length > start]] * 2)
        # two nearly equal updates may come out a rounding below zero
        distances[holders] += np.maximum(own[:, None] + own[None, :] - 2 * gram, 0.0)
        shared[holders] += block.shape[1]
    return np.asarray(distances * size / np.maximum(shared, 1.0))


def _blocks(
    updates: Updates, lengths: list[int], entry_bytes: int
) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
    """Yield (first coordinate, values): blocks of what the same devices hold, in client order.

    Args:
        updates: Read once a block.
        lengths: Of the updates.
        entry_bytes: That the caller holds of each value, at most ``BLOCK_BYTES`` in all.
    """
    edges = sorted({0, *lengths})
    for low, high in itertools.pairwise(edges):
        holders = sum(length >= high for length in lengths)
        width = max(1, BLOCK_BYTES // (entry_bytes * holders))
        for start in range(low, high, width):
            stop = min(start + width, high)
            block = np.empty((holders, stop - start), np.float32)
            row = 0
            for vector, _ in updates():
                if vector.size >= high:
                    block[row] = vector[start:stop]
                    row += 1
            yield start, block
