"""The comparison as tables: ``fig4.csv``, a row a round, and the table of ``fig4.md``."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Sequence
from io import StringIO
from statistics import fmean

from cloud_aggregator.reproduce.differences import accuracy_difference, final_points, values
from cloud_aggregator.reproduce.fig4 import CONTROL, OURS
from cloud_aggregator.reproduce.gather import Gathered, RoundFigures, RunFigures, Runs
from cloud_aggregator.reproduce.words import NONE, amount, mean_and_spread, mean_of_each

COLUMNS = (
    "experiment", "method", "seed", "round", "accuracy", "loss", "worst_client_accuracy",
    "uplink_bits_mean", "uplink_seconds_mean", "uplink_joules_mean", "compute_joules_mean",
    "evidence",
)  # fmt: skip
_HEADINGS = (
    "method",
    "accuracy, %",
    "minus pwff, points (each seed)",
    "minus local-only, points (each seed)",
    "worst client, %",
    "loss, nats",
    "Mbit up",
    "uplink, s",
    "uplink, J",
    "pwff saves, %",
    "compute, J",
    "rounds to local-only's",
)


def csv_text(experiments: Sequence[Gathered], *, quick: bool) -> str:
    """Return one row for each experiment, method, seed and round; round 0 is before the first.

    Shares in [0, 1], nats, bits, seconds, joules; what was not measured, and the costs of round 0,
    are empty. ``evidence`` is ``none (quick)`` for a quick comparison.
    """
    written = StringIO()
    table = csv.writer(written, lineterminator="\n")
    table.writerow(COLUMNS)
    evidence = "none (quick)" if quick else "full"
    for experiment in experiments:
        for run in _in_order(experiment.runs):
            for number, cells in enumerate(_rounds(run)):
                row = [experiment.name, run.method, run.seed, number, *cells, evidence]
                table.writerow(["" if cell is None else cell for cell in row])
    return written.getvalue()


def markdown_table(runs: Runs) -> str:
    """Return one row a method: means over the seeds, and what is different in each seed."""
    lines = [_line(_HEADINGS), _line(["---"] * len(_HEADINGS))]
    lines += [_line(_cells(runs, method)) for method in runs]
    return "\n".join(lines)


def _cells(runs: Runs, method: str) -> list[str]:
    mine = [runs[method][seed] for seed in sorted(runs[method])]
    joules = _cost(mine, lambda r: r.uplink_joules)
    return [
        method,
        mean_and_spread(_known(final_points(run) for run in mine)),
        _minus(runs, method, OURS),
        _minus(runs, method, CONTROL),
        mean_and_spread(_known(_percent(run.rounds[-1].worst) for run in mine)),
        mean_and_spread(_known(run.rounds[-1].loss for run in mine), 4),
        amount(_cost(mine, lambda r: r.uplink_bits) / 1e6),
        amount(_cost(mine, lambda r: r.uplink_seconds)),
        amount(joules),
        _saving(runs, method, joules),
        amount(_cost(mine, lambda r: r.compute_joules)),
        _rounds_to_control(runs, method),
    ]


def _minus(runs: Runs, method: str, other: str) -> str:
    found = None if method == other else accuracy_difference(runs, method, other)
    return mean_of_each(found.values) if found else NONE


def _saving(runs: Runs, method: str, joules: float) -> str:
    if method == OURS or OURS not in runs or not joules:
        return NONE
    ours = _cost(list(runs[OURS].values()), lambda r: r.uplink_joules)
    return f"{100 * (1 - ours / joules):.1f}".replace("-", "\u2212")


def _rounds_to_control(runs: Runs, method: str) -> str:
    """Return, seed by seed, the first round with the accuracy at which training alone ends."""
    targets = values(runs, CONTROL, lambda run: run.final)
    seeds = [seed for seed in sorted(runs[method]) if seed in targets]
    if method == CONTROL or not seeds:
        return NONE
    reached = [runs[method][seed].reaches(targets[seed]) for seed in seeds]
    return ", ".join("never" if number is None else str(number) for number in reached)


def _rounds(run: RunFigures) -> Iterator[tuple[float | None, ...]]:
    yield (*run.before, None, None, None, None, None)
    for r in run.rounds:
        yield (
            r.accuracy, r.loss, r.worst, r.uplink_bits, r.uplink_seconds, r.uplink_joules,
            r.compute_joules,
        )  # fmt: skip


def _in_order(runs: Runs) -> Iterator[RunFigures]:
    for by_seed in runs.values():
        yield from (by_seed[seed] for seed in sorted(by_seed))


def _cost(runs: Sequence[RunFigures], of: Callable[[RoundFigures], float]) -> float:
    return fmean(run.mean(of) for run in runs)


def _known(found: Iterator[float | None]) -> list[float]:
    return [value for value in found if value is not None]


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
