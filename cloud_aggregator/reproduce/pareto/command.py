"""The command ``reproduce pareto``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from cloud_aggregator.progress import say
from cloud_aggregator.reproduce import folder
from cloud_aggregator.reproduce.fig4 import EXPERIMENTS, listed, once
from cloud_aggregator.reproduce.pareto.document import sentences
from cloud_aggregator.reproduce.pareto.plan import PARETO, plan
from cloud_aggregator.reproduce.rewards_command import (
    begin,
    carry_out,
    check_kept,
    divided,
    given_options,
    how,
    reward_options,
)
from cloud_aggregator.reproduce.words import NO_EVIDENCE
from device_profiles.config_files import choose
from device_profiles.errors import InputError


@click.command()
@reward_options
@click.option("--weights", metavar="X,X,...", help="Of helpfulness (0,0.25,0.5,0.75,1).")
@click.option("--experiment", metavar="NAME", help=f"One of {', '.join(EXPERIMENTS)} (the first).")
def pareto(
    *,
    out: Path | None,
    workers: int | None,
    transport: str | None,
    quick: bool,
    render_only: bool,
    as_json: bool,
    **options: Any,
) -> int:
    """Align the same clients at several weights: helpfulness against harmlessness.

    Writes pareto.svg, pareto.png, pareto.csv and pareto.md: the front by one judge that no run
    learned with, and the rank correlation between weight and each reward. As `reproduce fig5`, it
    goes on in --out where it was.
    """
    console = begin(as_json=as_json)
    where = out or Path("runs/pareto-quick" if quick else "runs/pareto")
    given = given_options(options)
    if "weights" in given:
        given["weights"] = weights_of(given["weights"])
    if "experiment" in given:
        choose("experiment", given["experiment"], EXPERIMENTS)
    front = folder.take_up(PARETO, where, given, quick=quick, render_only=render_only)
    settings, doing = front.settings, how(where, workers, transport)
    check_kept(PARETO, where, settings)
    plan(settings, front.width, front.files, doing)  # refuses before anything is written
    if settings.quick:
        say(console, NO_EVIDENCE)
    if not render_only:
        front = divided(where, front)
    runs = plan(settings, front.width, front.files, doing)
    if not render_only:
        carry_out(runs, where, console, name="pareto", model=settings.model)

    from cloud_aggregator.reproduce.pareto import outputs

    points = outputs.write(where, front, runs)
    for text in sentences(points):
        say(console, text)
    if settings.quick:
        say(console, NO_EVIDENCE)
    say(console, f"Figure, table and text: {where / 'pareto.svg'}, pareto.png, .csv and .md")
    if as_json:
        click.echo(json.dumps(outputs.as_json(where, front, points)))
    return 0


def weights_of(text: str) -> list[float]:
    """Return the weights of a list with commas.

    Raises:
        InputError: If one is no number or is there twice.
    """
    try:
        return once("--weights", [float(word) for word in listed("--weights", text)])
    except ValueError as err:
        raise InputError(
            f"--weights = '{text}': {err}; give numbers from 0 to 1 with commas between"
        ) from err
