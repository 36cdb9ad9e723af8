"""The front: what the judge says of the same clients at each weight, and how it goes with it.

Rewards in deviations of the judge's scores. Clients count alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy as np
import numpy.typing as npt

from cloud_aggregator.records import RunRecord
from cloud_aggregator.reproduce.fig4 import PlannedRun
from cloud_aggregator.reproduce.fig5.gather import Point, reward_run, what_lacks
from cloud_aggregator.reproduce.judge_records import judged_run
from device_profiles.methods import OBJECTIVES, Objective

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class FrontPoint:
    """One run: all clients at one weight.

    Attributes:
        weight: Of helpfulness.
        point: Where alignment ended, the mean over the clients.
        clients: Each client's rewards by objective there.
    """

    seed: int
    weight: float
    point: Point
    clients: Mapping[str, Mapping[Objective, float]]

    def of(self, objective: Objective) -> float:
        """Return the mean reward of an objective."""
        found: float = getattr(self.point, objective)
        return found


@dataclass(frozen=True, kw_only=True)
class Correlation:
    """Spearman's rank correlation between the weight of helpfulness and one reward.

    Attributes:
        pooled: Over all runs, each seed's rewards less their mean; none if a side does not vary.
        points: Of it.
        clients: How many clients have the sign that is wanted: up with the weight for helpfulness,
            down for harmlessness.
        all_clients: Of so many, one a client and seed.
        mean: Of the clients' own; none if none varies.
        weights: Points of each client's own.
    """

    pooled: float | None
    points: int
    clients: int
    all_clients: int
    mean: float | None
    weights: int


def gather(
    runs: Sequence[PlannedRun], records: Mapping[str, RunRecord], out: Path
) -> tuple[list[FrontPoint], list[str]]:
    """Return the points of the runs that are done and judged, and a sentence for each other run.

    Raises:
        InputError: If what the judge said of a run is damaged.
    """
    points, missing = [], []
    for run in runs:
        why, said = what_lacks(run, records.get(run.name)), judged_run(out, run)
        if why or said is None:
            missing.append(f"{run.words}: {why or 'not judged'}")
            continue
        points.append(
            FrontPoint(
                seed=run.experiment.seed,
                weight=run.experiment.preference or 0.0,
                point=reward_run(records[run.name], said).final,
                clients={
                    c.id: {"helpfulness": c.helpfulness, "harmlessness": c.harmlessness}
                    for c in said.moments[-1].clients
                },
            )
        )
    return points, missing


def correlations(points: Sequence[FrontPoint]) -> dict[Objective, Correlation]:
    """Return how each reward goes with the weight."""
    return {name: _correlation(points, name) for name in OBJECTIVES}


def by_weight(points: Sequence[FrontPoint]) -> dict[float, list[FrontPoint]]:
    """Return the points of every seed at each weight, from 0 to 1."""
    weights = sorted({p.weight for p in points})
    return {w: sorted((p for p in points if p.weight == w), key=lambda p: p.seed) for w in weights}


def on_front(points: Sequence[FrontPoint]) -> list[float]:
    """Return the weights whose means over the seeds no other weight beats in both rewards."""
    means = {
        weight: tuple(fmean(p.of(name) for p in own) for name in OBJECTIVES)
        for weight, own in by_weight(points).items()
    }
    return [
        weight
        for weight, mine in means.items()
        if not any(
            other != mine and all(o >= m for o, m in zip(other, mine, strict=True))
            for other in means.values()
        )
    ]


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Return Spearman's rank correlation; equal values share their mean rank.

    None where there are fewer than two points, or a side does not vary.
    """
    a, b = (ranks(values) for values in (first, second))
    a, b = a - a.mean(), b - b.mean()
    size = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / size if len(a) > 1 and size > 0 else None


def ranks(values: Sequence[float]) -> Floats:
    """Return each value's rank from 1; equal values share their mean rank. Shape (N,)."""
    array = np.asarray(values, np.float64)
    below = (array[None, :] < array[:, None]).sum(1)
    same = (array[None, :] == array[:, None]).sum(1)
    found: Floats = below + (same + 1) / 2
    return found


def _correlation(points: Sequence[FrontPoint], name: Objective) -> Correlation:
    weights: list[float] = []
    rewards: list[float] = []
    own: list[float | None] = []
    most = 0
    for seed in sorted({p.seed for p in points}):
        mine = [p for p in points if p.seed == seed]
        middle = fmean(p.of(name) for p in mine)
        weights += [p.weight for p in mine]
        rewards += [p.of(name) - middle for p in mine]
        most = max(most, len(mine))
        for client in mine[0].clients:
            there = [p for p in mine if client in p.clients]
            own.append(
                rank_correlation(
                    [p.weight for p in there], [p.clients[client][name] for p in there]
                )
            )
    wanted = 1 if name == "helpfulness" else -1
    known = [value for value in own if value is not None]
    return Correlation(
        pooled=rank_correlation(weights, rewards),
        points=len(weights),
        clients=sum(value * wanted > 0 for value in known),
        all_clients=len(own),
        mean=fmean(known) if known else None,
        weights=most,
    )
