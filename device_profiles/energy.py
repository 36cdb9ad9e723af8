"""Time and energy of a device's part of a round: each activity apart.

SI units: FLOP, FLOP/s, seconds, joules, watts. Every figure says whether it is modelled from the
profile or measured on the device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from device_profiles.channel import Link, check_bits, upload
from device_profiles.errors import InputError
from device_profiles.modules import BaseShape
from device_profiles.profile import Compute

Basis = Literal["modelled", "measured"]


@dataclass(frozen=True, kw_only=True)
class TimeAndEnergy:
    """Seconds and joules of one activity, and where they are from."""

    seconds: float
    joules: float
    basis: Basis = "modelled"


NOTHING = TimeAndEnergy(seconds=0.0, joules=0.0)


@dataclass(frozen=True, kw_only=True)
class UplinkCost:
    """What one upload cost.

    Attributes:
        seconds: The delay: from its first block until its bits were through.
        transmit: Radiated power over the time on the air.
        circuit: The radio's electronics over the time it was on.
        delivered: Whether it arrived (``device_profiles/channel.py``).
    """

    seconds: float
    transmit: TimeAndEnergy
    circuit: TimeAndEnergy
    delivered: bool = True

    @property
    def joules(self) -> float:
        """Energy of both kinds."""
        return self.transmit.joules + self.circuit.joules


@dataclass(frozen=True, kw_only=True)
class RoundCosts:
    """What a round cost a device, activity by activity; nothing is counted twice.

    Attributes:
        compute: Training.
        transmit: What the uplink radiated.
        circuit: The radio's electronics during the uplink.
        receive: The downlink.
        idle: Waiting for others.
    """

    compute: TimeAndEnergy = NOTHING
    transmit: TimeAndEnergy = NOTHING
    circuit: TimeAndEnergy = NOTHING
    receive: TimeAndEnergy = NOTHING
    idle: TimeAndEnergy = NOTHING

    def parts(self) -> dict[str, TimeAndEnergy]:
        """Return every activity by name, in the order of the fields."""
        return {
            "compute": self.compute,
            "transmit": self.transmit,
            "circuit": self.circuit,
            "receive": self.receive,
            "idle": self.idle,
        }

    @property
    def joules(self) -> float:
        """Energy of all activities: what a battery gives. Seconds overlap and have no sum."""
        return math.fsum(part.joules for part in self.parts().values())


def training_flops_per_token(
    base_parameters: int, trainable_parameters: int, base: BaseShape, tokens: int
) -> float:
    """Return the floating-point operations per token of a training step.

    ``4*N + 6*(A + L) + 12*layers*T*D``: a frozen weight costs a forward and an input-gradient pass,
    never a weight gradient.
    """
    attention = 12 * base.layers * tokens * base.width
    return 4 * base_parameters + 6 * trainable_parameters + attention


def compute_cost(flops: float, compute: Compute) -> TimeAndEnergy:
    """Return what ``flops`` >= 0 take: at the stated power, or by clock cycles where it has those.

    Raises:
        InputError: If ``flops`` is negative or not finite.
    """
    _check("flops", flops)
    if compute.kappa is not None and compute.flops_per_cycle and compute.frequency_hz:
        return cycle_cost(flops / compute.flops_per_cycle, compute.kappa, compute.frequency_hz)
    seconds = flops / compute.flops
    return TimeAndEnergy(seconds=seconds, joules=seconds * compute.watts)


def cycle_cost(cycles: float, kappa: float, frequency_hz: float) -> TimeAndEnergy:
    """Return what C clock cycles take at f hertz: C/f seconds and kappa*C*f**2 joules.

    Args:
        cycles: >= 0.
        kappa: Effective switched capacitance, > 0, joules a cycle and square hertz.
        frequency_hz: > 0.

    Raises:
        InputError: If one is out of its range.

    Source: Burd and Brodersen, Processor Design for Portable Systems, 1996.
    """
    _check("cycles", cycles)
    for name, value in (("kappa", kappa), ("frequency_hz", frequency_hz)):
        if not (math.isfinite(value) and value > 0):
            raise InputError(f"{name} = {value}; give a value above 0")
    return TimeAndEnergy(seconds=cycles / frequency_hz, joules=kappa * cycles * frequency_hz**2)


def uplink_cost(
    bits: float, link: Link, generator: np.random.Generator, circuit_watts: float = 0.0
) -> UplinkCost:
    """Return what sending ``bits`` takes.

    Raises:
        InputError: See ``channel.upload``; or ``circuit_watts`` is negative or not finite.
    """
    _check("circuit_watts", circuit_watts)
    sent = upload(bits, link, generator)
    return UplinkCost(
        seconds=sent.seconds,
        transmit=TimeAndEnergy(seconds=sent.air_seconds, joules=sent.transmit_joules),
        circuit=power_cost(sent.radio_seconds, circuit_watts),
        delivered=sent.delivered,
    )


def downlink_seconds(bits: float, link: Link) -> float:
    """Return the time to receive ``bits`` at the AWGN rate of the whole band.

    The base station knows the channel and has power to spare, and sends to all at once: fading is
    not drawn on the way down, and the band is not shared.

    Raises:
        InputError: If ``bits`` is negative or not finite.
    """
    return check_bits(bits) / link.awgn_rate


def downlink_cost(bits: float, link: Link, receive_watts: float) -> TimeAndEnergy:
    """Return what receiving ``bits`` takes.

    Raises:
        InputError: If ``bits`` or ``receive_watts`` is negative or not finite.
    """
    _check("receive_watts", receive_watts)
    return power_cost(downlink_seconds(bits, link), receive_watts)


def power_cost(seconds: float, watts: float, basis: Basis = "modelled") -> TimeAndEnergy:
    """Return what ``watts`` >= 0 take in ``seconds`` >= 0: waiting, or a time that was measured.

    ``basis`` is that of the time; a power is the profile's.

    Raises:
        InputError: If one of the two is negative or not finite.
    """
    _check("seconds", seconds)
    _check("watts", watts)
    return TimeAndEnergy(seconds=seconds, joules=seconds * watts, basis=basis)


def _check(name: str, value: float) -> float:
    if not (math.isfinite(value) and value >= 0):
        raise InputError(f"{name} = {value}; give 0 or more")
    return value
