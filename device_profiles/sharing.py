"""How clients share one band: each on spectrum of its own, in turn, or side by side.

All ``sharers`` are taken to send for as long as the upload lasts; none inherits the share of
another that has finished.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from device_profiles.config_files import choose
from device_profiles.errors import InputError

Sharing = Literal["dedicated", "tdma", "fdma"]

SHARINGS = ("dedicated", "fdma", "tdma")
MOST_SHARERS = 100_000


@dataclass(frozen=True, kw_only=True)
class Share:
    """What one of the sharers gets.

    Attributes:
        band: Share of the bandwidth, (0, 1].
        time: Share of every coherence block in which it may send, (0, 1]; silent in the rest.
        snr: Its SNR over that of a client with the whole band: its full power falls on the noise
            of its own part of the band only.
    """

    band: float = 1.0
    time: float = 1.0
    snr: float = 1.0


def share_of(sharing: Sharing, sharers: int) -> Share:
    """Return what each of ``sharers`` clients gets.

    ``dedicated``: the whole band, whoever else there is. ``tdma``: the whole band for a K-th of
    the time, at full power, so energy is as alone and delay K times that. ``fdma``: a K-th of the
    band all the time, at full power, so the SNR there is K times that of the whole band.

    Raises:
        InputError: If the way of sharing is unknown or the number does not fit it.
    """
    choose("sharing", sharing, SHARINGS)
    if not 1 <= sharers <= MOST_SHARERS or sharers != int(sharers):
        raise InputError(f"sharers = {sharers}; give a whole number from 1 to {MOST_SHARERS:,}")
    if sharing == "dedicated":
        if sharers != 1:
            raise InputError(
                f"sharers = {sharers} with sharing 'dedicated', where nobody shares; "
                "choose 'tdma' or 'fdma', or leave it out"
            )
        return Share()
    if sharing == "tdma":
        return Share(time=1 / sharers)
    return Share(band=1 / sharers, snr=float(sharers))
