"""The comparison as tables: ``fig5.csv``, a row a round of alignment, and those of ``fig5.md``."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from io import StringIO
from statistics import fmean

from cloud_aggregator.reproduce.differences import difference
from cloud_aggregator.reproduce.fig4 import OURS
from cloud_aggregator.reproduce.fig5.claims import final
from cloud_aggregator.reproduce.fig5.gather import Gathered, RewardRun, RewardRuns
from cloud_aggregator.reproduce.judge_records import JudgeRecord
from cloud_aggregator.reproduce.words import NONE, amount, mean_and_spread, mean_of_each

COLUMNS = (
    "experiment", "method", "seed", "alignment_round", "reward", "helpfulness", "harmlessness",
    "kl", "response_tokens", "responses_ended", "uplink_joules_mean", "uplink_joules_run",
    "evidence",
)  # fmt: skip
_HEADINGS = (
    "method", "reward", "minus pwff (each seed)", "rise by alignment", "helpfulness",
    "harmlessness", "clients that rose", "KL, nats", "tokens", "ended, %", "uplink, J a round",
    "uplink, J a run",
)  # fmt: skip


def csv_text(experiments: Sequence[Gathered], *, quick: bool) -> str:
    """Return one row for each experiment, method, seed and round of alignment; 0 is before.

    Rewards in deviations of the judge's scores, KL in nats, shares in [0, 1], joules a client. What
    was not measured is empty. ``evidence`` is ``none (quick)`` for a quick comparison.
    """
    written = StringIO()
    table = csv.writer(written, lineterminator="\n")
    table.writerow(COLUMNS)
    evidence = "none (quick)" if quick else "full"
    for experiment in experiments:
        for by_seed in experiment.runs.values():
            for run in (by_seed[seed] for seed in sorted(by_seed)):
                for number, p in enumerate(run.points):
                    if p is None:
                        continue
                    row = [
                        experiment.name, run.method, run.seed, number, p.reward, p.helpfulness,
                        p.harmlessness, p.kl, p.tokens, p.ended, run.uplink_joules,
                        run.total_joules, evidence,
                    ]  # fmt: skip
                    table.writerow(["" if cell is None else cell for cell in row])
    return written.getvalue()


def markdown_table(runs: RewardRuns) -> str:
    """Return one row a method: means over the seeds, and what is different in each seed."""
    return as_table(_HEADINGS, [_cells(runs, method) for method in runs])


def judge_table(judge: JudgeRecord) -> str:
    """Return what the judge is worth, one row an objective."""
    headings = (
        "objective", "pairs of the runs", "pairs that it learned from", "held-out pairs",
        "accuracy, %", "the longer one wins, %", "calibration error, %",
    )  # fmt: skip
    rows = [
        [
            name,
            str(judge.run_pairs[name]),
            str(head.learned_pairs),
            str(head.pairs),
            f"{100 * head.accuracy:.1f}",
            f"{100 * head.longer_wins:.1f}",
            f"{100 * head.calibration_error:.1f}",
        ]
        for name, head in judge.heads.items()
    ]
    return as_table(headings, rows)


def as_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _cells(runs: RewardRuns, method: str) -> list[str]:
    mine = [runs[method][seed] for seed in sorted(runs[method])]
    minus = None if method == OURS else difference(runs, method, OURS, final)
    kl = [run.final.kl for run in mine if run.final.kl is not None]
    rises = [run.final.reward - run.before.reward for run in mine if run.aligned]

    def over(of: Callable[[RewardRun], float], digits: int = 2) -> str:
        return mean_and_spread([of(run) for run in mine], digits)

    return [
        method,
        over(final),
        mean_of_each(minus.values) if minus else NONE,
        mean_of_each(rises) if rises else "not aligned",
        over(lambda run: run.final.helpfulness),
        over(lambda run: run.final.harmlessness),
        ", ".join(f"{run.risen} of {run.clients}" for run in mine if run.aligned) or NONE,
        mean_and_spread(kl),
        over(lambda run: run.final.tokens, 1),
        over(lambda run: 100 * run.final.ended, 0),
        amount(fmean(run.uplink_joules for run in mine)),
        amount(fmean(run.total_joules for run in mine)),
    ]
