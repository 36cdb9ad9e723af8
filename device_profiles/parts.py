"""The parts of a device's profile: its compute, its memory, its radio, and its power modes.

SI units: bytes, FLOP/s, watts, hertz; SNR is in decibels. A file may write a figure with a unit
instead (see ``units``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, model_validator

from device_profiles.config_files import Config
from device_profiles.units import (
    ByteRate,
    Bytes,
    Decibels,
    FlopRate,
    Frequency,
    Plain,
    Power,
    parse_figure,
)

MOST_RESERVED_BYTES = 4_000_000_000  # assumed: a desktop with a browser
_CYCLES = "'kappa', 'flops_per_cycle' and 'frequency_hz'"


class Compute(Config):
    """How fast the device trains, and at what power.

    A file gives ``flops`` and ``watts``, or in their place all of ``kappa``, ``flops_per_cycle``
    and ``frequency_hz``, or neither where power modes do.

    Attributes:
        kappa: Effective switched capacitance, > 0: a clock of f Hz takes ``kappa * f**3`` watts.
        flops_per_cycle: Sustained over a clock cycle, all cores together, > 0.
        frequency_hz: Clock while training, > 0.
        flops: Sustained FLOP/s in fp32 training, > 0.
        watts: Power of the whole device at that rate, > 0.
        idle_watts: Power while it waits, 0 to ``watts``; 0 where it is not counted.
    """

    kappa: Plain | None = None
    flops_per_cycle: Plain | None = None
    frequency_hz: Frequency | None = None
    flops: FlopRate = Field(description=f"it with 'watts', or {_CYCLES} in place of both")
    watts: Annotated[Power, Field(gt=0)]
    idle_watts: Power = 0.0

    @model_validator(mode="before")
    @classmethod
    def _cycles_give_rate_and_power(cls, values: Any) -> Any:
        """Fill in what the clock gives; figures that are wrong are told by their own fields."""
        if not isinstance(values, Mapping) or "flops" in values or "watts" in values:
            return values
        try:
            kappa = parse_figure(values.get("kappa"), "plain")
            per_cycle = parse_figure(values.get("flops_per_cycle"), "plain")
            hertz = parse_figure(values.get("frequency_hz"), "frequency")
        except ValueError:
            return values
        return {**values, "flops": per_cycle * hertz, "watts": kappa * hertz**3}

    @model_validator(mode="after")
    def _is_stated_once(self) -> Compute:
        kappa, per_cycle, hertz = self.kappa, self.flops_per_cycle, self.frequency_hz
        if (kappa, per_cycle, hertz) != (None, None, None):
            if kappa is None or per_cycle is None or hertz is None:
                raise ValueError(f"give 'flops' and 'watts', or {_CYCLES}, not some of each")
            # A record that was written out has both, and they are the same.
            if (self.flops, self.watts) != (per_cycle * hertz, kappa * hertz**3):
                raise ValueError(
                    f"'flops' and 'watts' are given beside {_CYCLES}, which make "
                    f"{per_cycle * hertz:.4g} FLOP/s and {kappa * hertz**3:.4g} W; give one of both"
                )
        check_idle(self.idle_watts, self.watts, "watts")
        return self


class Memory(Config):
    """What a model has to fit into.

    Attributes:
        bytes: Of the whole device, > 0.
        bandwidth: Bytes/s, > 0; left out where every power mode states its own.
        reserved_bytes: What the system and other programs keep, below ``bytes``. By itself a
            quarter of ``bytes``, at most ``MOST_RESERVED_BYTES``: an assumption.
    """

    bytes: Annotated[Bytes, Field(gt=0)]
    bandwidth: ByteRate
    reserved_bytes: Bytes = Field(
        default_factory=lambda got: min(got["bytes"] // 4, MOST_RESERVED_BYTES)
    )

    @property
    def free_bytes(self) -> int:
        """What training can have, bytes > 0."""
        return self.bytes - self.reserved_bytes

    @model_validator(mode="after")
    def _something_is_free(self) -> Memory:
        if self.reserved_bytes >= self.bytes:
            raise ValueError(
                f"reserved_bytes = {self.reserved_bytes} leaves nothing of bytes = {self.bytes}; "
                f"give less than that"
            )
        return self


class Radio(Config):
    """The link to the base station.

    Attributes:
        snr_db: Mean received power over noise power, decibels, -100 to 100.
        bandwidth_hz: > 0.
        transmit_watts: Radiated while sending, >= 0.
        circuit_watts: Taken by the electronics besides, while sending, >= 0; 0: not counted.
        receive_watts: While receiving, >= 0; 0: not counted.
    """

    snr_db: Decibels
    bandwidth_hz: Frequency
    transmit_watts: Power
    circuit_watts: Power = 0.0
    receive_watts: Power = 0.0


class Mode(Config):
    """A power mode of the device, such as nvpmodel's.

    Attributes:
        flops: Sustained FLOP/s in fp32 training, > 0.
        watts: Power of the whole device at that rate, > 0.
        bandwidth: Of the memory in this mode, bytes/s; stated by every mode or by none.
    """

    flops: FlopRate
    watts: Annotated[Power, Field(gt=0)]
    bandwidth: ByteRate | None = None


def check_idle(idle: float, full: float, name: str) -> None:
    """Hold that waiting takes no more power than training.

    Raises:
        ValueError: If it does.
    """
    if idle > full:
        raise ValueError(f"idle_watts = {idle:g} is above {name} = {full:g}; give less")
