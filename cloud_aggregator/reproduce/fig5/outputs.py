"""Writes what the comparison leaves: ``fig5.svg``, ``fig5.png``, ``fig5.csv`` and ``fig5.md``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from cloud_aggregator.reproduce.fig4 import PlannedRun
from cloud_aggregator.reproduce.fig5.document import Judged, document, held
from cloud_aggregator.reproduce.fig5.gather import Gathered, gather
from cloud_aggregator.reproduce.fig5.plan import Comparison
from cloud_aggregator.reproduce.fig5.tables import csv_text
from cloud_aggregator.reproduce.gather import read_records
from cloud_aggregator.reproduce.judge_records import read_judge
from cloud_aggregator.run_folder import write_atomically
from device_profiles.errors import InputError


def write(out: Path, comparison: Comparison, runs: Sequence[PlannedRun]) -> list[Judged]:
    """Write the four files from the runs that are there, and return what they say.

    Raises:
        InputError: If no run is done and judged, or a record is damaged or of another base or data.
        DiskFullError: If there is no room.
    """
    from cloud_aggregator.reproduce import figure
    from cloud_aggregator.reproduce.fig5.figure import draw

    settings = comparison.settings
    records = read_records(runs, out)
    experiments = gather(settings, comparison.width, runs, records, out)
    judge = read_judge(out)
    if judge is None or not any(experiment.runs for experiment in experiments):
        raise InputError(
            f"none of the {len(runs)} runs of {out} is done and judged; leave --render-only out "
            "to do them"
        )
    found = [held(experiment) for experiment in experiments]
    drawn = draw(experiments, quick=settings.quick)
    text = document(settings, judge, experiments=found, runs=runs, records=records, out=out)
    for name, content in (
        ("fig5.svg", figure.svg(drawn)),
        ("fig5.png", figure.png(drawn)),
        ("fig5.csv", csv_text(experiments, quick=settings.quick).encode()),
        ("fig5.md", text.encode()),
    ):
        write_atomically(out / name, content)
    return found


def as_json(out: Path, comparison: Comparison, found: Sequence[Judged]) -> dict[str, Any]:
    """Return what a script reads: claims with verdicts, and means over the seeds."""
    judge = read_judge(out)
    return {
        "out": str(out),
        "quick": comparison.settings.quick,
        "evidence": not comparison.settings.quick,
        "judge": judge.model_dump(mode="json") if judge else None,
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
        mine = by_seed.values()
        found[method] = {
            "seeds": sorted(by_seed),
            "reward_before": fmean(run.before.reward for run in mine),
            "reward": fmean(run.final.reward for run in mine),
            "helpfulness": fmean(run.final.helpfulness for run in mine),
            "harmlessness": fmean(run.final.harmlessness for run in mine),
            "response_tokens": fmean(run.final.tokens for run in mine),
            "responses_ended": fmean(run.final.ended for run in mine),
            "uplink_joules": fmean(run.uplink_joules for run in mine),
            "uplink_joules_run": fmean(run.total_joules for run in mine),
        }
    return found
