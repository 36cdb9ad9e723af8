"""The command ``devices``: which devices are known, and what each of their figures is from."""

from __future__ import annotations

import json
from collections.abc import Mapping

import click
from rich import box
from rich.console import Console
from rich.table import Table

from device_profiles.profile import Profile, catalog, find_profile

_PREFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


@click.group()
def devices() -> None:
    """Show which devices are known, and what they are."""


@devices.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print a list of profiles, in SI units.")
def list_profiles(as_json: bool) -> None:
    """List the profiles that come with the project."""
    profiles = catalog().values()
    if as_json:
        click.echo(json.dumps([profile.model_dump() for profile in profiles], indent=2))
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
            profile.title,
            str(profile.lora_count),
            with_unit(profile.memory.bytes, "B"),
            with_unit(profile.compute.flops, "FLOP/s"),
            with_unit(profile.compute.watts, "W"),
            f"{radio.snr_db:g} dB, {with_unit(radio.bandwidth_hz, 'Hz')}, "
            f"{with_unit(radio.transmit_watts, 'W')}",
        )
    console = Console(markup=False, highlight=False)
    console.print(table)
    console.print(
        "LoRA: modules it trains. Where each figure is from: pwff devices show NAME",
        soft_wrap=True,
    )


@devices.command("show")
@click.argument("profile", metavar="NAME|FILE.toml")
@click.option("--json", "as_json", is_flag=True, help="Print the profile, in SI units.")
def show_profile(profile: str, as_json: bool) -> None:
    """Show every figure of one profile, with its unit and its source.

    NAME is one of `pwff devices list`; FILE.toml is a profile of your own.
    """
    found = find_profile(profile)
    if as_json:
        click.echo(json.dumps(found.model_dump(), indent=2))
        return
    title = f"{found.name}: {found.title} (its devices are called {found.short}-00, ...)"
    table = _table(title)
    table.add_column("figure", no_wrap=True)
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("source", overflow="fold")
    for place, value in figures(found).items():
        table.add_row(place, value, source_of(place, found.sources))
    Console(markup=False, highlight=False).print(table)


def figures(profile: Profile) -> dict[str, str]:
    """Return every figure of a profile with its unit, by its place in the file."""
    return {
        "lora_count": f"{profile.lora_count} modules",
        "compute.flops": with_unit(profile.compute.flops, "FLOP/s"),
        "compute.watts": with_unit(profile.compute.watts, "W"),
        "memory.bytes": with_unit(profile.memory.bytes, "B"),
        "memory.bandwidth": with_unit(profile.memory.bandwidth, "B/s"),
        "radio.snr_db": f"{profile.radio.snr_db:g} dB",
        "radio.bandwidth_hz": with_unit(profile.radio.bandwidth_hz, "Hz"),
        "radio.transmit_watts": with_unit(profile.radio.transmit_watts, "W"),
    }


def source_of(place: str, sources: Mapping[str, str]) -> str:
    """Return where the figure at ``place`` is from: its own entry, else its section's."""
    section = place.partition(".")[0]
    return sources.get(place) or sources.get(section) or "not stated"


def with_unit(value: float, unit: str) -> str:
    """Return a value >= 0 to four digits, with a decimal prefix from 1,000 on."""
    for size, prefix in _PREFIXES:
        if value >= size:
            return f"{value / size:.4g} {prefix}{unit}"
    return f"{value:.4g} {unit}"


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
