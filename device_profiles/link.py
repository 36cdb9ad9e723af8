"""One device's uplink: radio, fading, how its sender meets the fading, and what it shares.

SI units: hertz, watts, seconds. SNR is a power ratio unless a name says ``_db``; rates in bit/s/Hz
unless a name says otherwise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from device_profiles.closed_forms import best_fixed_rate, effective_snr
from device_profiles.config_files import check_belongs, choose
from device_profiles.errors import InputError
from device_profiles.fading import FADINGS, MOST_RICIAN_K, Fading
from device_profiles.profile import Radio
from device_profiles.sharing import Share, Sharing, share_of

COHERENCE_SECONDS = 0.01  # assumed: a pedestrian at 2 GHz
CUT_OFF_GAIN = 0.1
MOST_SHADOWING_DB = 20.0

Scheme = Literal["adaptive", "fixed-rate", "outage", "inversion"]
SCHEMES = ("adaptive", "fixed-rate", "inversion", "outage")


@dataclass(frozen=True, kw_only=True)
class Link:
    """One device's uplink. A field that belongs to a choice not made is left at its default.

    Attributes:
        snr_db: Mean received power over noise power in the whole band, decibels, -100 to 100;
            with shadowing the median over rounds.
        bandwidth_hz: Of the whole band, > 0.
        transmit_watts: Mean radiated power while its turn lasts, >= 0.
        fading: ``rayleigh``, ``rician``, or ``none`` (AWGN).
        coherence_seconds: How long a fading state lasts, > 0; the next is independent of it.
        rician_k: With ``rician`` fading: direct over scattered power, ratio, > 0 to 1000.
        shadowing_db: Standard deviation of the log-normal shadowing, decibels, 0 to 20. It is
            constant over an upload, drawn anew for each, and known to both ends.
        scheme: How the sender meets the fading (``device_profiles/channel.py`` says what each
            costs). ``adaptive``: the rate follows the channel. ``fixed-rate``: a block below the
            rate is sent again. ``outage``: it is not, and the upload is lost. ``inversion``: power
            is turned so that the received SNR is constant; silent below a cut-off gain.
        rate_bits_per_hz: With ``fixed-rate`` and ``outage``: > 0. By itself ``fixed-rate`` takes
            the rate of the best goodput; ``outage`` must be given one.
        cut_off_gain: With ``inversion``: the least gain to send at, > 0; by itself 0.1.
        csi_error_variance: Error of the known channel over the mean gain, [0, 1), and within the
            scattered share of it: the direct path is known. It costs SNR (``effective_snr``).
        sharing: ``dedicated``, ``tdma`` or ``fdma`` (``device_profiles/sharing.py``).
        sharers: Clients on the band, this one included, 1 to 100,000.
    """

    snr_db: float
    bandwidth_hz: float
    transmit_watts: float
    fading: Fading = "rayleigh"
    coherence_seconds: float = COHERENCE_SECONDS
    rician_k: float | None = None
    shadowing_db: float = 0.0
    scheme: Scheme = "adaptive"
    rate_bits_per_hz: float | None = None
    cut_off_gain: float | None = None
    csi_error_variance: float = 0.0
    sharing: Sharing = "dedicated"
    sharers: int = 1

    def __post_init__(self) -> None:
        self._above_0("bandwidth_hz", "coherence_seconds")
        if not (math.isfinite(self.transmit_watts) and self.transmit_watts >= 0):
            raise InputError(f"transmit_watts = {self.transmit_watts}; give 0 or more")
        if not -100 <= self.snr_db <= 100:
            raise InputError(f"snr_db = {self.snr_db}; give -100 to 100 decibels")
        choose("fading", self.fading, FADINGS)
        choose("scheme", self.scheme, SCHEMES)
        share_of(self.sharing, self.sharers)
        self._check_fading()
        self._check_scheme()

    def _check_fading(self) -> None:
        if not 0 <= self.shadowing_db <= MOST_SHADOWING_DB:
            raise InputError(
                f"shadowing_db = {self.shadowing_db}; give 0 to {MOST_SHADOWING_DB:g} decibels"
            )
        check_belongs(self, "rician_k", "fading", ("rician",))
        if self.fading == "rician":
            if self.rician_k is None:
                raise InputError(f"rician_k is missing; give 0 to {MOST_RICIAN_K:g}, a power ratio")
            if not 0 < self.rician_k <= MOST_RICIAN_K:
                raise InputError(
                    f"rician_k = {self.rician_k}; give a ratio above 0, at most "
                    f"{MOST_RICIAN_K:g} (0 is fading 'rayleigh')"
                )
        error = self.csi_error_variance
        if not 0 <= error < 1:
            raise InputError(f"csi_error_variance = {error}; give 0 or more, and below 1")
        if error and self.fading == "none":
            raise InputError(
                f"csi_error_variance = {error} with fading 'none'; a channel that does not fade "
                "is known, leave it out"
            )
        k = self.rician_k or 0.0
        most = (1 - k / MOST_RICIAN_K) / (k + 1)  # more, and hardly any scattered power is known
        if error > most:
            raise InputError(
                f"csi_error_variance = {error} with rician_k = {k}; give at most {most:.4g}, so "
                "that it stays below the scattered share of the power"
            )

    def _check_scheme(self) -> None:
        check_belongs(self, "rate_bits_per_hz", "scheme", ("fixed-rate", "outage"))
        check_belongs(self, "cut_off_gain", "scheme", ("inversion",))
        self._above_0("rate_bits_per_hz", "cut_off_gain")
        if self.scheme == "outage" and self.rate_bits_per_hz is None:
            raise InputError(
                "rate_bits_per_hz is missing; scheme 'outage' sends at a rate that you choose "
                "(closed_forms.outage_rate gives the one of an outage probability)"
            )

    def _above_0(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise InputError(f"{name} = {value}; give a value above 0")

    @property
    def snr(self) -> float:
        """Mean SNR in the whole band as a power ratio."""
        return math.pow(10.0, self.snr_db / 10)

    @property
    def awgn_rate(self) -> float:
        """Rate of the whole band without fading, bit/s: no mean rate under fading is above it."""
        return self.bandwidth_hz * math.log1p(self.snr) / math.log(2)

    @property
    def share(self) -> Share:
        """What of the band this client gets."""
        return share_of(self.sharing, self.sharers)

    @property
    def band_hz(self) -> float:
        """Bandwidth that this client sends in, hertz."""
        return self.bandwidth_hz * self.share.band

    @property
    def gain_k(self) -> float:
        """Rician factor of the gain as it is known: 0 for Rayleigh, infinite for no fading.

        An error takes from the scattered power that is known, never from the direct path's.
        """
        if self.fading == "none":
            return math.inf
        k = self.rician_k or 0.0
        return k / (1 - self.csi_error_variance * (k + 1))

    def sending_snr(self, shadow_db: float = 0.0) -> float:
        """Return the SNR that rates follow: under this shadowing, in its share, as it is known."""
        whole = math.pow(10.0, (self.snr_db + shadow_db) / 10)
        return effective_snr(whole * self.share.snr, self.csi_error_variance)

    def sending_rate(self, snr: float) -> float:
        """Return the rate of ``fixed-rate`` and ``outage`` at a sending SNR."""
        if self.rate_bits_per_hz is not None:
            return self.rate_bits_per_hz
        return best_fixed_rate(snr, self.gain_k)

    def least_sending_gain(self) -> float:
        """Return the cut-off gain of ``inversion``."""
        return CUT_OFF_GAIN if self.cut_off_gain is None else self.cut_off_gain


#: The link of arXiv 2404.13238v2; its coherence time is not stated there and assumed here.
PAPER_LINK = Link(snr_db=5.0, bandwidth_hz=1e6, transmit_watts=1.0)


def profile_link(radio: Radio) -> Link:
    """Return the link of a device's own radio."""
    return Link(
        snr_db=radio.snr_db, bandwidth_hz=radio.bandwidth_hz, transmit_watts=radio.transmit_watts
    )
