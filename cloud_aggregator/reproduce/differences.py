"""The difference of two methods over the seeds, when it counts, and how a sentence says it.

A difference is taken per seed, where both methods have the same clients, data and channels. It
counts where it has the same sign in every seed and its mean is larger than its standard deviation
over the seeds; one seed decides nothing. That is no significance test.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

from cloud_aggregator.reproduce.gather import RunFigures, Runs
from cloud_aggregator.reproduce.words import counted, named, signed

Sign = Literal["more", "less", "none", "unknown"]
Run = TypeVar("Run")


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Ours minus theirs, one value a seed."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return statistics.fmean(self.values)

    @property
    def spread(self) -> float:
        """Sample standard deviation over the seeds, of which there are at least two."""
        return statistics.stdev(self.values)

    @property
    def sign(self) -> Sign:
        """Whether ours is more or less; ``none`` within the spread, ``unknown`` below two seeds."""
        if len(self.values) < 2:
            return "unknown"
        same = all(v > 0 for v in self.values) or all(v < 0 for v in self.values)
        if not same or abs(self.mean) <= self.spread:
            return "none"
        return "more" if self.mean > 0 else "less"

    def times(self, *, above: bool) -> str:
        """Return in how many seeds it is above (or below) zero: ``2 of 3 seeds``."""
        number = sum(v > 0 if above else v < 0 for v in self.values)
        return f"{number} of {counted(len(self.values), 'seed')}"


def difference(
    runs: Mapping[str, Mapping[int, Run]],
    ours: str,
    theirs: str,
    of: Callable[[Run], float | None],
) -> Difference | None:
    """Return the difference of a value over the seeds that both methods have, or None."""
    a, b = values(runs, ours, of), values(runs, theirs, of)
    pairs = [a[seed] - b[seed] for seed in sorted(set(a) & set(b))]
    return Difference(values=tuple(pairs)) if pairs else None


def accuracy_difference(runs: Runs, ours: str, theirs: str) -> Difference | None:
    """Return the final accuracies' difference in percentage points, or None without a pair."""
    return difference(runs, ours, theirs, final_points)


def final_points(run: RunFigures) -> float | None:
    """Return a run's final accuracy in percent."""
    return None if run.final is None else 100 * run.final


def values(
    runs: Mapping[str, Mapping[int, Run]], method: str, of: Callable[[Run], float | None]
) -> dict[int, float]:
    """Return what is known of a value, by seed."""
    by_seed: Mapping[int, Run] = runs.get(method, {})
    return {seed: v for seed, run in by_seed.items() if (v := of(run)) is not None}


def points_phrase(method: str, d: Difference) -> str:
    """Return how far ours is from another method's accuracy, in percentage points."""
    if d.sign == "unknown":
        return f"{signed(d.mean)} points from {named(method)} in one seed"
    if d.sign == "none":
        return (
            f"no different from {named(method)} ({signed(d.mean)} points on average, "
            f"± {d.spread:.2f} over the seeds, ahead in {d.times(above=True)})"
        )
    above = d.sign == "more"
    word = "above" if above else "below"
    return f"{abs(d.mean):.2f} points {word} {named(method)} (in {d.times(above=above)})"


def rounds_phrase(method: str, d: Difference) -> str:
    """Return by how many rounds ours is faster than another method."""
    if d.sign == "unknown":
        return f"{signed(d.mean, 0)} rounds ahead of {named(method)} in one seed"
    if d.sign == "none":
        return (
            f"neither faster nor slower than {named(method)} ({signed(d.mean, 1)} rounds ahead on "
            f"average, ± {d.spread:.1f} over the seeds, ahead in {d.times(above=True)})"
        )
    faster = d.sign == "more"
    word = "faster" if faster else "slower"
    return f"{abs(d.mean):.1f} rounds {word} than {named(method)} (in {d.times(above=faster)})"
