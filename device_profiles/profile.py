"""What one kind of device is: its compute, its memory, its radio, and what it can afford.

SI units: bytes, FLOP/s, watts, hertz, seconds. SNR is in decibels, as data sheets give it. Every
figure of the catalog stands beside its source, or the word 'assumed'.
"""

from __future__ import annotations

from functools import cache
from importlib import resources
from pathlib import Path
from typing import Annotated

from pydantic import Field

from device_profiles.config_files import Config, check, choose, load, read_toml

LORA_COUNTS = (12, 36)


class Compute(Config):
    """How fast the device trains. ``flops``: sustained FLOP/s, > 0. ``watts``: at that, > 0."""

    flops: Annotated[float, Field(gt=0, le=1e18, allow_inf_nan=False)]
    watts: Annotated[float, Field(gt=0, le=1e5, allow_inf_nan=False)]


class Memory(Config):
    """``bytes``: of the whole device, > 0. ``bandwidth``: bytes/s, > 0."""

    bytes: Annotated[int, Field(gt=0, le=2**50)]
    bandwidth: Annotated[float, Field(gt=0, le=1e15, allow_inf_nan=False)]


class Radio(Config):
    """The link to the base station; mean SNR in dB, bandwidth in Hz > 0, power in W >= 0."""

    snr_db: Annotated[float, Field(ge=-100, le=100)]
    bandwidth_hz: Annotated[float, Field(gt=0, le=1e12)]
    transmit_watts: Annotated[float, Field(ge=0, le=1e4)]


class Profile(Config):
    """One device of the catalog.

    ``lora_count`` is this version's table entry: how many LoRA modules (12 to 36) it trains.
    ``sources`` says where each figure is from.
    """

    name: Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9._-]{0,40}[a-z0-9])?$")]
    title: str
    short: Annotated[str, Field(pattern=r"^[a-z0-9]{1,12}$")]
    lora_count: Annotated[int, Field(ge=LORA_COUNTS[0], le=LORA_COUNTS[1])]
    compute: Compute
    memory: Memory
    radio: Radio
    sources: dict[str, str]


@cache
def catalog() -> dict[str, Profile]:
    """Return the profiles that come with the project, by name."""
    found: dict[str, Profile] = {}
    folder = resources.files("device_profiles") / "catalog"
    for entry in sorted(folder.iterdir(), key=lambda e: e.name):
        if entry.name.endswith(".toml"):
            with resources.as_file(entry) as path:
                profile = check(Profile, read_toml(path), entry.name)
            found[profile.name] = profile
    return found


def find_profile(name: str) -> Profile:
    """Return the profile of that name, or of that TOML file.

    Raises:
        InputError: If there is no such profile; the nearest name is in the message.
    """
    if name.endswith(".toml"):
        return load(Profile, Path(name))
    return catalog()[choose("device profile", name, catalog())]
