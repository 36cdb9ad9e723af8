"""The time of an upload of many blocks by a normal law: one draw, not one a block.

SI units: bits, seconds. ``device_profiles/many_uploads.py`` says what it is for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from device_profiles.blocks import MOST_BLOCKS
from device_profiles.closed_forms import awgn_rate, rate_moments
from device_profiles.errors import InputError
from device_profiles.fading import Floats
from device_profiles.link import Link
from device_profiles.philox import Words, first_words, uniforms

LEAST_NORMAL_BLOCKS = 50

_STEP_DB = 0.25  # between shadows at which the moments of a block are tabulated
_SIGMAS = 9.0  # of shadowing that the table covers; more happens once in 1e18 uploads
_BRIGHT_SIGMAS = 4.0  # of shadowing up to which an upload must have enough blocks


def normal_seconds(bits: Floats, link: Link, keys: Words) -> Floats:
    """Return the seconds after which a normal sum of blocks passes ``bits`` > 0. Shape (n,).

    Infinite where the sender gives up (``device_profiles/channel.py``).

    With B(t) the bits after t seconds, never falling, the upload ends by t where B(t) >= bits; and
    B(t) is close to normal with the mean, variance and skewness of t over the coherence time
    blocks. (Of a block used in part, a share f, the variance is f**2 of a block's and not f: at 50
    blocks this is less than 0.2 % of the spread, and left out.)

    Args:
        bits: Of each upload. Shape (n,).
        link: Of all of them, at scheme ``adaptive``.
        keys: Their streams, of which the first four words are used. Shape (n, 2).

    Raises:
        InputError: If an upload is of fewer than ``LEAST_NORMAL_BLOCKS`` blocks.
    """
    if bits.size == 0:
        return bits
    if link.gain_k < math.inf:
        _check_blocks(bits, link)
    raw = uniforms(first_words(keys))
    standard = _normals(raw[:, 0], raw[:, 1])
    block = _blocks(link, raw)
    blocks = bits / block.mean
    # Cornish and Fisher's first term: the quantile of a sum of little skewness.
    quantile = standard + (standard**2 - 1) * block.skewness / (6 * np.sqrt(blocks))
    passed = _passed(block.spread * quantile / block.mean, blocks)
    if link.gain_k < math.inf:
        passed[bits > MOST_BLOCKS * block.unfaded] = np.inf
    return np.asarray(passed * link.coherence_seconds, dtype=np.float64)


@dataclass(frozen=True, kw_only=True)
class _Blocks:
    """Of the bits of each upload's blocks: mean, spread, skewness, and as many without fading."""

    mean: Floats
    spread: Floats
    skewness: Floats
    unfaded: Floats


def _check_blocks(bits: Floats, link: Link) -> None:
    """Hold that uploads are of enough blocks, also where shadowing is the other way."""
    least = float(bits.min())
    snr = link.sending_snr(_BRIGHT_SIGMAS * link.shadowing_db)
    blocks = least / (_scale(link) * rate_moments(snr, link.gain_k).mean)
    if blocks < LEAST_NORMAL_BLOCKS:
        raise InputError(
            f"method 'normal' for an upload of {least:.4g} bits, which may be of {blocks:.3g} "
            f"coherence blocks; it takes {LEAST_NORMAL_BLOCKS} or more, choose 'exact'"
        )


def _passed(drift: Floats, blocks: Floats) -> Floats:
    """Return x with x + drift*sqrt(x) = blocks."""
    root = (np.sqrt(drift**2 + 4 * blocks) - drift) / 2
    return np.asarray(root**2, dtype=np.float64)


def _blocks(link: Link, raw: Floats) -> _Blocks:
    """Return what the blocks of each upload are like, its shadowing drawn. Shape (n,) each."""
    reach = _SIGMAS * link.shadowing_db
    shadows = np.linspace(-reach, reach, 2 * math.ceil(reach / _STEP_DB) + 1)
    snrs = [link.sending_snr(float(shadow)) for shadow in shadows]
    moments = [rate_moments(snr, link.gain_k) for snr in snrs]
    mean = _scale(link) * np.array([m.mean for m in moments])
    spread = _scale(link) * np.sqrt([m.variance for m in moments])
    skewness = np.array([m.third / m.variance**1.5 if m.variance else 0.0 for m in moments])
    unfaded = _scale(link) * np.array([awgn_rate(snr) for snr in snrs])
    if not reach:
        return _Blocks(mean=mean, spread=spread, skewness=skewness, unfaded=unfaded)
    drawn = link.shadowing_db * _normals(raw[:, 2], raw[:, 3])
    # The logarithm of a rate is nearly straight in decibels, so little is lost between rows.
    return _Blocks(
        mean=np.exp(np.interp(drawn, shadows, np.log(mean))),
        spread=np.interp(drawn, shadows, spread),
        skewness=np.interp(drawn, shadows, skewness),
        unfaded=np.exp(np.interp(drawn, shadows, np.log(unfaded))),
    )


def _scale(link: Link) -> float:
    """Return the bits of a block at 1 bit/s/Hz."""
    return link.band_hz * link.share.time * link.coherence_seconds


def _normals(first: Floats, second: Floats) -> Floats:
    """Return standard normals of pairs of uniforms (Box and Muller). Shape (n,), (n,) -> (n,)."""
    radius = np.sqrt(-2 * np.log1p(-first))
    return np.asarray(radius * np.cos(2 * math.pi * second), dtype=np.float64)
