"""Does a sweep: every run that is not done, one after another, and then what they came to."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from cloud_aggregator import sweep_report
from cloud_aggregator.progress import say
from cloud_aggregator.reproduce.runner import StoppedError, carry_out
from cloud_aggregator.sweep import plan_sweep, read_axis, settle_folder
from cloud_aggregator.trackers import check_trackers, open_trackers

_COUNTS = (
    "A difference counts (*) where it has the same sign at every seed and its mean is larger than "
    "its spread; that is no significance test."
)


def run_sweep(
    console: Console,
    path: Path | None,
    options: Mapping[str, Any],
    *,
    sweep: Sequence[str],
    seeds: int,
    out: Path,
    track: Sequence[str] = (),
) -> Path:
    """Do a sweep in the folder ``out``, or what is left of it; return where its page is.

    Args:
        console: Where it is shown.
        path: The experiment's file; without it, the defaults.
        options: That all runs have.
        sweep: Axes as they were written, ``KEY=V,V,...``.
        seeds: How many, from the experiment's own on.
        out: Its runs go to folders below ``runs``, named by their values.
        track: Trackers that follow every run.

    Raises:
        InputError: If a key, a value or the folder is not usable; nothing has begun then.
        MissingExtraError: If a tracker's package is not installed.
        StoppedError: If Ctrl-C or SIGTERM asked for it.
        RunFailedError: If a run cannot go on; the same command goes on with it.
    """
    check_trackers(track)
    axes = [read_axis(text) for text in sweep]
    runs = plan_sweep(path, options, axes, seeds)
    settle_folder(out, runs, axes, seeds)
    say(console, f"{len(runs)} runs: {len(runs) // seeds} settings at {seeds} seeds, in {out}")
    try:
        with contextlib.ExitStack() as stack:
            carry_out(
                runs,
                out,
                console,
                watch=lambda folder: stack.enter_context(open_trackers(track, folder)),
            )
    except StoppedError as err:
        raise StoppedError(
            "interrupted, everything is kept; go on with the same command and "
            f"--out {shlex.quote(str(out))}"
        ) from err
    swept, page = sweep_report.write_outputs(out, runs)
    for shown in sweep_report.table(swept):
        console.print(shown)
    if len(swept.rows) > 1:
        say(console, _COUNTS)
    say(console, f"Comparison: {page}; a line a run: {out / 'sweep.csv'}")
    return page
