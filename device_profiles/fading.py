"""How strong a fading channel is: the law of its power gain in one coherence block.

X is the power gain over its mean, so E[X] = 1 and X has no unit. One number names the law, the
Rician factor K: power of the direct path over the power of all scattered ones. K = 0 is Rayleigh
fading, X ~ Exp(1); K = ``math.inf`` is no fading, X = 1. In between X is a gamma variable of shape
N + 1 and rate K + 1 with N ~ Poisson(K), and every formula here says so.
Source: Simon and Alouini, Digital Communication over Fading Channels, section 2.2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt

from device_profiles.errors import InputError

Fading = Literal["rayleigh", "rician", "none"]
Floats = npt.NDArray[np.float64]

FADINGS = ("none", "rayleigh", "rician")
MOST_RICIAN_K = 1000.0  # 30 dB: the gain then stays within 5 % of its mean most of the time

_SMALLEST_GAIN = 1e-20  # less happens once in 1e20 blocks
_TAIL = 7.0  # amplitudes so many scattered root-powers off the direct path: below exp(-49)
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(16)


def draw_gains(rician_k: float, blocks: int, generator: np.random.Generator) -> Floats:
    """Return the power gains of ``blocks`` coherence blocks in a row. Shape (blocks,).

    The first n gains of a fresh generator do not depend on ``blocks``.
    """
    if rician_k == math.inf:
        return np.ones(blocks)
    if rician_k == 0:
        return generator.standard_exponential(blocks)
    return gains_of_normals(generator.standard_normal(2 * blocks), rician_k)


def gains_of_normals(normals: Floats, rician_k: float) -> Floats:
    """Return the Rician gains of pairs of standard normals. Shape (..., 2n) -> (..., n)."""
    scattered = math.sqrt(0.5 / (rician_k + 1))
    direct = math.sqrt(rician_k / (rician_k + 1))
    in_phase = direct + scattered * normals[..., 0::2]
    across = scattered * normals[..., 1::2]
    return np.asarray(in_phase * in_phase + across * across, dtype=np.float64)


def gain_below(gain: float, rician_k: float = 0.0) -> float:
    """Return P[X < gain], to a relative 1e-9 also where it is tiny.

    Args:
        gain: Any number; below 0 the answer is 0.
        rician_k: 0 (Rayleigh) to ``MOST_RICIAN_K``, or ``math.inf`` (no fading).

    Raises:
        InputError: If ``rician_k`` is none of these.
    """
    check_rician_k(rician_k)
    if gain <= 0:
        return 0.0
    if rician_k == math.inf:
        return float(gain > 1)
    if rician_k == 0:
        return -math.expm1(-gain)
    if gain >= _range(rician_k)[1]:
        return 1.0
    # A gamma variable of shape N + 1 is below y where a Poisson(y) count is above N.
    mean = gain * (rician_k + 1)
    count = _terms(rician_k, mean)
    above = np.cumsum(_poisson(np.array([mean]), count)[0][::-1])[::-1]  # P[count >= n]
    return min(1.0, float(_poisson(np.array([rician_k]), count)[0][:-1] @ above[1:]))


def gain_expectation(
    function: Callable[[Floats], Floats], rician_k: float = 0.0, above: float = 0.0
) -> float:
    """Return E[function(X); X >= above]: blocks of less gain count as 0.

    Args:
        function: Takes and returns arrays of one shape; smooth, and finite from ``above`` on.
        rician_k: 0 (Rayleigh) to ``MOST_RICIAN_K``, or ``math.inf`` (no fading).
        above: The least gain that counts, >= 0.

    Raises:
        InputError: If ``rician_k`` is none of these.
    """
    check_rician_k(rician_k)
    if rician_k == math.inf:
        return float(function(np.ones(1))[0]) if above <= 1 else 0.0
    gains, weights = _quadrature(rician_k, above)
    return float(weights @ function(gains))


def check_rician_k(rician_k: float) -> float:
    """Return ``rician_k`` if there is such a channel.

    Raises:
        InputError: If it is neither 0 to ``MOST_RICIAN_K`` nor infinite.
    """
    if rician_k == math.inf or 0 <= rician_k <= MOST_RICIAN_K:
        return rician_k
    raise InputError(f"rician_k = {rician_k}; give 0 to {MOST_RICIAN_K:g}, a power ratio")


@lru_cache(maxsize=256)
def _quadrature(rician_k: float, above: float) -> tuple[Floats, Floats]:
    """Return gains, and the probability that each stands for: Gauss-Legendre over log gain."""
    low, high = _range(rician_k)
    low = max(low, above)
    if low >= high:
        return np.ones(0), np.ones(0)
    # Panels well below the width of the law in log gain, 2/sqrt(2K) for a large K.
    panels = math.ceil(math.log(high / low) * (2 + math.sqrt(rician_k)))
    edges = np.linspace(math.log(low), math.log(high), panels + 1)
    half = (edges[1] - edges[0]) / 2
    middles = (edges[:-1] + edges[1:]) / 2
    gains = np.exp(middles[:, None] + half * _NODES).reshape(-1)  # (panels * 16,)
    weights = np.tile(half * _WEIGHTS, panels) * gains * _density(gains, rician_k)
    for array in (gains, weights):
        array.flags.writeable = False
    return gains, weights


def _density(gains: Floats, rician_k: float) -> Floats:
    """Return the density of X. Shape (n,) -> (n,)."""
    if rician_k == 0:
        return np.asarray(np.exp(-gains), dtype=np.float64)
    means = gains * (rician_k + 1)
    count = _terms(rician_k, float(means[-1]))
    shapes = _poisson(np.array([rician_k]), count)[0]  # (count,)
    density = [part @ shapes for part in _poisson_parts(means, count)]
    return np.asarray((rician_k + 1) * np.concatenate(density), dtype=np.float64)


def _poisson_parts(means: Floats, count: int) -> list[Floats]:
    parts = max(1, means.size * count // 2**18)  # at most some 2 MB each
    return [_poisson(part, count) for part in np.array_split(means, parts)]


def _range(rician_k: float) -> tuple[float, float]:
    """Return gains outside which X practically never is."""
    direct = math.sqrt(rician_k)
    low = max(0.0, direct - _TAIL) ** 2 / (rician_k + 1)
    return max(_SMALLEST_GAIN, low), (direct + _TAIL) ** 2 / (rician_k + 1)


def _terms(*means: float) -> int:
    """Return how many values of a Poisson count to sum over."""
    most = max(means)
    return math.ceil(most + 12 * math.sqrt(most) + 60)


def _poisson(means: Floats, count: int) -> Floats:
    """Return P[Poisson(mean) = n] for n below ``count``. Shape (m,) -> (m, count)."""
    n = np.arange(count, dtype=np.float64)
    log_factorial = np.concatenate(([0.0], np.cumsum(np.log(n[1:]))))
    log = n * np.log(means)[:, None] - means[:, None] - log_factorial
    return np.asarray(np.exp(log), dtype=np.float64)
