"""What the page shows of the stages after instruction tuning, ready for its templates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cloud_aggregator.records import RunRecord
from cloud_aggregator.reports import stage_plots, stage_words
from cloud_aggregator.reports.canvas import Chart
from cloud_aggregator.reports.cost_plots import overlay
from cloud_aggregator.reports.round_lines import Lines
from cloud_aggregator.reports.series import Values, last_of
from cloud_aggregator.reports.stages import (
    FIGURES,
    OfPairs,
    aligned,
    dropped,
    objectives,
    of_pairs,
    of_responses,
    pair_accuracy,
    pair_rows,
    stage_run,
)

Runs = Sequence[tuple[str, RunRecord]]


@dataclass(frozen=True, kw_only=True)
class RoundOfAlignment:
    """A row of the table by round; ``dropped`` is a state that was taken back."""

    name: str
    figures: dict[str, float | None]
    why: str = ""
    dropped: bool = False


def reward_view(run: RunRecord) -> dict[str, Any]:
    """Return the section on reward learning, of a run of that stage alone."""
    return {
        "headline": stage_words.reward_headline(run),
        "charts": stage_plots.reward_learning(run),
        "by_objective": [
            (name.capitalize(), stage_plots.of_objective(run, name)) for name in objectives(run)
        ],
        "rows": pair_rows(run),
    }


def alignment_view(run: RunRecord) -> dict[str, Any]:
    """Return the section on alignment, of a run of that stage alone."""
    return {
        "headline": stage_words.alignment_headline(run),
        "taken_back": [stage_words.taken_back_text(r) for r in run.rounds if r.taken_back],
        "charts": stage_plots.alignment(run),
        "each": stage_plots.each_aligned(run),
        "rounds": _rounds(run),
        "clients": aligned(run),
        "kept": stage_plots.kept(run),
    }


def reward_views(runs: Runs) -> tuple[list[dict[str, Any]], list[Chart]]:
    """Return a row for each run that learned reward models, and their accuracies over rounds."""
    there = [(name, alone) for name, run in runs if (alone := stage_run(run, "reward"))]
    rows = []
    for name, run in there:
        accuracy, longer = run.summary.reward_accuracy_after, run.summary.longer_wins
        rows.append(
            {
                "name": name,
                "rounds": len(run.rounds),
                "before": pair_accuracy(run).mean[0],
                "accuracy": accuracy,
                "longer_wins": longer,
                "difference": None if accuracy is None or longer is None else accuracy - longer,
                "loss": _last(run, lambda figures: figures.loss),
                "calibration_error": _last(run, lambda figures: figures.calibration_error),
            }
        )
    pairs = [(name, pair_accuracy(run).mean) for name, run in there]
    return rows, [_over(pairs, stage_plots.PAIRS)] if there else []


def alignment_views(runs: Runs) -> tuple[list[dict[str, Any]], list[Chart]]:
    """Return a row for each run that was aligned; reward, KL and length over their rounds."""
    there = [(name, alone) for name, run in runs if (alone := stage_run(run, "alignment"))]
    rows = [
        {
            "name": name,
            "rounds": len(run.rounds),
            "clients": len(run.clients),
            "before": run.summary.weighted_reward_before,
            "after": run.summary.weighted_reward_after,
            "rewarded": run.summary.clients_rewarded,
            "kl": run.summary.kl_after,
            "figures": {name: last_of(of_responses(run, name).mean) for name in FIGURES},
            "accuracy_before": run.summary.eval_accuracy_before,
            "accuracy_after": run.summary.eval_accuracy_after,
            "taken_back": ", ".join(
                f"{r.round}: {r.taken_back}" for r in run.rounds if r.taken_back
            ),
        }
        for name, run in there
    ]
    charts = [
        _over([(name, of_responses(run, figure).mean) for name, run in there], lines)
        for figure, lines in list(stage_plots.REWARDS.items())[:3]
    ]
    return rows, charts if there else []


def _over(runs: Sequence[tuple[str, Values]], shown: Lines) -> Chart:
    places = [[float(n) for n in range(len(values))] for _, values in runs]
    return overlay(runs, places=places, axis="rounds of the stage", shown=shown)


def _last(run: RunRecord, of: OfPairs) -> float | None:
    """Return a figure of all reward models after the last round that measured it."""
    return last_of(of_pairs(run, objectives(run), of).mean)


def _rounds(run: RunRecord) -> list[RoundOfAlignment]:
    means = {name: of_responses(run, name).mean for name in FIGURES}
    gone = {name: dropped(run, name) for name in FIGURES}
    rows = [
        RoundOfAlignment(name="before", figures={name: mean[0] for name, mean in means.items()})
    ]
    for place, record in enumerate(run.rounds, 1):
        if record.dropped is not None:
            rows.append(
                RoundOfAlignment(
                    name=f"{record.round}, dropped",
                    figures={name: found.get(record.round) for name, found in gone.items()},
                    why=record.taken_back,
                    dropped=True,
                )
            )
        rows.append(
            RoundOfAlignment(
                name=f"{record.round}{', as before it' if record.taken_back else ''}",
                figures={name: mean[place] for name, mean in means.items()},
                why=record.taken_back,
            )
        )
    return rows
