"""Bits in coherence blocks: how many an upload fills, and how many can be walked."""

from __future__ import annotations

import math

from device_profiles.errors import InputError
from device_profiles.link import Link

MOST_BLOCKS = 10_000_000  # an upload of more (28 hours at 10 ms) is a mistake in the link


def check_bits(bits: float) -> float:
    """Return ``bits`` if so much can be sent.

    Raises:
        InputError: If it is negative or not finite.
    """
    if not (math.isfinite(bits) and bits >= 0):
        raise InputError(f"bits = {bits}; a transmission has 0 or more, and an end")
    return float(bits)


def pieces(bits: float, bits_a_block: float) -> tuple[int, float]:
    """Return how many blocks ``bits`` > 0 fill, and which share, (0, 1], the one on top needs.

    Two blocks and a half are (2, 0.5), two blocks (1, 1.0).
    """
    blocks = bits / bits_a_block
    whole = max(0, math.ceil(blocks * (1 - 1e-12)) - 1)  # a rounding error is no block
    return whole, min(1.0, blocks - whole)


def check_blocks(blocks: float, bits: float, link: Link) -> None:
    """Hold that an upload can be walked.

    Raises:
        InputError: If it spans over ``MOST_BLOCKS`` blocks.
    """
    if blocks <= MOST_BLOCKS:
        return
    chosen = f" under scheme '{link.scheme}'" if link.scheme != "adaptive" else ""
    raise InputError(
        f"an upload of {bits:.4g} bits at snr_db = {link.snr_db:g}, "
        f"bandwidth_hz = {link.bandwidth_hz:g} and "
        f"coherence_seconds = {link.coherence_seconds:g}{chosen} spans {blocks:.3g} coherence "
        f"blocks, above {MOST_BLOCKS:,}; raise one of the three"
        + (", or lower rate_bits_per_hz or cut_off_gain" if chosen else "")
    )
