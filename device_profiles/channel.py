"""Time on the air, delay and transmit energy of one update over a block-fading uplink.

SI units: bits, hertz, watts, seconds, joules. An upload gathers bits over coherence blocks until
all are through: the mean of one draw for a whole upload does not exist (E[1/R] diverges over one
Rayleigh coefficient). A block lasts ``coherence_seconds``; of that a client under TDMA has its
share, in which it sends as it would alone.

The schemes, block by block of gain X:

- ``adaptive``: sends log2(1 + snr*X). Nothing is lost; the last block is left when the bits are
  through.
- ``fixed-rate``: sends r bit/s/Hz, received if log2(1 + snr*X) >= r. What is lost is sent again in
  the next block: in the same one it would be lost again.
- ``outage``: the same, without an answer from the receiver. If any block is lost, the whole update
  is dropped (``delivered`` is false): its parts are of no use apart. The sender does not know, and
  spends time and energy in full.
- ``inversion``: sends where X >= x0, at power P/(X E[1/X; X >= x0]), which makes the received SNR
  constant and the mean power over all blocks P; waits for the next block otherwise.

A link on which an upload takes over ``MOST_BLOCKS`` blocks is a mistake and refused. Where
shadowing alone makes it so, the sender gives up after that many: not delivered, time and energy
spent.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from device_profiles.blocks import MOST_BLOCKS, check_bits, check_blocks, pieces
from device_profiles.closed_forms import inverse_gain_mean
from device_profiles.fading import draw_gains, gain_below
from device_profiles.link import COHERENCE_SECONDS, PAPER_LINK, Link, profile_link
from device_profiles.rates import adaptive_rates, block_rates, draw_snr, on_off, pilot_rate

__all__ = [
    "BLOCKS_A_DRAW",
    "COHERENCE_SECONDS",
    "MOST_BLOCKS",
    "PAPER_LINK",
    "Link",
    "Upload",
    "block_rates",
    "check_bits",
    "given_up",
    "gives_up",
    "likely_blocks",
    "pilot_rate",
    "profile_link",
    "upload",
    "upload_seconds",
]

BLOCKS_A_DRAW = 1024


@dataclass(frozen=True, kw_only=True)
class Upload:
    """What one upload took.

    Attributes:
        seconds: From its first block until its bits are through: the delay.
        air_seconds: Of these, how long it radiated.
        radio_seconds: Of these, how long its radio was on: all, but other clients' turns (TDMA).
        transmit_joules: Radiated power over time.
        delivered: Whether it arrived; false where scheme ``outage`` lost it or the sender gave up.
    """

    seconds: float
    air_seconds: float
    radio_seconds: float
    transmit_joules: float
    delivered: bool = True


def upload_seconds(bits: float, link: Link, generator: np.random.Generator) -> float:
    """Return the delay of one upload of ``bits`` >= 0, delivered or not.

    Raises:
        InputError: See ``upload``.
    """
    return upload(bits, link, generator).seconds


def upload(bits: float, link: Link, generator: np.random.Generator) -> Upload:
    """Return what one upload of ``bits`` >= 0 took.

    Draws the shadowing first, where there is any, then the blocks.

    Raises:
        InputError: If ``bits`` is negative or not finite, or spans over ``MOST_BLOCKS`` blocks
            without shadowing.
    """
    if check_bits(bits) == 0:
        return Upload(seconds=0.0, air_seconds=0.0, radio_seconds=0.0, transmit_joules=0.0)
    snr = draw_snr(link, generator)
    if gives_up(bits, link, snr):
        return given_up(link)
    return _SCHEMES[link.scheme](float(bits), link, snr, generator)


def gives_up(bits: float, link: Link, snr: float) -> bool:
    """Return whether shadowing leaves an upload of ``bits`` > 0 too little SNR.

    Raises:
        InputError: If there is too little without shadowing.
    """
    if link.scheme == "adaptive" and link.gain_k == math.inf:
        return False  # one block is as good as any number
    check_blocks(likely_blocks(bits, link, link.sending_snr()), bits, link)
    return link.shadowing_db > 0 and likely_blocks(bits, link, snr) > MOST_BLOCKS


def given_up(link: Link) -> Upload:
    """Return an upload that shadowing made the sender give up after ``MOST_BLOCKS`` blocks."""
    seconds = MOST_BLOCKS * link.coherence_seconds
    active = 1.0
    if link.scheme == "inversion":
        active -= gain_below(link.least_sending_gain(), link.gain_k)
    return Upload(
        seconds=seconds,
        air_seconds=seconds * active * link.share.time,
        radio_seconds=seconds * link.share.time,
        transmit_joules=seconds * link.share.time * link.transmit_watts,
        delivered=False,
    )


def likely_blocks(bits: float, link: Link, snr: float) -> float:
    """Return about how many blocks an upload of ``bits`` > 0 takes, rather too few than too many.

    Under scheme ``adaptive``: as many as without fading.
    """
    if link.scheme == "adaptive":
        steady = float(adaptive_rates(link, snr, np.ones(1))[0])
        return bits / (steady * link.coherence_seconds)
    least, rate = on_off(link, snr)
    blocks = pieces(bits, rate * link.coherence_seconds)[0] + 1
    through = 1.0 if link.scheme == "outage" else 1 - gain_below(least, link.gain_k)
    return blocks / through if through else math.inf


def _adaptive(bits: float, link: Link, snr: float, generator: np.random.Generator) -> Upload:
    if link.gain_k == math.inf:
        return _constant_power(link, bits / float(adaptive_rates(link, snr, np.ones(1))[0]))
    left, seconds = bits, 0.0
    while True:
        rates = adaptive_rates(link, snr, draw_gains(link.gain_k, BLOCKS_A_DRAW, generator))
        through = np.cumsum(rates * link.coherence_seconds)
        if through[-1] < left:
            left -= float(through[-1])
            seconds += BLOCKS_A_DRAW * link.coherence_seconds
            continue
        last = int(np.searchsorted(through, left))
        before = float(through[last - 1]) if last else 0.0
        seconds += last * link.coherence_seconds
        return _constant_power(link, seconds + (left - before) / float(rates[last]))


def _fixed_rate(bits: float, link: Link, snr: float, generator: np.random.Generator) -> Upload:
    least, rate = on_off(link, snr)
    whole, rest = pieces(bits, rate * link.coherence_seconds)
    through = 1 - gain_below(least, link.gain_k)
    # So many blocks fail before the given number succeed.
    failed = int(generator.negative_binomial(whole, through)) if whole else 0
    rest_failed = int(generator.negative_binomial(1, through))
    return _constant_power(
        link,
        (whole + failed + rest_failed + rest) * link.coherence_seconds,
        on_air=(whole + failed + (rest_failed + 1) * rest) * link.coherence_seconds,
    )


def _outage(bits: float, link: Link, snr: float, generator: np.random.Generator) -> Upload:
    least, rate = on_off(link, snr)
    whole, rest = pieces(bits, rate * link.coherence_seconds)
    every_block = math.exp((whole + 1) * _log1m(gain_below(least, link.gain_k)))
    delivered = bool(generator.random() < every_block)
    return _constant_power(link, (whole + rest) * link.coherence_seconds, delivered=delivered)


def _inversion(bits: float, link: Link, snr: float, generator: np.random.Generator) -> Upload:
    least, rate = on_off(link, snr)
    whole, rest = pieces(bits, rate * link.coherence_seconds)
    walked, left, powers = 0, whole + 1, 0.0
    while True:
        gains = draw_gains(link.gain_k, BLOCKS_A_DRAW, generator)
        sending = np.flatnonzero(gains >= least)[:left]
        powers += float(np.sum(1 / gains[sending]))
        if sending.size == left:
            break
        left -= sending.size
        walked += BLOCKS_A_DRAW
    last = int(sending[-1])
    powers -= (1 - rest) / float(gains[last])
    air = (whole + rest) * link.coherence_seconds * link.share.time
    seconds = (walked + last + rest) * link.coherence_seconds
    watts = link.transmit_watts / inverse_gain_mean(least, link.gain_k)  # at a gain of 1
    return Upload(
        seconds=seconds,
        air_seconds=air,
        radio_seconds=seconds * link.share.time,
        transmit_joules=watts * powers * link.coherence_seconds * link.share.time,
    )


_SCHEMES: dict[str, Callable[[float, Link, float, np.random.Generator], Upload]] = {
    "adaptive": _adaptive,
    "fixed-rate": _fixed_rate,
    "outage": _outage,
    "inversion": _inversion,
}


def _constant_power(
    link: Link, seconds: float, *, on_air: float | None = None, delivered: bool = True
) -> Upload:
    """Return an upload at full power; in its turns where turns are taken."""
    air = (seconds if on_air is None else on_air) * link.share.time
    return Upload(
        seconds=seconds,
        air_seconds=air,
        radio_seconds=seconds * link.share.time,
        transmit_joules=air * link.transmit_watts,
        delivered=delivered,
    )


def _log1m(probability: float) -> float:
    """Return ln(1 - p), minus infinity at 1."""
    return math.log1p(-probability) if probability < 1 else -math.inf
