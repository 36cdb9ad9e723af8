"""The command ``devices``: which devices are known, and what each of their figures is from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import click
from rich import box
from rich.console import Console
from rich.table import Table

from device_profiles.fleet import lora_count_of
from device_profiles.plan_limits import InfeasiblePlanError
from device_profiles.profile import Profile, catalog, find_profile, places

_PREFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
#: Unit by name of a figure; the others are numbers or lists of words.
_UNITS = {
    "flops": "FLOP/s",
    "watts": "W",
    "idle_watts": "W",
    "frequency_hz": "Hz",
    "bytes": "B",
    "reserved_bytes": "B",
    "bandwidth": "B/s",
    "bandwidth_hz": "Hz",
    "transmit_watts": "W",
    "circuit_watts": "W",
    "receive_watts": "W",
}
#: What a figure is where the file is silent.
_DEFAULTS = {
    "compute.idle_watts": "default: not counted",
    "memory.reserved_bytes": "default, assumed: a quarter of the memory, at most 4 GB",
    "radio.circuit_watts": "default: not counted",
    "radio.receive_watts": "default: not counted",
    "precisions": "default: what every device can hold",
    "backends": "default: what every device has",
}


@click.group()
def devices() -> None:
    """Show which devices are known, and what they are."""


@devices.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print a list of profiles, in SI units.")
def list_profiles(as_json: bool) -> None:
    """List the profiles that come with the project."""
    profiles = catalog().values()
    if as_json:
        click.echo(json.dumps([for_scripts(profile) for profile in profiles], indent=2))
        return
    table = _table("Device profiles")
    table.add_column("name", no_wrap=True)
    table.add_column("device")
    for heading in ("LoRA", "memory", "sustained", "power"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("uplink")
    for profile in profiles:
        radio = profile.radio
        table.add_row(
            profile.name,
            profile.title + (" *" if profile.emulation_only else ""),
            str(lora_count_of(profile, None)),
            with_unit(profile.memory.bytes, "B"),
            with_unit(profile.compute.flops, "FLOP/s"),
            with_unit(profile.compute.watts, "W"),
            f"{radio.snr_db:g} dB, {with_unit(radio.bandwidth_hz, 'Hz')}, "
            f"{with_unit(radio.transmit_watts, 'W')}",
        )
    console = Console(markup=False, highlight=False)
    console.print(table)
    console.print(
        "* Emulation only. LoRA: modules it trains in the reference job; why: pwff devices plan "
        "NAME. Power modes, and where each figure is from: pwff devices show NAME"
    )


@devices.command("show")
@click.argument("profile", metavar="NAME[@MODE]|FILE.toml")
@click.option("--json", "as_json", is_flag=True, help="Print the profile, in SI units.")
def show_profile(profile: str, as_json: bool) -> None:
    """Show every figure of one profile, with its unit and its source.

    NAME is one of `pwff devices list`, MODE one of its power modes; FILE.toml is a profile of your
    own.
    """
    found = find_profile(profile)
    if as_json:
        click.echo(json.dumps(for_scripts(found), indent=2))
        return
    table = _table(f"{found.name}: {found.title} (its devices are called {found.short}-00, ...)")
    table.add_column("figure", no_wrap=True)
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("source", overflow="fold")
    for place, value in figures(found).items():
        table.add_row(place, value, why(place, found))
    console = Console(markup=False, highlight=False)
    console.print(table)
    for line in summary(found):
        console.print(line)


def figures(profile: Profile) -> dict[str, str]:
    """Return every figure that a profile has, with its unit, by its place in the file."""
    found: dict[str, str] = {}
    for place in places(profile):
        value = _value(profile, place)
        name = place.rpartition(".")[2]
        if value is None:
            continue
        if isinstance(value, tuple):
            found[place] = ", ".join(value)
        elif name == "lora_count":
            found[place] = f"{value} modules"
        elif name == "snr_db":
            found[place] = f"{value:g} dB"
        elif name == "battery_joules":
            found[place] = f"{with_unit(value, 'J')} ({value / 3600:.4g} Wh)"
        else:
            found[place] = with_unit(value, _UNITS[name]) if name in _UNITS else f"{value:g}"
    return found


def summary(profile: Profile) -> list[str]:
    """Return what the figures of a profile come to, a sentence each."""
    worth = derived(profile)
    lines = [
        f"LoRA modules: {worth.get('lora_count', 'not even 12')} in the reference job "
        "(pwff devices plan).",
        f"Free for training: {with_unit(worth['free_bytes'], 'B')} of "
        f"{with_unit(profile.memory.bytes, 'B')}.",
        f"Energy of training: {worth['joules_per_gflop']:.4g} J per GFLOP.",
    ]
    if "battery_hours" in worth:
        lines.append(f"Battery: {worth['battery_hours']:.3g} h of training at full power.")
    if profile.mode is not None:
        others = ", ".join(
            f"{profile.name}@{name}" for name in profile.modes if name != profile.mode
        )
        lines.append(f"Power mode: {profile.mode}" + (f"; others: {others}." if others else "."))
    if profile.emulation_only:
        lines.append("Emulation only: this software does not run on it.")
    return [*lines, profile.note] if profile.note else lines


def derived(profile: Profile) -> dict[str, float]:
    """Return what follows from a profile's figures.

    ``free_bytes`` for training, ``joules_per_gflop`` of training, ``lora_count`` in the reference
    job if it can do that and, where it has a battery, ``battery_hours`` of training at full power.
    """
    compute = profile.compute
    worth: dict[str, float] = {
        "free_bytes": profile.memory.free_bytes,
        "joules_per_gflop": compute.watts / compute.flops * 1e9,
    }
    with suppress(InfeasiblePlanError):
        worth["lora_count"] = lora_count_of(profile, None)
    if profile.battery_joules is not None:
        worth["battery_hours"] = profile.battery_joules / compute.watts / 3600
    return worth


def for_scripts(profile: Profile) -> dict[str, Any]:
    """Return a profile as plain values in SI units, and what ``derived`` returns."""
    return {**profile.model_dump(exclude_none=True), "derived": derived(profile)}


def why(place: str, profile: Profile) -> str:
    """Return where a profile's figure is from, be it stated, derived or a default."""
    if place in profile.sources:
        return profile.sources[place]
    name = place.rpartition(".")[2]
    if profile.mode is not None:
        given = profile.modes[profile.mode].model_dump(exclude_none=True)
        if place.rpartition(".")[0] in ("compute", "memory") and name in given:
            return f"power mode {profile.mode}"
    if profile.compute.kappa is not None and place in ("compute.flops", "compute.watts"):
        return "flops_per_cycle x frequency" if name == "flops" else "kappa x frequency cubed"
    holder = getattr(profile, place.partition(".")[0]) if "." in place else profile
    if place in _DEFAULTS and name not in holder.model_fields_set:
        return _DEFAULTS[place]
    return source_of(place, profile.sources)


def source_of(place: str, sources: Mapping[str, str]) -> str:
    """Return where the figure at ``place`` is from: its own entry, else its section's."""
    while place:
        if place in sources:
            return sources[place]
        place = place.rpartition(".")[0]
    return "not stated"


def with_unit(value: float, unit: str) -> str:
    """Return a value >= 0 to four digits, with a decimal prefix from 1,000 on."""
    for size, prefix in _PREFIXES:
        if value >= size:
            return f"{value / size:.4g} {prefix}{unit}"
    return f"{value:.4g} {unit}"


def _value(profile: Profile, place: str) -> Any:
    """Return the figure at a place such as ``compute.flops`` or ``modes.7w.watts``."""
    section, _, name = place.rpartition(".")
    if section.startswith("modes."):
        return getattr(profile.modes[section.removeprefix("modes.")], name)
    return getattr(getattr(profile, section) if section else profile, name)


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
