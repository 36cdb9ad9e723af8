"""``pareto.md`` and ``pareto.csv``: the front, the rank correlations, and how to repeat them."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path

from cloud_aggregator.records import RunRecord
from cloud_aggregator.reproduce.document import capital
from cloud_aggregator.reproduce.fig4 import PlannedRun
from cloud_aggregator.reproduce.fig5.document import (
    how_measured,
    judge_words,
    repeat_lines,
    shared_options,
)
from cloud_aggregator.reproduce.fig5.tables import as_table, judge_table
from cloud_aggregator.reproduce.judge_records import JudgeRecord
from cloud_aggregator.reproduce.pareto.gather import (
    Correlation,
    FrontPoint,
    by_weight,
    correlations,
    on_front,
)
from cloud_aggregator.reproduce.pareto.plan import Settings
from cloud_aggregator.reproduce.words import (
    NO_EVIDENCE,
    NONE,
    counted,
    joined,
    mean_and_spread,
    signed,
)
from device_profiles.methods import Objective

COLUMNS = (
    "seed", "weight_helpfulness", "helpfulness", "harmlessness", "kl", "response_tokens",
    "responses_ended", "evidence",
)  # fmt: skip
_HEADINGS = (
    "weight of helpfulness", "helpfulness", "harmlessness", "KL, nats", "tokens", "ended, %",
)  # fmt: skip
_DIRECTIONS = {"helpfulness": "rise", "harmlessness": "fall"}


def document(
    settings: Settings,
    judged_by: JudgeRecord,
    points: Sequence[FrontPoint],
    *,
    missing: Sequence[str],
    learning: str,
    runs: Sequence[PlannedRun],
    records: Mapping[str, RunRecord],
    out: Path,
) -> str:
    """Return the whole of ``pareto.md``."""
    parts = ["# Helpfulness against harmlessness, at each user's own weight"]
    if settings.quick:
        parts.append(f"> **{NO_EVIDENCE}**")
    parts.append("![The front of the two rewards; each reward over the weight](pareto.svg)")
    seeds = {p.seed for p in points}
    parts.append(f"{capital(learning)}. {counted(len(seeds), 'seed')}, every client at one weight.")
    if missing:
        parts.append(f"**Missing runs**: {'; '.join(missing)}.")
    parts += [front_table(points), "\n".join(f"- {text}" for text in sentences(points))]
    parts += ["## The judge", judge_table(judged_by), judge_words(judged_by)]
    parts += ["## How it was measured", how_measured("pareto")]
    repeat = repeat_lines(command(settings), settings, runs, records, out)
    parts += ["## How to repeat it", "\n".join(repeat)]
    return "\n\n".join(parts) + "\n"


def command(settings: Settings) -> str:
    """Return the command; model and data by their last name, without a path."""
    words = ["pwff", "reproduce", "pareto", *shared_options(settings)]
    words += ["--weights", ",".join(f"{weight:g}" for weight in settings.weights)]
    return " ".join([*words, "--experiment", settings.experiment])


def sentences(points: Sequence[FrontPoint]) -> list[str]:
    """Return what the points say: each rank correlation, and which weights are on the front."""
    said = [_sentence(name, found) for name, found in correlations(points).items()]
    there = on_front(points)
    weights = joined([f"{weight:g}" for weight in there])
    said.append(
        f"No other weight is better in both rewards than {weights} "
        f"({len(there)} of {counted(len(by_weight(points)), 'weight')}, means over the seeds)."
    )
    return said


def front_table(points: Sequence[FrontPoint]) -> str:
    """Return one row a weight: means over the seeds."""
    rows = []
    for weight, own in by_weight(points).items():
        kl = [p.point.kl for p in own if p.point.kl is not None]
        rows.append(
            [
                f"{weight:g}",
                mean_and_spread([p.point.helpfulness for p in own]),
                mean_and_spread([p.point.harmlessness for p in own]),
                mean_and_spread(kl),
                mean_and_spread([p.point.tokens for p in own], 1),
                mean_and_spread([100 * p.point.ended for p in own], 0),
            ]
        )
    return as_table(_HEADINGS, rows)


def csv_text(points: Sequence[FrontPoint], *, quick: bool) -> str:
    """Return one row for each seed and weight; ``evidence`` is ``none (quick)`` for a quick one."""
    written = StringIO()
    table = csv.writer(written, lineterminator="\n")
    table.writerow(COLUMNS)
    for p in sorted(points, key=lambda p: (p.seed, p.weight)):
        at = p.point
        row = [p.seed, p.weight, at.helpfulness, at.harmlessness, at.kl, at.tokens, at.ended]
        cells = ["" if cell is None else cell for cell in row]
        table.writerow([*cells, "none (quick)" if quick else "full"])
    return written.getvalue()


def _sentence(name: Objective, found: Correlation) -> str:
    pooled = NONE if found.pooled is None else signed(found.pooled)
    mean = NONE if found.mean is None else signed(found.mean)
    return (
        f"{capital(name)} should {_DIRECTIONS[name]} with the weight of helpfulness: Spearman's "
        f"rank correlation is {pooled} over {counted(found.points, 'point')} (means over the "
        f"clients, each seed's own level taken off); of the clients by themselves, "
        f"{found.clients} of {found.all_clients} have that sign, {mean} on average over "
        f"{counted(found.weights, 'weight')} each."
    )
