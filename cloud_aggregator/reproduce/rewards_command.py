"""The commands ``reproduce fig5`` and ``reproduce pareto``: runs of all stages under one judge."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click
from rich.console import Console
from rich.logging import RichHandler

from cloud_aggregator.progress import say
from cloud_aggregator.reproduce import folder, runner
from cloud_aggregator.reproduce.fig4 import EXPERIMENTS, PlannedRun, names_of, seeds_of
from cloud_aggregator.reproduce.fig5 import document
from cloud_aggregator.reproduce.fig5.plan import (
    ABLATIONS,
    FIG5,
    METHODS_OF_FIG5,
    RewardComparison,
    RewardSettings,
    per_stage,
    plan,
)
from cloud_aggregator.reproduce.words import NO_EVIDENCE
from device_profiles.errors import InputError

Command = TypeVar("Command", bound=Callable[..., Any])
Halved = TypeVar("Halved", bound=RewardComparison)

_METHODS = f"Of {', '.join(METHODS_OF_FIG5)} (all), {', '.join(ABLATIONS)}."
_OPTIONS = (
    click.option("--out", type=click.Path(path_type=Path), help="Folder of it all (runs/NAME)."),
    click.option("--seeds", metavar="N,N,N", help="Every run at each (0,1,2)."),
    click.option("--rounds", metavar="N,N,N", help="Of each stage (6,4,6)."),
    click.option("--local-steps", metavar="N,N,N", help="A round, of each stage (20,40,2)."),
    click.option("--batch-size", metavar="N", help="Examples a step (the experiments' 4)."),
    click.option("--rollouts", metavar="N", help="Responses a step of alignment (16)."),
    click.option("--max-new-tokens", metavar="N", help="Of a response (48)."),
    click.option("--held-out-prompts", metavar="N", help="A client is judged by, at most (16)."),
    click.option("--clients", metavar="N", help="Instead of the experiments' 10."),
    click.option("--model", metavar="mini|PATH|HUB_ID", help="The base that learns (mini)."),
    click.option("--data", metavar="kit|alpaca|FILE", help="Instruction data (kit)."),
    click.option("--helpfulness", metavar="kit|FILE|HUB_ID", help="Preference pairs (kit)."),
    click.option("--harmlessness", metavar="kit|FILE|HUB_ID", help="Preference pairs (kit)."),
    click.option("--held-out-share", type=float, metavar="X", help="Of each client's data (0.2)."),
    click.option("--workers", type=int, metavar="N", help="Processes (one a core)."),
    click.option("--transport", metavar="mqtt|memory", help="As in `pwff emulate` (mqtt)."),
    click.option("--quick", is_flag=True, help="A look in minutes, which is no evidence."),
    click.option("--render-only", is_flag=True, help="Write the outputs from the runs in --out."),
    click.option("--json", "as_json", is_flag=True, help="Print what was found as JSON."),
)


def reward_options(command: Command) -> Command:
    """Give a command the options of every reproduction with rewards."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


@click.command()
@reward_options
@click.option("--experiments", metavar="NAMES", help=f"Of {', '.join(EXPERIMENTS)} (both).")
@click.option("--methods", metavar="NAMES", help=_METHODS)
def fig5(
    *,
    out: Path | None,
    workers: int | None,
    transport: str | None,
    quick: bool,
    render_only: bool,
    as_json: bool,
    **options: Any,
) -> int:
    """Compare PWFF with its baselines after alignment: reward and energy, as in Fig. 5.

    Half of the preference pairs, by prompt, teach one judge, which scores every method; the runs
    have the other half. Writes fig5.svg, fig5.png, fig5.csv and fig5.md. What is not given is taken
    from --out where it holds a comparison: a run that is done and judged is not done again.
    """
    console = begin(as_json=as_json)
    where = out or Path("runs/fig5-quick" if quick else "runs/fig5")
    given = given_options(options)
    for option, kind, known in (
        ("experiments", "experiment", EXPERIMENTS),
        ("methods", "method", (*METHODS_OF_FIG5, *ABLATIONS)),
    ):
        if option in given:
            given[option] = names_of(f"--{option}", kind, given[option], known)
    comparison = folder.take_up(FIG5, where, given, quick=quick, render_only=render_only)
    settings = comparison.settings
    check_kept(FIG5, where, settings)
    if settings.quick:
        say(console, NO_EVIDENCE)
    doing = how(where, workers, transport)
    plan(settings, comparison.width, comparison.files, doing)  # refuses before anything is written
    if not render_only:
        comparison = divided(where, comparison)
    runs = plan(settings, comparison.width, comparison.files, doing)
    if not render_only:
        carry_out(runs, where, console, name="fig5", model=settings.model)

    from cloud_aggregator.reproduce.fig5 import outputs

    found = outputs.write(where, comparison, runs)
    _close(console, where, found, quick=settings.quick)
    if as_json:
        click.echo(json.dumps(outputs.as_json(where, comparison, found)))
    return 0


