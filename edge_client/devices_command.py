"""The command ``devices plan``: what a device would do in a round, why, and every input of it.

It and ``devices measure`` join ``device_profiles.cli.devices``. A plan is arithmetic on a profile
and a job, and needs no torch: only ``--data`` loads a tokenizer, to count what a file holds, and
``--this-machine`` measures where nothing was measured before.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from rich import box
from rich.console import Console
from rich.table import Table

from device_profiles.channel import PAPER_LINK
from device_profiles.cli import devices, with_unit
from device_profiles.errors import InputError
from device_profiles.modules import lora_rank
from device_profiles.plan_words import reasons
from device_profiles.planning import (
    REFERENCE_BUDGET,
    REFERENCE_JOB,
    Budget,
    InfeasiblePlanError,
    Plan,
    plan,
)
from device_profiles.profile import Profile, catalog, find_profile
from device_profiles.round_estimate import Job
from device_profiles.step_model import StepShape
from edge_client import measure_command
from edge_client.machine_profile import THIS_MACHINE
from edge_client.plan_page import plan_page

__all__ = ["devices", "measure_command"]

_QUICK_SECONDS = 2.0


@devices.command("plan")
@click.argument("profile", required=False, metavar="NAME[@MODE]|FILE.toml")
@click.option(
    "--this-machine",
    "here",
    is_flag=True,
    help=f"The machine it runs on: by {THIS_MACHINE} of `pwff devices measure` if that is in the "
    "current folder, else measured for two seconds.",
)
@click.option("--all", "everything", is_flag=True, help="Every device of the catalog in a table.")
@click.option("--markdown", is_flag=True, help="With --all: the page docs/devices.md.")
@click.option("--model", default="gpt2", metavar="gpt2|mini|PATH", help="The base (gpt2).")
@click.option("--placement", metavar="NAME", help="LoRA sites: qkv or wide (qkv).")
@click.option("--rank", type=int, metavar="R", help="Of LoRA (96 at width 768 in proportion).")
@click.option("--adapter-size", type=int, metavar="M", help="Bottleneck size (10).")
@click.option("--data", type=click.Path(path_type=Path), help="A file: its rows are counted.")
@click.option("--samples", type=int, metavar="N", help="Examples on the device (5200).")
@click.option("--tokens", type=int, metavar="N", help="Mean length of one (128).")
@click.option("--response", type=int, metavar="N", help="Of these, predicted (64).")
@click.option("--max-length", type=int, metavar="N", help="Longest, tokens (256).")
@click.option("--local-steps", type=int, metavar="N", help="Optimiser steps a round (50).")
@click.option("--batch-size", type=int, metavar="N", help="Examples a step (4).")
@click.option("--precision", metavar="NAME", help="Only this one: fp32, bf16, int8 or nf4 (auto).")
@click.option("--deadline", type=float, metavar="SECONDS", help="Of a round (600).")
@click.option("--energy", type=float, metavar="JOULES", help="A round may take (20000).")
@click.option("--channel", metavar="paper|profile", default="profile", help="Uplink (profile).")
@click.option("--json", "as_json", is_flag=True, help="Print plan and inputs, in SI units.")
def plan_command(
    *,
    profile: str | None,
    here: bool,
    everything: bool,
    markdown: bool,
    model: str,
    precision: str | None,
    deadline: float | None,
    energy: float | None,
    channel: str,
    as_json: bool,
    **job_options: Any,
) -> None:
    """Say what a device would do in a round, and why.

    How many LoRA modules it trains, at which precision, in which batches, with which codec; which
    limit binds; memory, seconds and joules, modelled. Without options the job is the reference job
    by which devices are compared.
    """
    if [everything, here, profile is not None].count(True) != 1:
        raise InputError(
            "name one device, or give --all for the whole catalog, or --this-machine; one of them"
        )
    if channel not in ("paper", "profile"):
        raise InputError(f"--channel = '{channel}'; choose paper or profile")
    job = _job(model, **job_options)
    budget = Budget(
        deadline_seconds=REFERENCE_BUDGET.deadline_seconds if deadline is None else deadline,
        energy_joules=REFERENCE_BUDGET.energy_joules if energy is None else energy,
    )
    link = PAPER_LINK if channel == "paper" else None
    if here:
        chosen = [_this_machine()]
    else:
        chosen = [*catalog().values()] if everything else [find_profile(profile or "")]
    if precision not in (None, "auto"):
        chosen = [_only(p, precision or "") for p in chosen]
    if not everything:
        planned = plan(chosen[0], job, budget, link)
        _show(chosen[0], planned, as_json=as_json)
        return
    plans = [(p, _try(p, job, budget, link)) for p in chosen]
    if as_json:
        click.echo(json.dumps([_values(p, found) for p, found in plans], indent=2))
    elif markdown:
        click.echo(plan_page(plans, job, budget), nl=False)
    else:
        _table_of(plans)


def _this_machine() -> Profile:
    """Return what was measured of this machine, or measure it; say on stderr which."""
    if THIS_MACHINE.exists():
        profile = find_profile(str(THIS_MACHINE))
        click.echo(
            f"By {THIS_MACHINE}: {profile.sources.get('compute.flops', 'no source stated')}.",
            err=True,
        )
        return profile
    profile, _ = measure_command.this_machine(seconds=_QUICK_SECONDS)
    click.echo(
        f"There is no {THIS_MACHINE} in this folder: measured on the spot for {_QUICK_SECONDS:g} s."
        " Longer, and for the next time: pwff devices measure",
        err=True,
    )
    return profile


def _try(profile: Profile, job: Job, budget: Budget, link: Any) -> Plan | str:
    """Return a device's plan, or why there is none."""
    try:
        return plan(profile, job, budget, link)
    except InfeasiblePlanError as err:
        return str(err)


