"""What theory says of a fading channel, for planning and as a measure of the simulation.

Rates in bit/s/Hz, powers as ratios, ``snr`` the mean received power over noise power. ``rician_k``
is 0 for Rayleigh fading and ``math.inf`` for none (``device_profiles/fading.py``). Where a formula
is known for Rayleigh fading alone, it is named in the docstring, and tests hold the two together.
Source, unless another is named: Tse and Viswanath, Fundamentals of Wireless Communication, ch. 5.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from device_profiles.errors import InputError
from device_profiles.fading import Floats, gain_below, gain_expectation

_GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True, kw_only=True)
class RateMoments:
    """Of log2(1 + snr*X): mean (the ergodic rate), variance, and third central moment."""

    mean: float
    variance: float
    third: float


def awgn_rate(snr: float) -> float:
    """Return log2(1 + snr), the rate of a channel that does not fade."""
    return math.log1p(_positive("snr", snr)) / math.log(2)


def ergodic_rate(snr: float, rician_k: float = 0.0, above: float = 0.0) -> float:
    """Return E[log2(1 + snr*X); X >= above], silent blocks counted as 0.

    Rayleigh, every block: exp(1/snr) * E1(1/snr) / ln 2.

    Raises:
        InputError: If ``snr`` is not above 0.
    """
    _positive("snr", snr)
    return gain_expectation(lambda x: _rate(snr, x), rician_k, above)


@lru_cache(maxsize=1024)
def rate_moments(snr: float, rician_k: float = 0.0) -> RateMoments:
    """Return the first moments of the rate of one block.

    Raises:
        InputError: If ``snr`` is not above 0.
    """
    mean = ergodic_rate(snr, rician_k)
    variance, third = (
        gain_expectation(lambda x, n=n: (_rate(snr, x) - mean) ** n, rician_k)  # type: ignore[misc]
        for n in (2, 3)
    )
    return RateMoments(mean=mean, variance=variance, third=third)


def outage_probability(rate: float, snr: float, rician_k: float = 0.0) -> float:
    """Return P[log2(1 + snr*X) < rate]. Rayleigh: 1 - exp(-(2**rate - 1)/snr).

    Raises:
        InputError: If ``rate`` is negative or ``snr`` is not above 0.
    """
    return gain_below(least_gain(rate, snr), rician_k)


def least_gain(rate: float, snr: float) -> float:
    """Return the gain from which on a block carries ``rate``: (2**rate - 1)/snr.

    Raises:
        InputError: If ``rate`` is negative or ``snr`` is not above 0.
    """
    if not rate >= 0:
        raise InputError(f"rate = {rate}; give 0 bit/s/Hz or more")
    _positive("snr", snr)
    return math.expm1(rate * math.log(2)) / snr if rate < 1000 else math.inf


def outage_rate(probability: float, snr: float, rician_k: float = 0.0) -> float:
    """Return the rate that fails with that probability: the outage capacity.

    Rayleigh: log2(1 - snr * ln(1 - probability)).

    Raises:
        InputError: If ``probability`` is not between 0 and 1, or ``snr`` is not above 0.
    """
    if not 0 < probability < 1:
        raise InputError(f"probability = {probability}; give a number between 0 and 1")
    low, high = 0.0, 100.0  # of a gain: the largest that any law reaches is 49
    while high - low > 1e-15 * high:
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if gain_below(middle, rician_k) < probability else (low, middle)
    return float(_rate(_positive("snr", snr), np.array([low]))[0])


def goodput(rate: float, snr: float, rician_k: float = 0.0) -> float:
    """Return rate * P[no outage]: a fixed rate, each failed block sent again.

    Raises:
        InputError: If ``rate`` is negative or ``snr`` is not above 0.
    """
    return rate * (1 - outage_probability(rate, snr, rician_k))


def mean_transmissions(rate: float, snr: float, rician_k: float = 0.0) -> float:
    """Return how often a block is sent until it is through, on average: 1 / P[no outage].

    Raises:
        InputError: If ``rate`` is negative or ``snr`` is not above 0.
    """
    through = 1 - outage_probability(rate, snr, rician_k)
    return 1 / through if through > 0 else math.inf


@lru_cache(maxsize=1024)
def best_fixed_rate(snr: float, rician_k: float = 0.0) -> float:
    """Return the rate of the highest goodput. Rayleigh: W0(snr)/ln 2.

    Raises:
        InputError: If ``snr`` is not above 0.
    """
    _positive("snr", snr)
    if rician_k == math.inf:
        return awgn_rate(snr)
    if rician_k == 0:
        return _lambert_w(snr) / math.log(2)
    # The goodput has one top; it is bracketed on a grid and closed in on by golden section.
    grid = np.linspace(0, float(_rate(snr, np.array([4.0]))[0]), 101)
    top = int(np.argmax([goodput(float(rate), snr, rician_k) for rate in grid]))
    low, high = float(grid[max(0, top - 1)]), float(grid[min(100, top + 1)])
    while high - low > 1e-9 * high:
        step = _GOLDEN * (high - low)
        if goodput(high - step, snr, rician_k) < goodput(low + step, snr, rician_k):
            low = high - step
        else:
            high = low + step
    return (low + high) / 2


def best_gain_mean(users: int) -> float:
    """Return E[max of ``users`` Rayleigh gains]: the harmonic number 1 + 1/2 + ... + 1/users.

    Raises:
        InputError: If there is no user.
    """
    return math.fsum(1 / n for n in range(1, _some("users", users) + 1))


def best_user_rate(snr: float, users: int) -> float:
    """Return the ergodic rate of the best of ``users`` alike Rayleigh channels.

    Raises:
        InputError: If ``snr`` is not above 0 or there is no user.
    """
    _positive("snr", snr)
    _some("users", users)
    return gain_expectation(lambda x: users * (-np.expm1(-x)) ** (users - 1) * _rate(snr, x))


def worst_user_rate(snr: float, users: int) -> float:
    """Return the ergodic rate of the worst of ``users``: its gain is that of one, over ``users``.

    Raises:
        InputError: If ``snr`` is not above 0 or there is no user.
    """
    return ergodic_rate(_positive("snr", snr) / _some("users", users))


def active_probability(cut_off_gain: float, rician_k: float = 0.0) -> float:
    """Return P[X >= cut_off_gain]: how often truncated inversion sends. Rayleigh: exp(-x0)."""
    return 1 - gain_below(cut_off_gain, rician_k)


@lru_cache(maxsize=1024)
def inverse_gain_mean(cut_off_gain: float, rician_k: float = 0.0) -> float:
    """Return E[1/X; X >= cut_off_gain]. Rayleigh: E1(x0), infinite at 0.

    Raises:
        InputError: If ``cut_off_gain`` is not above 0, or the channel never reaches it.
    """
    mean = gain_expectation(np.reciprocal, rician_k, _positive("cut_off_gain", cut_off_gain))
    if mean == 0:
        raise InputError(f"cut_off_gain = {cut_off_gain}; the channel is never so good, lower it")
    return mean


def inversion_rate(snr: float, cut_off_gain: float, rician_k: float = 0.0) -> float:
    """Return the rate, while it sends, of truncated inversion at an unchanged mean power.

    Power P/(X E[1/X; X >= x0]) makes the received SNR snr/E[1/X; X >= x0] in every such block.
    Source: Goldsmith and Varaiya, Capacity of Fading Channels with Channel Side Information, 1997.

    Raises:
        InputError: See ``inverse_gain_mean``; or ``snr`` is not above 0.
    """
    return awgn_rate(_positive("snr", snr) / inverse_gain_mean(cut_off_gain, rician_k))


def effective_snr(snr: float, error_variance: float) -> float:
    """Return snr*(1 - v)/(1 + snr*v): what an error of variance v in the known channel leaves.

    The unknown part of the channel acts as noise of its own. Source: Hassibi and Hochwald, How
    Much Training is Needed in Multiple-Antenna Wireless Links?, 2003.

    Raises:
        InputError: If ``snr`` is not above 0 or ``error_variance`` is not in [0, 1).
    """
    _positive("snr", snr)
    if not 0 <= error_variance < 1:
        raise InputError(f"csi_error_variance = {error_variance}; give 0 or more, and below 1")
    return snr * (1 - error_variance) / (1 + snr * error_variance)


def _rate(snr: float, gains: Floats) -> Floats:
    return np.asarray(np.log1p(snr * gains) / math.log(2), dtype=np.float64)


def _lambert_w(x: float) -> float:
    """Return w >= 0 with w*exp(w) = x for x > 0, by Newton's method on w + ln w = ln x."""
    log = math.log(x)
    w = math.log1p(x) if x < math.e else log - math.log(log)
    for _ in range(20):
        step = (w + math.log(w) - log) * w / (1 + w)
        w -= step
        if abs(step) <= 1e-15 * w:
            break
    return w


def _positive(name: str, value: float) -> float:
    if not (math.isfinite(value) and value > 0):
        raise InputError(f"{name} = {value}; give a power ratio above 0")
    return value


def _some(name: str, count: int) -> int:
    if count < 1:
        raise InputError(f"{name} = {count}; give 1 or more")
    return count