def begin(*, as_json: bool) -> Console:
    """Return the console of a command, with the log beside its view."""
    console = Console(stderr=as_json)
    beside = console if console.is_terminal else Console(stderr=True)
    logging.basicConfig(
        level=logging.WARNING,
        format="%(message)s",
        handlers=[RichHandler(console=beside, show_path=False)],
        force=True,
    )
    return console


def given_options(options: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that were given, lists taken apart.

    Raises:
        InputError: If a list is none.
    """
    given = {k: v for k, v in options.items() if v is not None}
    if "seeds" in given:
        given["seeds"] = seeds_of(given["seeds"])
    for name in ("rounds", "local_steps"):
        if name in given:
            given[name] = per_stage(f"--{name.replace('_', '-')}", given[name])
    return given


def how(out: Path, workers: int | None, transport: str | None) -> dict[str, Any]:
    """Return the settings that change nothing of the outcome, where they are given."""
    given = {"workers": workers, "transport": transport, "features": str(out / "features")}
    return {k: v for k, v in given.items() if v is not None}


def carry_out(
    runs: Sequence[PlannedRun], out: Path, console: Console, *, name: str, model: str
) -> None:
    """Teach the judge, and do and judge every run that is not done.

    Raises:
        StoppedError: If Ctrl-C or SIGTERM asked for it.
        InputError: If settings, data or folder are not usable.
        RunFailedError: If a run cannot go on.
    """
    from cloud_aggregator.emulation.emulate import require_edge
    from cloud_aggregator.reproduce import states
    from cloud_aggregator.reproduce.judge import Judge

    require_edge()
    judge = Judge(out, model)
    for objective, head in judge.record.heads.items():
        say(
            console,
            f"judge of {objective}: {100 * head.accuracy:.1f} % of {head.pairs} held-out pairs; "
            f"the longer one wins in {100 * head.longer_wins:.1f} %",
        )
    runner.carry_out(runs, out, console, name=name, watch=states.watch, after=judge.judge)


def check_kept(kind: folder.Kind[Halved], out: Path, settings: RewardSettings) -> None:
    """Refuse to change the rounds of a folder's runs: a stage that is over cannot be lengthened.

    Raises:
        InputError: Naming both.
    """
    if not (out / f"{kind.name}.toml").exists():
        return
    kept = folder.take_up(kind, out, {}).settings
    if kept.rounds != settings.rounds:
        then, now = (",".join(map(str, each.rounds)) for each in (kept, settings))
        raise InputError(
            f"--rounds {now}, and the runs in {out} are of {then}; name another --out for others"
        )


def divided(out: Path, comparison: Halved) -> Halved:
    """Return the comparison with the runs' half of the pairs; its folder has both halves then.

    Raises:
        InputError: If the pairs are not usable, or the folder holds halves of others.
    """
    from cloud_aggregator.reproduce.judge import divide

    folder.keep(out, comparison)
    files = divide(out, comparison.settings.sources)
    found = comparison.model_copy(update={"files": comparison.files or files})
    folder.keep(out, found)
    return found


def _close(console: Console, out: Path, found: Sequence[document.Judged], *, quick: bool) -> None:
    """Say which claims held, what is missing, and where everything is."""
    for experiment in found:
        gathered = experiment.gathered
        say(console, f"{gathered.name} ({gathered.learning}; {gathered.priced})")
        for missing in gathered.missing:
            say(console, f"  missing: {missing}")
        say(console, f"  {document.summary(experiment)}")
        for claim in experiment.claims:
            say(console, f"  {claim.verdict}: {claim.text}. {claim.sentence}")
    if quick:
        say(console, NO_EVIDENCE)
    say(console, f"Figure, table and text: {out / 'fig5.svg'}, fig5.png, fig5.csv, fig5.md")
