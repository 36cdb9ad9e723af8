"""The command ``simulate``: a fleet in virtual time, without training."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import click
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from cloud_aggregator.progress import human_bytes, percent, say
from cloud_aggregator.run_folder import write_atomically
from cloud_aggregator.simulation.engine import simulate as run_simulation
from cloud_aggregator.simulation.result import PARTS, Result, RoundRow
from cloud_aggregator.simulation.settings import Mode, Selection, Trace, load_simulation

_SHOWN = 12  # rows of the table: the first and the last half of them


def _names(choice: Any) -> str:
    return "|".join(get_args(choice))


@click.command()
@click.argument("file", required=False, metavar="[FILE.toml]", type=click.Path(path_type=Path))
@click.option("--mode", metavar=_names(Mode), help="When updates are aggregated (synchronous).")
@click.option("--devices", type=int, metavar="N", help="In the fleet (default 1000).")
@click.option("--cohort", type=int, metavar="N", help="At work at a time (default 100).")
@click.option("--rounds", type=int, metavar="N", help="Of them, or aggregations (default 20).")
@click.option("--fleet", metavar="FILE|NAME", help="Mix of device profiles (default mixed).")
@click.option("--selection", metavar=_names(Selection), help="Who is asked (uniform).")
@click.option("--availability", metavar=_names(Trace), help="When devices are there (always).")
@click.option("--quorum", type=float, metavar="X", help="Share that ends a round (default 1).")
@click.option("--deadline-seconds", type=float, metavar="S", help="Of a round (default none).")
@click.option("--over-selection", type=float, metavar="X", help="Asked for one needed (1).")
@click.option("--buffer-size", type=int, metavar="N", help="Of fedbuff (cohort / 10).")
@click.option("--seed", type=int, metavar="N", help="Same seed, same result (default 0).")
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR", help="Write the result.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def simulate(*, file: Path | None, out: Path | None, as_json: bool, **options: Any) -> None:
    """Simulate rounds of a large fleet in virtual time, without training; all figures are modelled.

    FILE.toml may have every setting (docs/simulation.md); options win over it. DIR gets
    simulation.json and rounds.csv.
    """
    given = {key: value for key, value in options.items() if value is not None}
    settings = load_simulation(file, given)
    console = Console(stderr=True)
    columns = (TextColumn("rounds"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("rounds", total=settings.rounds)

        def told(event: str, **_fields: Any) -> None:
            if event == "row":
                progress.advance(task)

        result = run_simulation(settings, told)
    if out is not None:
        write_atomically(out / "simulation.json", result.to_json().encode() + b"\n")
        write_atomically(out / "rounds.csv", result.to_csv().encode())
    if as_json:
        click.echo(result.to_json())
        return
    shown = Console()
    shown.print(_table(result))
    for line in _sentences(result):
        say(shown, line)
    if out is not None:
        say(shown, f"Written: {out / 'simulation.json'} and {out / 'rounds.csv'}")


def _table(result: Result) -> Table:
    """Return the first and the last rounds."""
    settings = result.settings
    table = Table(
        title=f"{settings.mode}, {settings.devices:,} devices, {settings.selection}, "
        f"{settings.availability} (modelled)",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    headings = ("round", "at, h", "s", "asked", "accepted", "late", "lost", "stale", "kJ", "up")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    rows = result.rounds
    half = _SHOWN // 2
    for place, row in enumerate(rows):
        if len(rows) <= _SHOWN or not half <= place < len(rows) - half:
            table.add_row(*_cells(row))
        elif place == half:
            table.add_row(*["..."] * len(headings))
    return table


def _cells(row: RoundRow) -> list[str]:
    return [
        str(row.number),
        f"{row.ended_at / 3600:.2f}",
        f"{row.seconds:.1f}",
        str(row.asked),
        str(row.accepted),
        str(row.late),
        str(row.lost),
        f"{row.mean_staleness:.2f}",
        f"{row.total_joules / 1e3:.1f}",
        human_bytes(row.bytes_up),
    ]


def _sentences(result: Result) -> list[str]:
    """Return what all rounds come to, in words."""
    totals, fair = result.totals(), result.fairness
    joules = ", ".join(f"{part} {totals['joules'][part] / 1e3:.1f}" for part in PARTS)
    lines = [
        f"Virtual time {totals['seconds'] / 3600:.2f} h; asked {totals['asked']:,}, accepted "
        f"{totals['accepted']:,}, late {totals['late']:,}, lost {totals['lost']:,}"
        + (f", still at work {result.unfinished:,}." if result.unfinished else "."),
        f"Energy {totals['total_joules'] / 1e3:.1f} kJ, modelled: {joules}.",
    ]
    if fair.jain_participations is not None:
        lines.append(
            f"Fairness (Jain, 1 is even): participations {fair.jain_participations:.3f}, rates "
            f"{fair.jain_rates or 0:.3f}; the worst tenth took part "
            f"{fair.worst_decile_participations or 0:.2f} times the mean; never: "
            f"{percent(fair.never)} of the devices."
        )
    return lines
