"""The command ``reproduce``: the paper's comparisons, all methods, several seeds."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.logging import RichHandler

from cloud_aggregator.methods import METHODS
from cloud_aggregator.progress import say
from cloud_aggregator.reproduce import folder, runner
from cloud_aggregator.reproduce.document import Judged, summary
from cloud_aggregator.reproduce.fig4 import EXPERIMENTS, names_of, plan, seeds_of
from cloud_aggregator.reproduce.pareto.command import pareto
from cloud_aggregator.reproduce.rewards_command import fig5
from cloud_aggregator.reproduce.words import NO_EVIDENCE

_OUT, _QUICK_OUT = Path("runs/fig4"), Path("runs/fig4-quick")


@click.group()
def reproduce() -> None:
    """Run the paper's comparisons again (arXiv 2404.13238v2), and say which claims held."""


@reproduce.command()
@click.option("--out", type=click.Path(path_type=Path), help="Folder of it all (runs/fig4).")
@click.option("--seeds", metavar="N,N,N", help="Every method runs at each (0,1,2).")
@click.option("--rounds", metavar="N", help="Of every run (the experiments' 10).")
@click.option("--local-steps", metavar="N", help="A client and round (the experiments' 20).")
@click.option("--batch-size", metavar="N", help="Examples a step (the experiments' 4).")
@click.option("--model", metavar="mini|PATH|HUB_ID", help="The base that learns (mini).")
@click.option("--data", metavar="kit|alpaca|FILE", help="Instruction data (kit).")
@click.option(
    "--held-out-share",
    type=float,
    metavar="X",
    help="Of each client's rows (the experiments' 0.2).",
)
@click.option("--experiments", metavar="NAMES", help=f"Of {', '.join(EXPERIMENTS)} (both).")
@click.option("--methods", metavar="NAMES", help=f"Of {', '.join(METHODS)} (all).")
@click.option("--workers", type=int, metavar="N", help="Processes (one a core).")
@click.option("--transport", metavar="mqtt|memory", help="As in `pwff emulate` (mqtt).")
@click.option("--quick", is_flag=True, help="A look in a few minutes, which is no evidence.")
@click.option("--render-only", is_flag=True, help="Write the outputs from the runs in --out.")
@click.option("--json", "as_json", is_flag=True, help="Print claims and means as JSON at the end.")
def fig4(
    *,
    out: Path | None,
    workers: int | None,
    transport: str | None,
    quick: bool,
    render_only: bool,
    as_json: bool,
    **options: Any,
) -> int:
    """Compare PWFF with its baselines: accuracy, delay and energy, as in Fig. 4.

    Two experiments: paper-literal (LoRA rank 96) and paper-consistent (rank 8). Learning happens on
    a small base; delay and energy are modelled at the shape of GPT-2 small. Writes fig4.svg,
    fig4.png, fig4.csv and fig4.md. What is not given is taken from --out where it holds a
    comparison: a run that is done is not done again, and one that broke off goes on.
    """
    console = Console(stderr=as_json)
    # a live view is drawn around lines of its own console only
    beside = console if console.is_terminal else Console(stderr=True)
    logging.basicConfig(
        level=logging.WARNING,
        format="%(message)s",
        handlers=[RichHandler(console=beside, show_path=False)],
        force=True,
    )
    where = out or (_QUICK_OUT if quick else _OUT)
    comparison = folder.settle(where, _given(options), quick=quick, render_only=render_only)
    how = {"workers": workers, "transport": transport}
    settings = comparison.settings
    runs = plan(settings, comparison.width, {k: v for k, v in how.items() if v is not None})
    if settings.quick:
        say(console, NO_EVIDENCE)
    if not render_only:
        folder.keep(where, comparison)
        runner.carry_out(runs, where, console)

    from cloud_aggregator.reproduce import outputs

    found = outputs.write(where, comparison, runs)
    _close(console, where, found, quick=settings.quick)
    if as_json:
        click.echo(json.dumps(outputs.as_json(where, comparison, found)))
    return 0


reproduce.add_command(fig5)
reproduce.add_command(pareto)


def _given(options: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that were given, lists taken apart."""
    given: dict[str, Any] = {k: v for k, v in options.items() if v is not None}
    if "seeds" in given:
        given["seeds"] = seeds_of(given["seeds"])
    for option, kind, known in (
        ("experiments", "experiment", EXPERIMENTS),
        ("methods", "method", METHODS),
    ):
        if option in given:
            given[option] = names_of(f"--{option}", kind, given[option], known)
    return given


def _close(console: Console, out: Path, found: list[Judged], *, quick: bool) -> None:
    """Say which claims held, what is missing, and where everything is."""
    for experiment in found:
        gathered = experiment.gathered
        say(console, f"{gathered.name} ({gathered.learning}; {gathered.priced})")
        for missing in gathered.missing:
            say(console, f"  missing: {missing}")
        say(console, f"  {summary(experiment)}")
        for claim in experiment.claims:
            say(console, f"  {claim.verdict}: {claim.text}. {claim.sentence}")
    if quick:
        say(console, NO_EVIDENCE)
    say(console, f"Figure, table and text: {out / 'fig4.svg'}, fig4.png, fig4.csv, fig4.md")
