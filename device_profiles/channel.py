"""Time to send one update over a block-fading uplink.

SI units: bits, hertz, watts, seconds. SNR is a power ratio unless a name says ``_db``. An upload
gathers bits over coherence blocks until all are through: the mean of one draw for a whole upload
does not exist (E[1/R] diverges over one Rayleigh coefficient).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from device_profiles.config_files import choose
from device_profiles.errors import InputError
from device_profiles.profile import Radio

COHERENCE_SECONDS = 0.01  # assumed: a pedestrian at 2 GHz
MOST_BLOCKS = 10_000_000  # an upload of more (28 hours at 10 ms) is a mistake in the link
_BLOCKS_A_DRAW = 1024


@dataclass(frozen=True, kw_only=True)
class Link:
    """One device's uplink, on spectrum of its own (no sharing in this version).

    Attributes:
        snr_db: Mean received power over noise power, decibels, -100 to 100.
        bandwidth_hz: > 0.
        transmit_watts: >= 0.
        fading: ``rayleigh`` (X ~ Exp(1) per coherence block) or ``none`` (AWGN).
        coherence_seconds: How long a fading state lasts, > 0.
    """

    snr_db: float
    bandwidth_hz: float
    transmit_watts: float
    fading: Literal["rayleigh", "none"] = "rayleigh"
    coherence_seconds: float = COHERENCE_SECONDS

    def __post_init__(self) -> None:
        for name in ("bandwidth_hz", "coherence_seconds"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise InputError(f"{name} = {value}; give a value above 0")
        if not (math.isfinite(self.transmit_watts) and self.transmit_watts >= 0):
            raise InputError(f"transmit_watts = {self.transmit_watts}; give 0 or more")
        if not -100 <= self.snr_db <= 100:
            raise InputError(f"snr_db = {self.snr_db}; give -100 to 100 decibels")
        choose("fading", self.fading, ("rayleigh", "none"))

    @property
    def snr(self) -> float:
        """Mean SNR as a power ratio."""
        return math.pow(10.0, self.snr_db / 10)

    @property
    def awgn_rate(self) -> float:
        """Rate without fading, bit/s: no mean rate under fading is above it."""
        return self.bandwidth_hz * math.log1p(self.snr) / math.log(2)


#: The link of arXiv 2404.13238v2; its coherence time is not stated there and assumed here.
PAPER_LINK = Link(snr_db=5.0, bandwidth_hz=1e6, transmit_watts=1.0)


def profile_link(radio: Radio) -> Link:
    """Return the link of a device's own radio."""
    return Link(
        snr_db=radio.snr_db, bandwidth_hz=radio.bandwidth_hz, transmit_watts=radio.transmit_watts
    )


def block_rates(link: Link, blocks: int, generator: np.random.Generator) -> npt.NDArray[np.float64]:
    """Return the rate of each of ``blocks`` coherence blocks, bit/s. Shape (blocks,).

    Source: Tse and Viswanath, Fundamentals of Wireless Communication, section 5.4.
    """
    if link.fading == "none":
        return np.full(blocks, link.awgn_rate)
    gain = generator.standard_exponential(blocks)
    return np.asarray(link.bandwidth_hz / math.log(2) * np.log1p(link.snr * gain), dtype=np.float64)


def check_bits(bits: float) -> float:
    """Return ``bits`` if so much can be sent.

    Raises:
        InputError: If it is negative or not finite.
    """
    if not (math.isfinite(bits) and bits >= 0):
        raise InputError(f"bits = {bits}; a transmission has 0 or more, and an end")
    return float(bits)


def upload_seconds(bits: float, link: Link, generator: np.random.Generator) -> float:
    """Return the airtime of one upload of ``bits`` >= 0, block by block.

    Raises:
        InputError: If ``bits`` is negative or not finite, or spans over ``MOST_BLOCKS`` blocks.
    """
    left, seconds = check_bits(bits), 0.0
    if link.fading == "none":
        return left / link.awgn_rate
    blocks = left / (link.awgn_rate * link.coherence_seconds)
    if blocks > MOST_BLOCKS:
        raise InputError(
            f"an upload of {left:.4g} bits at snr_db = {link.snr_db:g}, "
            f"bandwidth_hz = {link.bandwidth_hz:g} and "
            f"coherence_seconds = {link.coherence_seconds:g} spans {blocks:.3g} coherence blocks, "
            f"above {MOST_BLOCKS:,}; raise one of the three"
        )
    while left > 0:
        rates = block_rates(link, _BLOCKS_A_DRAW, generator)
        through = np.cumsum(rates * link.coherence_seconds)
        if through[-1] < left:
            left -= float(through[-1])
            seconds += _BLOCKS_A_DRAW * link.coherence_seconds
            continue
        last = int(np.searchsorted(through, left))
        before = float(through[last - 1]) if last else 0.0
        return seconds + last * link.coherence_seconds + (left - before) / float(rates[last])
    return seconds