def _only(profile: Profile, precision: str) -> Profile:
    if precision not in profile.precisions:
        raise InputError(
            f"precision '{precision}' does not work on {profile.name}; "
            f"choose one of {', '.join(profile.precisions)}, or auto"
        )
    return profile.model_copy(update={"precisions": (precision,)})


def _job(model: str, *, data: Path | None, **given: int | str | None) -> Job:
    """Return the reference job with what was given instead."""
    shape = _shape(model, given.pop("placement"), given.pop("rank"), given.pop("adapter_size"))
    changes: dict[str, Any] = {k: v for k, v in given.items() if v is not None}
    if data is not None:
        changes = {**_counted(data, model, changes.get("max_length")), **changes}
    length = min(REFERENCE_JOB.max_length, shape.positions)
    return replace(REFERENCE_JOB, **{"shape": shape, "max_length": length, **changes})


def _shape(model: str, placement: Any, rank: Any, adapter_size: Any) -> StepShape:
    """Return a base's shape; that of GPT-2 small is known without its weights."""
    reference = REFERENCE_JOB.shape
    if model != "gpt2":
        from quantization.identity import identify

        identity = identify(model)
        config = json.loads((identity.folder / "config.json").read_text())
        reference = replace(
            reference,
            base=identity.shape,
            heads=int(config.get("n_head", 12)),
            vocabulary=identity.vocabulary,
            positions=identity.positions,
        )
    changes = {"placement": placement, "adapter_size": adapter_size}
    return replace(
        reference,
        lora_rank=lora_rank(reference.base, rank)[0],
        **{k: v for k, v in changes.items() if v is not None},
    )


def _counted(data: Path, model: str, max_length: int | None) -> dict[str, int]:
    """Return how many examples a file holds, and their mean lengths in the base's tokens."""
    from edge_client.data.instructions import load_instructions
    from edge_client.data.prompts import encode_example
    from quantization.identity import identify
    from quantization.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(identify("mini" if model == "gpt2" else model))
    examples = load_instructions(str(data)).examples
    most = max_length or REFERENCE_JOB.max_length
    encoded = [encode_example(e, tokenizer, most) for e in examples]
    tokens = sum(len(e.tokens) for e in encoded)
    response = sum(len(e.tokens) - e.response_start for e in encoded)
    count = len(encoded)
    return {
        "samples": count,
        "tokens": max(2, round(tokens / count)),
        "response": max(1, round(response / count)),
    }


