"""What one kind of device is: its compute, its memory, its radio, and what it can afford.

SI units: bytes, FLOP/s, watts, hertz, joules, seconds; SNR is in decibels, as data sheets give it.
A file may write a figure with a unit instead ("8 GB"). Every figure of the catalog stands beside
its source, or the word 'assumed'.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticKnownError

from device_profiles.config_files import Config, check, choose, load, nearest, read_toml
from device_profiles.errors import InputError
from device_profiles.parts import Compute, Memory, Mode, Radio, check_idle
from device_profiles.units import Energy

__all__ = [
    "LORA_COUNTS",
    "Backend",
    "Compute",
    "LoraCount",
    "Memory",
    "Mode",
    "Precision",
    "Profile",
    "Radio",
    "catalog",
    "find_profile",
    "places",
    "write_profile",
]

LORA_COUNTS = (12, 36)

LoraCount = Annotated[int, Field(ge=LORA_COUNTS[0], le=LORA_COUNTS[1])]
Precision = Literal["fp32", "bf16", "int8", "nf4"]
Backend = Literal["cpu", "cuda", "mps", "rocm", "xpu"]
_ModeName = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9._-]{0,18}[a-z0-9])?$")]


class Profile(Config):
    """One kind of device.

    Attributes:
        name: What it is called in the catalog and in records.
        title: What it is called among people.
        short: Prefix of its devices' names, such as ``orin`` in ``orin-00``.
        note: What a user must know besides the figures.
        emulation_only: Whether it stands for a device that this software does not run on.
        lora_count: This version's table entry: LoRA modules that it trains, 12 to 36, if stated.
        compute: Rate and power; in the power mode in force, where there are modes.
        memory: Size and bandwidth.
        radio: The uplink.
        battery_joules: Energy of a full battery, > 0, if it has one.
        precisions: Of the frozen base, that work there.
        backends: Of torch, that work there.
        mode: The power mode in force; a name in ``modes``.
        modes: Power modes by name.
        sources: Where each figure is from, by its place, such as ``compute.flops``; a section's
            entry (``radio``) stands for all figures of it.
    """

    name: Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9._-]{0,40}[a-z0-9])?$")]
    title: str
    short: Annotated[str, Field(pattern=r"^[a-z0-9]{1,12}$")]
    note: str = ""
    emulation_only: bool = False
    lora_count: LoraCount | None = None
    modes: dict[_ModeName, Mode] = Field(default_factory=dict)
    mode: str | None = Field(
        default=None, validate_default=True, description="the name of the power mode in force"
    )
    compute: Compute = Field(description="a table [compute] with 'flops' and 'watts'")
    memory: Memory
    radio: Radio
    battery_joules: Energy | None = None
    precisions: Annotated[tuple[Precision, ...], Field(min_length=1)] = ("fp32",)
    backends: Annotated[tuple[Backend, ...], Field(min_length=1)] = ("cpu",)
    sources: dict[str, Annotated[str, Field(min_length=1)]] = Field(default_factory=dict)

    @field_validator("mode")
    @classmethod
    def _mode_is_one_of_them(cls, mode: str | None, others: ValidationInfo) -> str | None:
        modes = others.data.get("modes", {mode: None})
        if mode is None and modes:
            raise PydanticKnownError("missing")
        if mode is not None and mode not in modes:
            hint = nearest(mode, modes)
            remedy = f"give one of {', '.join(modes)}" if modes else f"add [modes.{mode}]"
            raise ValueError(f"no such power mode{hint or ';'} {remedy}")
        return mode

    @model_validator(mode="before")
    @classmethod
    def _mode_gives_rate_power_and_bandwidth(cls, values: Any) -> Any:
        """Fill in what the mode in force gives; what is wrong there is told by its own field."""
        if not isinstance(values, Mapping):
            return values
        modes, mode = values.get("modes"), values.get("mode")
        now = modes.get(mode) if isinstance(modes, Mapping) and isinstance(mode, str) else None
        if not isinstance(now, Mapping):
            return values
        filled = dict(values)
        filled.setdefault("compute", {})
        for section, names in (("compute", ("flops", "watts")), ("memory", ("bandwidth",))):
            given = filled.get(section)
            if isinstance(given, Mapping):
                stated = {name: now[name] for name in names if now.get(name) is not None}
                filled[section] = {**stated, **given}
        return filled

    @model_validator(mode="after")
    def _is_stated_once(self) -> Profile:
        if self.mode is not None:
            now = self.modes[self.mode]
            # A record that was written out has both, and they are the same.
            if (self.compute.flops, self.compute.watts) != (now.flops, now.watts):
                raise ValueError("the power modes give rate and power; leave both out of [compute]")
            if now.bandwidth not in (None, self.memory.bandwidth):
                raise ValueError("the power modes give the bandwidth; leave it out of [memory]")
            if len({mode.bandwidth is None for mode in self.modes.values()}) > 1:
                raise ValueError("give each power mode its 'bandwidth', or [memory] one for all")
            for name, mode in self.modes.items():
                check_idle(self.compute.idle_watts, mode.watts, f"watts of mode '{name}'")
        known = places(self)
        sections = {place.rpartition(".")[0] for place in known} | {"modes"}
        for place in self.sources:
            if place not in known and place not in sections:
                raise ValueError(f"unknown key 'sources.{place}'{nearest(place, known)}")
        return self

    def at_mode(self, name: str) -> Profile:
        """Return this device in another power mode; case does not matter.

        Raises:
            InputError: If it has no such mode; the nearest is in the message.
        """
        if not self.modes:
            raise InputError(f"{self.name} has no power modes; leave out '{name}'")
        name = choose(f"power mode of {self.name}", name.lower(), self.modes)
        mode = self.modes[name]
        compute = self.compute.model_copy(update={"flops": mode.flops, "watts": mode.watts})
        bandwidth = self.memory.bandwidth if mode.bandwidth is None else mode.bandwidth
        memory = self.memory.model_copy(update={"bandwidth": bandwidth})
        return self.model_copy(update={"mode": name, "compute": compute, "memory": memory})


def places(profile: Profile) -> list[str]:
    """Return the places of all figures that a profile can state, such as ``compute.flops``."""
    sections: dict[str, type[Config]] = {"compute": Compute, "memory": Memory, "radio": Radio}
    found = ["lora_count", "battery_joules", "precisions", "backends"]
    for section, kind in sections.items():
        found += [f"{section}.{name}" for name in kind.model_fields]
    for mode in profile.modes:
        found += [f"modes.{mode}.{name}" for name in Mode.model_fields]
    return found


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
    """Return the profile of that name or of that TOML file, in its power mode or ``NAME@MODE``'s.

    Raises:
        InputError: If there is no such profile or mode; the nearest name is in the message.
    """
    if name.endswith(".toml"):
        return load(Profile, Path(name))
    if "@" in name:
        name, _, mode = name.rpartition("@")
        return find_profile(name).at_mode(mode)
    return catalog()[choose("device profile", name, catalog())]


def write_profile(profile: Profile, path: Path) -> None:
    """Write a profile as a TOML file that ``find_profile`` reads as the same; whole or not at all.

    Figures that follow from others (by the clock, by the power mode in force, by a default) are
    left to follow.

    Raises:
        InputError: If the file cannot be written.
    """
    content = profile.model_dump(exclude_unset=True, exclude_none=True)
    if profile.mode is not None or profile.compute.kappa is not None:
        del content["compute"]["flops"], content["compute"]["watts"]
    if profile.mode is not None and profile.modes[profile.mode].bandwidth is not None:
        del content["memory"]["bandwidth"]
    new = path.with_name(f"{path.name}.new")
    try:
        new.write_bytes(tomli_w.dumps(content).encode())
        new.replace(path)
    except OSError as err:
        with suppress(OSError):
            new.unlink(missing_ok=True)
        raise InputError(f"cannot write {path}: {err.strerror or err}") from err
