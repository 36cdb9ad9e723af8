"""The command ``export``: a personal model leaves its run as a folder that others can load."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from device_profiles.errors import InputError
from edge_client.export.personal import Personal, find_in_run, find_on_device
from edge_client.export.write import FORMATS, check_wish, write_export
from edge_client.quiet import import_quietly

_PRECISIONS = sorted({precision for row in FORMATS.values() for precision in row})


@click.command()
@click.argument("run", required=False, type=click.Path(path_type=Path))
@click.option("--client", metavar="ID", help="Whose model, of those in the run.")
@click.option(
    "--format", "form", type=click.Choice(list(FORMATS)), default="hf", show_default=True,
    help="For transformers (hf), or for ONNX Runtime.",
)  # fmt: skip
@click.option(
    "--precision", type=click.Choice(_PRECISIONS), default="fp32", show_default=True,
    help="int8 with --format onnx: a quarter of the size, and faster.",
)  # fmt: skip
@click.option(
    "--out", type=click.Path(path_type=Path), metavar="DIR",
    help="The new folder (default: RUN/exports/ID-FORMAT-PRECISION).",
)  # fmt: skip
@click.option("--force", is_flag=True, help="Replace an earlier export.")
@click.option(
    "--base", metavar="NAME", help="Where the base is now: mini, a checkpoint folder or a hub id."
)
@click.option(
    "--state", type=click.Path(path_type=Path), metavar="DIR",
    help="On a real device, instead of RUN: its own folder of that run.",
)  # fmt: skip
@click.option(
    "--global", "shared", type=click.Path(path_type=Path), metavar="FILE",
    help="With --state: the run's newest global/ROUND/shared.safetensors.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print what was written as JSON.")
def export(
    *,
    run: Path | None,
    client: str | None,
    form: str,
    precision: str,
    out: Path | None,
    force: bool,
    base: str | None,
    state: Path | None,
    shared: Path | None,
    as_json: bool,
) -> int:
    """Write a client's personal model to a folder, and check it against the trained one.

    RUN is the folder of an emulated run. The model is its base with the client's LoRA modules
    merged into the weights; adapters stay modules (hf) or become part of the graph (onnx). It is
    the model after the newest finished round.
    """
    find = _source(run, client, base, state, shared)
    if out is None:
        if run is None:
            raise InputError("--out is missing; name the folder to write")
        out = run / "exports" / f"{client}-{form}-{precision}"
    check_wish(form, precision, out, force=force)
    personal = find()
    import_quietly("peft")
    console = Console(stderr=True, highlight=False)
    with console.status("") as status:
        report = write_export(
            personal, out, form=form, precision=precision, force=force,
            notify=status.update,
        )  # fmt: skip
    if as_json:
        click.echo(json.dumps(report, indent=1))
    else:
        click.echo(_describe(report))
    return 0


def _source(
    run: Path | None, client: str | None, base: str | None, state: Path | None, shared: Path | None
) -> Callable[[], Personal]:
    """Return what finds the model, once it is known that all is said that it needs."""
    if state is not None:
        if run is not None or client is not None:
            raise InputError("--state is of one device; leave RUN and --client out")
        if base is None:
            raise InputError("--base is missing; name the base that the device trained on")
        return partial(find_on_device, state, shared, base)
    if run is None:
        raise InputError("name a run's folder, or a device's with --state")
    if shared is not None:
        raise InputError("--global goes with --state; a run's folder has its own global state")
    if client is None:
        raise InputError("--client is missing; name whose model is to be exported")
    return partial(find_in_run, run, client, base)


def _describe(report: dict[str, Any]) -> str:
    modules, check = report["modules"], report["check"]
    parts = [f"{modules['adapters']} adapters"] if modules["adapters"] else []
    parts += [f"{modules['lora']} LoRA modules merged"] if modules["lora"] else []
    origin = f" of {report['run']}" if report["run"] else ""
    return "\n".join(
        [
            f"{report['client']}{origin} after round {report['round']}: {', '.join(parts)}",
            f"Checked on {check['tokens']} tokens of {check['text']}: "
            f"{check['agreement']:.1%} of the next tokens as trained, "
            f"largest difference of a logit {check['largest_difference']:.2g}",
            f"Exported: {report['folder']} ({report['bytes'] / 1e6:.1f} MB; "
            f"talk to it with: pwff chat {report['folder']})",
        ]
    )