def _values(profile: Profile, planned: Plan | str) -> dict[str, Any]:
    """Return a plan and its inputs as plain values in SI units."""
    if isinstance(planned, str):
        return {"profile": profile.name, "refused": planned}
    estimate = planned.estimate
    return {
        "profile": planned.profile,
        "lora_count": planned.lora_count,
        "binds": list(planned.binds),
        "policy_count": planned.policy_count,
        "hard_count": planned.hard_count,
        "scores": planned.scores,
        **dataclasses.asdict(planned.setting),
        "modelled": {
            "memory_bytes": estimate.memory.total,
            "seconds": estimate.seconds,
            "compute_seconds": estimate.compute_seconds,
            "compute_joules": estimate.compute_joules,
            "uplink_seconds": estimate.uplink_seconds,
            "uplink_joules": estimate.uplink_joules,
        },
        "inputs": {
            "free_bytes": planned.free_bytes,
            "flops": profile.compute.flops,
            "watts": profile.compute.watts,
            "seconds_with_12": planned.canonical.compute_seconds,
            "uplink_joules_fp32": planned.canonical.uplink_joules,
            **dataclasses.asdict(planned.budget),
            **dataclasses.asdict(planned.job),
        },
    }


def _show(profile: Profile, planned: Plan, *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(_values(profile, planned), indent=2))
        return
    console = Console(markup=False, highlight=False)
    setting, estimate, job = planned.setting, planned.estimate, planned.job
    table = Table(box=box.SIMPLE_HEAD, title=f"{planned.profile}: a round", title_justify="left")
    table.add_column("", no_wrap=True)
    table.add_column("planned", justify="right")
    rows = [
        ("LoRA modules", str(planned.lora_count)),
        ("base in", setting.precision),
        ("batch", f"{job.batch_size} in parts of {setting.micro_batch}"),
        ("longest example", f"{setting.max_length} tokens"),
        ("blocks computed twice", "yes" if setting.checkpoint else "no"),
        ("upload in", setting.codec),
        ("memory*", f"{with_unit(estimate.memory.total, 'B')} of "
         f"{with_unit(planned.free_bytes, 'B')} free"),
        ("training*", f"{estimate.compute_seconds:.3g} s, {estimate.compute_joules:.3g} J"),
        ("upload*", f"{estimate.uplink_seconds:.3g} s, {estimate.uplink_joules:.3g} J"),
        ("all*", f"{estimate.seconds:.3g} s, {estimate.joules:.3g} J"),
    ]  # fmt: skip
    for row in rows:
        table.add_row(*row)
    console.print(table)
    for line in [*reasons(planned), _inputs(profile, planned), "* modelled"]:
        console.print(line)


def _inputs(profile: Profile, planned: Plan) -> str:
    """Return every input of the count in one sentence, so that it can be computed again."""
    canonical, budget, scores = planned.canonical, planned.budget, planned.scores
    said = ", ".join(f"{name} {score:.3f}" for name, score in scores.items())
    return (
        f"From {planned.free_bytes / 1e9:.3g} GB free, {profile.compute.watts:g} W, "
        f"{canonical.compute_seconds:.4g} s of training with 12 modules in fp32, an upload of "
        f"{canonical.uplink_joules:.4g} J, {budget.deadline_seconds:g} s and "
        f"{budget.energy_joules:g} J a round, {planned.job.samples} examples: scores {said}."
    )


def _table_of(plans: Sequence[tuple[Profile, Plan | str]]) -> None:
    table = Table(box=box.SIMPLE_HEAD, title="Plans for the catalog", title_justify="left")
    for heading in ("device", "LoRA", "binds", "base", "upload", "memory*", "round*", "energy*"):
        table.add_column(heading, overflow="fold", no_wrap=heading == "device")
    for profile, found in plans:
        if isinstance(found, str):
            table.add_row(profile.name, "-", found)
            continue
        estimate = found.estimate
        table.add_row(
            found.profile,
            str(found.lora_count),
            ", ".join(found.binds) or "nothing",
            found.setting.precision,
            found.setting.codec,
            with_unit(estimate.memory.total, "B"),
            f"{estimate.seconds:.3g} s",
            f"{estimate.joules:.3g} J",
        )
    console = Console(markup=False, highlight=False)
    console.print(table)
    console.print("* modelled. Why, and from what: pwff devices plan NAME")
