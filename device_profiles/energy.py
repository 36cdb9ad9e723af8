"""Time and energy of a device's part of a round: compute and uplink, each apart.

SI units: FLOP, FLOP/s, seconds, joules, watts. Modelled from the profile; a real client measures
its compute time instead.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from device_profiles.channel import Link, check_bits, upload_seconds
from device_profiles.modules import BaseShape
from device_profiles.profile import Compute


@dataclass(frozen=True, kw_only=True)
class TimeAndEnergy:
    """Seconds and joules of one activity."""

    seconds: float
    joules: float


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
    """Return what ``flops`` >= 0 take at the device's sustained rate and power."""
    seconds = flops / compute.flops
    return TimeAndEnergy(seconds=seconds, joules=seconds * compute.watts)


def uplink_cost(bits: float, link: Link, generator: np.random.Generator) -> TimeAndEnergy:
    """Return what sending ``bits`` takes: airtime, and transmit power times airtime.

    Raises:
        InputError: See ``upload_seconds``.
    """
    seconds = upload_seconds(bits, link, generator)
    return TimeAndEnergy(seconds=seconds, joules=seconds * link.transmit_watts)


def downlink_seconds(bits: float, link: Link) -> float:
    """Return the time to receive ``bits`` at the AWGN rate of the link.

    The base station knows the channel and has power to spare, so fading is not drawn on the way
    down; receiving is assumed to cost the device no energy of note in this version.

    Raises:
        InputError: If ``bits`` is negative or not finite.
    """
    return check_bits(bits) / link.awgn_rate
