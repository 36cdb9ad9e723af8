"""Writes what a comparison leaves: ``fig4.svg``, ``fig4.png``, ``fig4.csv`` and ``fig4.md``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from cloud_aggregator.reproduce.differences import final_points, values
from cloud_aggregator.reproduce.document import Judged, document, judged
from cloud_aggregator.reproduce.fig4 import PlannedRun
from cloud_aggregator.reproduce.folder import Comparison
from cloud_aggregator.reproduce.gather import Gathered, gather, read_records
from cloud_aggregator.reproduce.tables import csv_text
from cloud_aggregator.run_folder import write_atomically
from device_profiles.errors import InputError


def write(out: Path, comparison: Comparison, runs: Sequence[PlannedRun]) -> list[Judged]:
    """Write the four files from the runs that are there, and return what they say.

    Raises:
        InputError: If no run is done, or a record is damaged or of another base or data set.
        DiskFullError: If there is no room.
    """
    from cloud_aggregator.reproduce import figure

    settings = comparison.settings
    records = read_records(runs, out)
    experiments = gather(settings, comparison.width, runs, records)
    if not any(experiment.runs for experiment in experiments):
        raise InputError(
            f"none of the {len(runs)} runs of {out} is done; leave --render-only out to do them"
        )
    found = [judged(experiment) for experiment in experiments]
    drawn = figure.draw(experiments, quick=settings.quick)
    for name, content in (
        ("fig4.svg", figure.svg(drawn)),
        ("fig4.png", figure.png(drawn)),
        ("fig4.csv", csv_text(experiments, quick=settings.quick).encode()),
        ("fig4.md", document(settings, found, runs, records, out).encode()),
    ):
        write_atomically(out / name, content)
    return found


def as_json(out: Path, comparison: Comparison, found: Sequence[Judged]) -> dict[str, Any]:
    """Return what a script reads: claims with verdicts, and means over the seeds."""
    return {
        "out": str(out),
        "quick": comparison.settings.quick,
        "evidence": not comparison.settings.quick,
        "experiments": {
            experiment.gathered.name: {
                "learning": experiment.gathered.learning,
                "priced": experiment.gathered.priced,
                "missing": list(experiment.gathered.missing),
                "methods": _means(experiment.gathered),
                "claims": [
                    {"claim": c.text, "verdict": c.verdict, "sentence": c.sentence}
                    for c in experiment.claims
                ],
            }
            for experiment in found
        },
    }


def _means(gathered: Gathered) -> dict[str, Any]:
    found = {}
    for method, by_seed in gathered.runs.items():
        points = values(gathered.runs, method, final_points)
        mine = by_seed.values()
        found[method] = {
            "seeds": sorted(by_seed),
            "accuracy": fmean(points.values()) / 100 if points else None,
            "uplink_bits": fmean(run.mean(lambda r: r.uplink_bits) for run in mine),
            "uplink_seconds": fmean(run.mean(lambda r: r.uplink_seconds) for run in mine),
            "uplink_joules": fmean(run.mean(lambda r: r.uplink_joules) for run in mine),
            "compute_joules": fmean(run.mean(lambda r: r.compute_joules) for run in mine),
        }
    return found
