"""What the blocks of an upload carry, at the scheme of its link.

SI units: hertz, bit/s; SNR is a power ratio. ``device_profiles/channel.py`` says what the schemes
are.
"""

from __future__ import annotations

import math

import numpy as np

from device_profiles.closed_forms import inverse_gain_mean, least_gain
from device_profiles.fading import Floats, draw_gains
from device_profiles.link import Link


def draw_snr(link: Link, generator: np.random.Generator) -> float:
    """Return the SNR that an upload's rates follow, its shadowing drawn where there is any."""
    if link.shadowing_db == 0:
        return link.sending_snr()
    return link.sending_snr(link.shadowing_db * float(generator.standard_normal()))


def block_rates(link: Link, blocks: int, generator: np.random.Generator) -> Floats:
    """Return the bits over the length of each of an upload's first blocks, bit/s. Shape (blocks,).

    A block that fails, or in which the sender is silent, carries 0.
    Source: Tse and Viswanath, Fundamentals of Wireless Communication, section 5.4.
    """
    snr = draw_snr(link, generator)
    gains = draw_gains(link.gain_k, blocks, generator)
    if link.scheme == "adaptive":
        return adaptive_rates(link, snr, gains)
    least, rate = on_off(link, snr)
    return np.where(gains >= least, rate, 0.0)


def adaptive_rates(
    link: Link, snr: float | Floats, gains: Floats, out: Floats | None = None
) -> Floats:
    """Return what blocks of these gains carry at the best rate of each, bit/s. Shape of ``gains``.

    ``snr`` is one number, or of a shape that broadcasts to that of ``gains``. ``out`` is where to
    put it, ``gains`` itself for one, or a new array.
    """
    rates = np.multiply(snr, gains, out=out)
    np.log1p(rates, out=rates)
    hertz = link.band_hz * link.share.time
    return np.multiply(hertz / math.log(2), rates, out=rates)


def pilot_rate(link: Link, generator: np.random.Generator) -> float:
    """Return the best rate of the first block, bit/s, as a pilot shows it before an upload.

    A fresh generator of an upload's stream gives that upload's own shadowing and first block.
    """
    snr = draw_snr(link, generator)
    return float(adaptive_rates(link, snr, draw_gains(link.gain_k, 1, generator))[0])


def on_off(link: Link, snr: float) -> tuple[float, float]:
    """Return the least gain of a block that carries bits, and its rate over the block, bit/s.

    Of the schemes other than ``adaptive``, at a sending SNR.
    """
    if link.scheme == "inversion":
        least = link.least_sending_gain()
        rate = math.log1p(snr / inverse_gain_mean(least, link.gain_k)) / math.log(2)
    else:
        rate = link.sending_rate(snr)
        least = least_gain(rate, snr)
    return least, rate * link.band_hz * link.share.time
