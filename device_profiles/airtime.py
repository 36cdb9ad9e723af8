"""What an upload takes on average, without drawing one: for planning.

SI units: bits, seconds, joules. The figures are those of ``device_profiles/channel.py``, scheme by
scheme. Exact but for ``adaptive``, where renewal theory gives the mean up to a term that vanishes
with the number of blocks: at 5 dB within 0.5 % from three blocks on, and 0.1 % from ten.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from device_profiles.blocks import check_bits, pieces
from device_profiles.channel import given_up, gives_up
from device_profiles.closed_forms import inversion_rate, least_gain, rate_moments
from device_profiles.fading import gain_below
from device_profiles.link import Link

#: Standard deviations of shadowing, and the probability that each stands for: equal steps, which
#: take a sudden end (the sender gives up) better than a Gauss rule does.
_SHADOWS = np.linspace(-8, 8, 321)
_WEIGHTS = np.exp(-(_SHADOWS**2) / 2) / np.exp(-(_SHADOWS**2) / 2).sum()


@dataclass(frozen=True, kw_only=True)
class ExpectedUpload:
    """The mean of each figure of an upload.

    Attributes:
        seconds: Of the delay.
        spread_seconds: Standard deviation of the delay.
        air_seconds: Of the time on the air.
        transmit_joules: Of the energy radiated.
        delivered: Probability that it arrives.
    """

    seconds: float
    spread_seconds: float
    air_seconds: float
    transmit_joules: float
    delivered: float


def expected_upload(bits: float, link: Link) -> ExpectedUpload:
    """Return the mean of each figure of an upload of ``bits`` >= 0, over fading and shadowing.

    Uploads that are given up count with the time and energy spent on them. Under shadowing a fixed
    rate, where given, has a mean that such uploads dominate: without an end it would have none.

    Raises:
        InputError: See ``channel.upload``.
    """
    if check_bits(bits) == 0:
        return ExpectedUpload(
            seconds=0.0, spread_seconds=0.0, air_seconds=0.0, transmit_joules=0.0, delivered=1.0
        )
    gives_up(bits, link, link.sending_snr())  # refuses a link too weak for any
    expect = _SCHEMES[link.scheme]
    if link.shadowing_db == 0:
        return expect(bits, link, link.sending_snr())
    snrs = [link.sending_snr(link.shadowing_db * float(shadow)) for shadow in _SHADOWS]
    each = [
        _given_up(link) if gives_up(bits, link, snr) else expect(bits, link, snr) for snr in snrs
    ]
    seconds = float(_WEIGHTS @ [one.seconds for one in each])
    squares = [one.spread_seconds**2 + (one.seconds - seconds) ** 2 for one in each]
    return ExpectedUpload(
        seconds=seconds,
        spread_seconds=math.sqrt(float(_WEIGHTS @ squares)),
        air_seconds=float(_WEIGHTS @ [one.air_seconds for one in each]),
        transmit_joules=float(_WEIGHTS @ [one.transmit_joules for one in each]),
        delivered=float(_WEIGHTS @ [one.delivered for one in each]),
    )


def _adaptive(bits: float, link: Link, snr: float) -> ExpectedUpload:
    moments = rate_moments(snr, link.gain_k)
    blocks = bits / (_bits_a_block(link, 1.0) * moments.mean)
    relative = moments.variance / moments.mean**2
    # The block in which the bits get through is longer than most: a half of the variance on top.
    return _expected(
        link, blocks + relative / 2, variance=blocks * relative, on_air=blocks + relative / 2
    )


def _fixed_rate(bits: float, link: Link, snr: float) -> ExpectedUpload:
    rate = link.sending_rate(snr)
    whole, rest = pieces(bits, _bits_a_block(link, rate))
    through = 1 - gain_below(least_gain(rate, snr), link.gain_k)
    failed = (1 - through) / through  # before each success
    return _expected(
        link,
        (whole + 1) * failed + whole + rest,
        variance=(whole + 1) * failed / through,
        on_air=(whole + rest) / through,
    )


def _outage(bits: float, link: Link, snr: float) -> ExpectedUpload:
    rate = link.sending_rate(snr)
    whole, rest = pieces(bits, _bits_a_block(link, rate))
    fails = gain_below(least_gain(rate, snr), link.gain_k)
    delivered = (1 - fails) ** (whole + 1)
    return _expected(link, whole + rest, variance=0.0, on_air=whole + rest, delivered=delivered)


def _inversion(bits: float, link: Link, snr: float) -> ExpectedUpload:
    least = link.least_sending_gain()
    rate = inversion_rate(snr, least, link.gain_k)
    whole, rest = pieces(bits, _bits_a_block(link, rate))
    active = 1 - gain_below(least, link.gain_k)
    silent = (1 - active) / active  # before each block that it sends in
    return _expected(
        link,
        (whole + 1) * silent + whole + rest,
        variance=(whole + 1) * silent / active,
        on_air=whole + rest,
        power=1 / active,  # what it saves in silence it adds while it sends
    )


_SCHEMES: dict[str, Callable[[float, Link, float], ExpectedUpload]] = {
    "adaptive": _adaptive,
    "fixed-rate": _fixed_rate,
    "outage": _outage,
    "inversion": _inversion,
}


def _bits_a_block(link: Link, rate: float) -> float:
    return rate * link.band_hz * link.share.time * link.coherence_seconds


def _expected(
    link: Link,
    blocks: float,
    *,
    variance: float,
    on_air: float,
    power: float = 1.0,
    delivered: float = 1.0,
) -> ExpectedUpload:
    """Return blocks as seconds; ``power`` is while it sends, over the mean power."""
    air = on_air * link.coherence_seconds * link.share.time
    return ExpectedUpload(
        seconds=blocks * link.coherence_seconds,
        spread_seconds=math.sqrt(variance) * link.coherence_seconds,
        air_seconds=air,
        transmit_joules=air * link.transmit_watts * power,
        delivered=delivered,
    )


def _given_up(link: Link) -> ExpectedUpload:
    spent = given_up(link)
    return ExpectedUpload(
        seconds=spent.seconds,
        spread_seconds=0.0,
        air_seconds=spent.air_seconds,
        transmit_joules=spent.transmit_joules,
        delivered=0.0,
    )
