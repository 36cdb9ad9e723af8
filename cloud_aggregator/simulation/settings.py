"""Everything that a simulation is a function of, from a TOML file and options."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from cloud_aggregator.rounds import RoundRules
from cloud_aggregator.traces import TraceKeys, given
from device_profiles.availability import Always, Availability, Batteries, BatterySettings
from device_profiles.config_files import check, check_belongs, read_toml
from device_profiles.errors import InputError
from device_profiles.fading import Floats

Mode = Literal["synchronous", "fedbuff", "fedasync"]
Selection = Literal["uniform", "best-channel", "proportional-fair", "utility"]
Trace = Literal["always", "diurnal", "churn", "battery"]

#: Settings that belong to a choice, by its key and its values; with another they are refused.
_BELONGS: dict[str, tuple[str, tuple[str, ...]]] = {
    "quorum": ("mode", ("synchronous",)),
    "deadline_seconds": ("mode", ("synchronous",)),
    "over_selection": ("mode", ("synchronous",)),
    "buffer_size": ("mode", ("fedbuff",)),
    "mixing": ("mode", ("fedasync",)),
    "staleness_exponent": ("mode", ("fedasync",)),
    "night_hours": ("availability", ("diurnal", "battery")),
    "on_hours": ("availability", ("churn",)),
    "off_hours": ("availability", ("churn",)),
    "weibull_shape": ("availability", ("churn",)),
    "battery_threshold": ("availability", ("battery",)),
    "charge_watts": ("availability", ("battery",)),
}


class Simulation(TraceKeys):
    """One simulated run; what is left out of a choice's own settings has the default named here.

    Attributes:
        mode: ``synchronous`` rounds; ``fedbuff``, which aggregates whenever ``buffer_size`` updates
            have come; ``fedasync``, which applies every update at once.
        devices: In the fleet.
        cohort: Devices asked for in a round; of the other two modes, devices at work at a time.
        rounds: Rounds, aggregations (``fedbuff``), or times ``cohort`` updates (``fedasync``).
        fleet: Name or TOML file of a mix of device profiles.
        channel: ``profile`` gives every device its own radio, ``paper`` the paper's link.
        snr_spread_db: Standard deviation of the mean SNR among devices of a kind: where they are.
            Assumed; drawn once a device, in whole decibels.
        speed_spread: Standard deviation of the logarithm of the speed among devices of a kind.
            Assumed; drawn once a device.
        local_steps: Optimiser steps of a task; its other figures are the reference job's.
        quorum: Share of the cohort whose updates end a round (1).
        deadline_seconds: The round ends then at the latest (never).
        over_selection: Devices asked for each update that the quorum needs (1). Who is lost is
            not replaced in its round.
        buffer_size: K of ``fedbuff`` (a tenth of the cohort).
        mixing: Alpha of ``fedasync`` (0.6).
        staleness_exponent: a of its weight alpha * (1 + staleness)**-a (0.5).
        selection: How those who are asked are chosen among those who check in.
        availability: When devices are there (``device_profiles/availability.py``); its settings are
            ``TraceKeys`` and the two keys after ``seed``.
    """

    mode: Mode = "synchronous"
    devices: Annotated[int, Field(ge=1, le=1_000_000)] = 1000
    cohort: Annotated[int, Field(ge=1, le=100_000)] = 100
    rounds: Annotated[int, Field(ge=1, le=100_000)] = 20
    fleet: str = "mixed"
    channel: Literal["paper", "profile"] = "profile"
    snr_spread_db: Annotated[float, Field(ge=0, le=8)] = 4.0
    speed_spread: Annotated[float, Field(ge=0, le=2)] = 0.25
    local_steps: Annotated[int, Field(ge=1, le=1_000_000)] = 50
    quorum: Annotated[float, Field(gt=0, le=1)] | None = None
    deadline_seconds: Annotated[float, Field(gt=0)] | None = None
    over_selection: Annotated[float, Field(ge=1, le=10)] | None = None
    buffer_size: Annotated[int, Field(ge=1, le=100_000)] | None = None
    mixing: Annotated[float, Field(gt=0, le=1)] | None = None
    staleness_exponent: Annotated[float, Field(ge=0, le=10)] | None = None
    selection: Selection = "uniform"
    availability: Trace = "always"
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    battery_threshold: float | None = None
    charge_watts: float | None = None

    @property
    def rules(self) -> RoundRules:
        """When a synchronous round ends."""
        deadline = self.deadline_seconds
        return RoundRules(
            quorum=1.0 if self.quorum is None else self.quorum,
            deadline_seconds=math.inf if deadline is None else deadline,
            over_selection=1.0 if self.over_selection is None else self.over_selection,
            replacements=False,
        )

    @property
    def asked(self) -> int:
        """Devices that a synchronous round asks, at most all."""
        return min(self.devices, self.rules.asked(self.cohort))

    @property
    def buffer(self) -> int:
        """Updates that make an aggregation of the two modes without rounds."""
        if self.mode == "fedasync":
            return 1
        return self.buffer_size or max(1, self.cohort // 10)

    def trace(self, capacity_joules: Floats) -> Availability:
        """Return when the devices of the fleet are there.

        Args:
            capacity_joules: Of their batteries, infinite where there is none. Shape (N,).

        Raises:
            InputError: If a setting of the trace is out of its range.
        """
        if self.availability in ("diurnal", "churn"):
            return self.trace_of(self.availability, self.devices, self.seed)
        if self.availability == "battery":
            own = given(threshold=self.battery_threshold, charge_watts=self.charge_watts)
            battery = BatterySettings(night=self.night, **own)
            return Batteries(capacity_joules, self.seed, battery)
        return Always()


def load_simulation(path: Path | None, options: dict[str, Any]) -> Simulation:
    """Return the simulation of a file (or the defaults) with the given options on top.

    Raises:
        InputError: Naming file, key, value and remedy.
    """
    values = read_toml(path) if path is not None else {}
    settings = check(
        Simulation, {**values, **options}, str(path) if path is not None else "options"
    )
    for key, (choice, owners) in _BELONGS.items():
        check_belongs(settings, key, choice, owners)
    if settings.cohort > settings.devices:
        raise InputError(
            f"cohort = {settings.cohort} of devices = {settings.devices}; choose at most as many "
            "as there are"
        )
    if settings.buffer > settings.cohort:
        raise InputError(
            f"buffer_size = {settings.buffer} with cohort = {settings.cohort}; choose at most the "
            "devices that are at work"
        )
    return settings
