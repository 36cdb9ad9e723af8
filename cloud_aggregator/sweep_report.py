"""What a sweep came to: mean and spread of every figure over the seeds, and paired differences.

A difference is taken seed by seed from the first setting, where both have a run of that seed. When
it counts is what ``reproduce.differences`` says.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table

from cloud_aggregator.records import RunRecord, modelled_seconds
from cloud_aggregator.reports.build import build_comparison
from cloud_aggregator.reproduce.differences import Difference, difference, values
from cloud_aggregator.reproduce.folder import folder_of
from cloud_aggregator.reproduce.words import mean_and_spread, signed
from cloud_aggregator.run_folder import read_record, write_atomically
from cloud_aggregator.sweep import SweptRun

#: What a sweep without an axis calls its one setting.
_AS_IT_IS = "as it is"


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One figure of a run: its name for a table, with its unit, and for a file."""

    title: str
    name: str
    of: Callable[[RunRecord], float | None]
    digits: int = 2


def _points(share: float | None) -> float | None:
    return None if share is None else 100 * share


MEASURES = (
    Measure(title="accuracy, %", name="eval_accuracy_percent",
            of=lambda run: _points(run.summary.eval_accuracy_after)),
    Measure(title="worst client, %", name="worst_client_accuracy_percent",
            of=lambda run: _points(run.summary.worst_client_accuracy)),
    Measure(title="loss, nats", name="eval_loss_nats", digits=3,
            of=lambda run: run.summary.eval_loss_after),
    Measure(title="pair accuracy, %", name="reward_accuracy_percent",
            of=lambda run: _points(run.summary.reward_accuracy_after)),
    Measure(title="weighted reward", name="weighted_reward", digits=3,
            of=lambda run: run.summary.weighted_reward_after),
    Measure(title="MB up", name="upload_megabytes",
            of=lambda run: run.summary.upload_bytes_total / 1e6),
    Measure(title="uplink, s", name="mean_uplink_seconds",
            of=lambda run: run.summary.mean_uplink_seconds),
    Measure(title="radiated, J", name="mean_uplink_joules",
            of=lambda run: run.summary.mean_uplink_joules),
    Measure(title="modelled time, s", name="virtual_seconds", digits=1,
            of=lambda run: modelled_seconds(run.rounds)),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Row:
    """One setting: a cell a measure, of its values over the seeds and of its differences."""

    setting: str
    seeds: int
    figures: tuple[str, ...]
    differences: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Swept:
    """What the page and the console show: only measures that some run has."""

    first: str
    measures: tuple[Measure, ...]
    rows: tuple[Row, ...]


def read_runs(out: Path, runs: Sequence[SweptRun]) -> dict[str, dict[int, RunRecord]]:
    """Return the records of a sweep's runs by setting, then by seed.

    Raises:
        InputError: If one is missing or damaged.
    """
    found: dict[str, dict[int, RunRecord]] = {}
    for run in runs:
        record = read_record(folder_of(out, run).path)
        found.setdefault(run.setting or _AS_IT_IS, {})[run.experiment.seed] = record
    return found


def tabulate(found: Mapping[str, Mapping[int, RunRecord]]) -> Swept:
    """Return mean, spread and differences of every measure."""
    there = tuple(m for m in MEASURES if any(values(found, s, m.of) for s in found))
    first = next(iter(found))
    rows = tuple(
        Row(
            setting=setting,
            seeds=len(by_seed),
            figures=tuple(
                mean_and_spread([*values(found, setting, m.of).values()], m.digits) for m in there
            ),
            differences=()
            if setting == first
            else tuple(
                difference_text(difference(found, setting, first, m.of), m.digits) for m in there
            ),
        )
        for setting, by_seed in found.items()
    )
    return Swept(first=first, measures=there, rows=rows)


def difference_text(found: Difference | None, digits: int) -> str:
    """Return a paired difference: mean, spread, and ``*`` where it counts; a dash without pairs."""
    if found is None:
        return "-"
    text = signed(found.mean, digits)
    if len(found.values) > 1:
        text += f" ± {found.spread:.{digits}f}"
    return f"{text} *" if found.sign in ("more", "less") else text


def table(swept: Swept) -> list[Table]:
    """Return what ends a sweep on a console: the figures, and the differences if there are any."""
    figures = _table("Mean ± spread over the seeds", swept)
    for row in swept.rows:
        figures.add_row(row.setting, str(row.seeds), *row.figures)
    if len(swept.rows) == 1:
        return [figures]
    apart = _table(f"Difference from {swept.first}, seed by seed (* counts)", swept)
    for row in swept.rows[1:]:
        apart.add_row(row.setting, str(row.seeds), *row.differences)
    return [figures, apart]


def _table(title: str, swept: Swept) -> Table:
    made = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    made.add_column("setting")
    for head in ("seeds", *(m.title for m in swept.measures)):
        made.add_column(head, justify="right")
    return made


def write_outputs(out: Path, runs: Sequence[SweptRun]) -> tuple[Swept, Path]:
    """Write ``comparison.html`` and ``sweep.csv``; return the table, and where the page is.

    Raises:
        InputError: If a record or the folder is not usable.
        DiskFullError: If there is no room.
    """
    found = read_runs(out, runs)
    swept = tabulate(found)
    named = [(run.name, found[run.setting or _AS_IT_IS][run.experiment.seed]) for run in runs]
    page = out / "comparison.html"
    content = build_comparison(named, template="sweep.html.jinja", swept=swept)
    write_atomically(page, content.encode())
    write_atomically(out / "sweep.csv", _csv(found).encode())
    return swept, page


def _csv(found: Mapping[str, Mapping[int, RunRecord]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["setting", "seed", *(m.name for m in MEASURES)])
    for setting, by_seed in found.items():
        for seed, record in by_seed.items():
            writer.writerow([setting, seed, *(m.of(record) for m in MEASURES)])
    return text.getvalue()
