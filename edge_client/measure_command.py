"""The command ``devices measure``: a profile of this machine, from a few seconds of real work.

It joins ``device_profiles.cli.devices``. torch is loaded when it is called, not before.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from device_profiles.cli import devices, figures, for_scripts, with_unit
from device_profiles.errors import InputError
from device_profiles.profile import Profile, write_profile
from edge_client.machine_profile import (
    THIS_MACHINE,
    PowerFigures,
    known_power,
    machine_profile,
    profile_name,
)
from edge_client.measure import Speed, measure_speed
from edge_client.power import RAPL_FOLDER, Metered, find_meter
from edge_client.preflight import free_memory

__all__ = ["devices", "this_machine"]

_IDLE_SECONDS = 1.0
_TRAINED = ("fp32", "bf16", "int8", "nf4")


@devices.command("measure")
@click.option("--name", metavar="NAME", help="Of the profile (this machine's).")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=THIS_MACHINE,
    metavar="FILE.toml",
    help=f"Write it there ({THIS_MACHINE}, where `pwff devices plan --this-machine` looks).",
)
@click.option("--seconds", type=float, default=10.0, help="About so long (10).")
@click.option("--threads", type=int, metavar="N", help="Of the processor (all).")
@click.option("--device", default="auto", metavar="auto|cpu|cuda", help="What computes (auto).")
@click.option("--watts", type=float, help="Power while training, where you know it.")
@click.option("--idle-watts", type=float, help="Power while waiting, likewise.")
@click.option("--snr-db", type=float, help="Of the radio: mean SNR (assumed: 5).")
@click.option("--bandwidth-hz", type=float, help="Of the radio (assumed: 1e6).")
@click.option("--transmit-watts", type=float, help="Of the radio (assumed: 1).")
@click.option("--json", "as_json", is_flag=True, help="Print profile and timings, in SI units.")
def measure_command(
    *,
    name: str | None,
    out: Path,
    seconds: float,
    threads: int | None,
    device: str,
    watts: float | None,
    idle_watts: float | None,
    as_json: bool,
    **radio: float | None,
) -> None:
    """Measure this machine and write a profile of it.

    A large product, a copy, and real training steps of the packed model; memory; power by a
    Jetson's rails (jetson-stats) or the processor's counters (RAPL) where they can be read. Close
    what else is running: the best of several repeats counts, and a busy machine has no good one.
    """
    if not 0 < seconds <= 3600:
        raise InputError(f"--seconds = {seconds:g}; give more than 0, and 3600 at most")
    if out.suffix != ".toml":
        raise InputError(f"--out = '{out}'; a profile's file ends in .toml")
    console = Console(markup=False, highlight=False, stderr=as_json)
    with console.status("measuring this machine"):
        profile, speed = this_machine(
            name=name,
            seconds=seconds,
            threads=threads,
            device=device,
            watts=watts,
            idle_watts=idle_watts,
            radio={key: value for key, value in radio.items() if value is not None},
        )
    write_profile(profile, out)
    if as_json:
        timings = dataclasses.asdict(speed)
        click.echo(json.dumps({"profile": for_scripts(profile), "timings": timings}, indent=2))
        return
    for line in _report(profile, speed, out):
        console.print(line, soft_wrap=True)


def this_machine(
    *,
    name: str | None = None,
    seconds: float = 10.0,
    threads: int | None = None,
    device: str = "auto",
    watts: float | None = None,
    idle_watts: float | None = None,
    radio: dict[str, float] | None = None,
    rapl_folder: Path = RAPL_FOLDER,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> tuple[Profile, Speed]:
    """Measure this machine; return its profile and the timings.

    Args:
        name: Of the profile; this machine's by default.
        seconds: About how long, besides what loading takes.
        threads: Of the processor; all by default.
        device: ``cpu``, ``cuda``, or ``auto`` for the GPU where there is one.
        watts: Power while training, instead of what is metered or assumed.
        idle_watts: While waiting, likewise.
        radio: Figures of ``device_profiles.profile.Radio`` that are known.
        rapl_folder: Where the processor's energy counters are.
        clock: Seconds.
        sleep: Waits, for the power of waiting.

    Raises:
        InputError: If a figure is out of range, there is no such device, or the machine is too busy
            for figures that agree.
    """
    import torch

    from edge_client.doctor import cpu_name

    device = _device(device)
    free = free_memory()
    if threads is not None:
        if threads < 1:
            raise InputError(f"--threads = {threads}; give 1 or more")
        torch.set_num_threads(threads)
    meter, covers = find_meter(rapl_folder)
    with Metered(meter, clock) as waiting:
        if meter is not None:
            sleep(_IDLE_SECONDS)
    working = Metered(meter, clock)
    speed = measure_speed(seconds, device, clock, training=working)
    total = _total_bytes()
    power: PowerFigures = known_power(
        given=watts,
        given_idle=idle_watts,
        metered=working.watts,
        metered_idle=waiting.watts,
        meter=covers,
        threads=torch.get_num_threads(),
    )
    if device == "cuda":
        free_bytes, total = torch.cuda.mem_get_info()
        free = dataclasses.replace(free, bytes=free_bytes, source="says the GPU")
    profile = machine_profile(
        name=profile_name(name or platform.node()),
        title=torch.cuda.get_device_name() if device == "cuda" else cpu_name(),
        stamp=f"{datetime.now(timezone.utc).date()}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads",
        speed=speed,
        power=power,
        total_bytes=total,
        free=free,
        radio=radio or {},
        precisions=_precisions(device),
        backends=_backends(),
    )
    return profile, speed


def _device(wanted: str) -> str:
    import torch

    if wanted not in ("auto", "cpu", "cuda"):
        raise InputError(f"--device = '{wanted}'; choose auto, cpu or cuda")
    if wanted == "cuda" and not torch.cuda.is_available():
        raise InputError("--device = 'cuda', and torch sees no GPU; choose cpu")
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return wanted


def _total_bytes() -> int:
    import psutil

    return int(psutil.virtual_memory().total)


def _precisions(device: str) -> tuple[str, ...]:
    from quantization.precision import available

    found = available(device)
    return tuple(name for name in _TRAINED if name in found and found[name].backend is not None)


def _backends() -> tuple[str, ...]:
    import torch

    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    return ("cpu", *(name for name, there in here.items() if there))


def _report(profile: Profile, speed: Speed, out: Path) -> list[str]:
    """Return what was measured, a line each."""
    shown: dict[str, Any] = figures(profile)
    lines = [f"{profile.name}: {profile.title}"]
    for place, value in shown.items():
        lines.append(f"  {place} = {value}   ({profile.sources.get(place, 'default')})")
    for words, step in (
        ("of GPT-2's width, 2 blocks; predicted from the large product", speed.step),
        ("of the bundled base; predicted from the other step", speed.mini),
    ):
        lines.append(
            f"A training step {words}: {step.seconds:.3g} s, predicted "
            f"{step.predicted_seconds:.3g} s ({step.predicted_seconds / step.seconds:.2f} times)."
        )
    lines.append(f"Copy: {with_unit(profile.memory.bandwidth, 'B/s')}.")
    found = "--this-machine" if out == THIS_MACHINE else out
    lines.append(f"Written to {out}. What it could do: pwff devices plan {found}")
    return lines
