"""Writes what the front leaves: ``pareto.svg``, ``pareto.png``, ``pareto.csv``, ``pareto.md``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cloud_aggregator.reproduce.fig4 import PlannedRun, learning_rank, priced_rank
from cloud_aggregator.reproduce.gather import read_records
from cloud_aggregator.reproduce.judge_records import read_judge
from cloud_aggregator.reproduce.pareto.document import csv_text, document
from cloud_aggregator.reproduce.pareto.gather import (
    FrontPoint,
    correlations,
    gather,
    on_front,
)
from cloud_aggregator.reproduce.pareto.plan import Front
from cloud_aggregator.reproduce.words import learning_label
from cloud_aggregator.run_folder import write_atomically
from device_profiles.errors import InputError


def write(out: Path, front: Front, runs: Sequence[PlannedRun]) -> list[FrontPoint]:
    """Write the four files from the runs that are there, and return their points.

    Raises:
        InputError: If no run is done and judged, or a record is damaged or of another base or data.
        DiskFullError: If there is no room.
    """
    from cloud_aggregator.reproduce import figure
    from cloud_aggregator.reproduce.pareto.figure import draw

    settings = front.settings
    records = read_records(runs, out)
    points, missing = gather(runs, records, out)
    judge = read_judge(out)
    if judge is None or not points:
        raise InputError(
            f"none of the {len(runs)} runs of {out} is done and judged; leave --render-only out "
            "to do them"
        )
    base = next(record.model.name for record in records.values())
    learning = learning_label(base, learning_rank(priced_rank(settings.experiment), front.width))
    drawn = draw(points, learning, quick=settings.quick)
    text = document(
        settings,
        judge,
        points,
        missing=missing,
        learning=learning,
        runs=runs,
        records=records,
        out=out,
    )
    for name, content in (
        ("pareto.svg", figure.svg(drawn)),
        ("pareto.png", figure.png(drawn)),
        ("pareto.csv", csv_text(points, quick=settings.quick).encode()),
        ("pareto.md", text.encode()),
    ):
        write_atomically(out / name, content)
    return points


def as_json(out: Path, front: Front, points: Sequence[FrontPoint]) -> dict[str, Any]:
    """Return what a script reads: the points, the rank correlations and the front."""
    return {
        "out": str(out),
        "quick": front.settings.quick,
        "evidence": not front.settings.quick,
        "points": [
            {
                "seed": p.seed,
                "weight": p.weight,
                "helpfulness": p.point.helpfulness,
                "harmlessness": p.point.harmlessness,
                "kl": p.point.kl,
            }
            for p in points
        ],
        "correlations": {name: asdict(found) for name, found in correlations(points).items()},
        "front": on_front(points),
    }
