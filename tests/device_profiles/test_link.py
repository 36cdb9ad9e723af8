"""What a link refuses, and what follows from its fields."""

from __future__ import annotations

import math

import numpy as np
import pytest

from device_profiles.errors import InputError
from device_profiles.link import PAPER_LINK, Link, profile_link
from device_profiles.profile import Radio


def link(**changes: object) -> Link:
    values: dict[str, object] = {"snr_db": 5.0, "bandwidth_hz": 1e6, "transmit_watts": 1.0}
    return Link(**(values | changes))  # type: ignore[arg-type]


def test_the_papers_link_is_5_db_1_mhz_1_watt_rayleigh_dedicated_adaptive() -> None:
    stated = link(
        fading="rayleigh", coherence_seconds=0.01, scheme="adaptive", sharing="dedicated", sharers=1
    )
    assert stated == PAPER_LINK
    assert PAPER_LINK.snr == pytest.approx(3.1622776601683795, rel=1e-15)
    assert PAPER_LINK.sending_snr() == PAPER_LINK.snr


def test_a_profiles_link_has_the_figures_of_its_radio() -> None:
    radio = Radio(snr_db=2.0, bandwidth_hz=3e5, transmit_watts=0.5)
    assert profile_link(radio) == link(snr_db=2.0, bandwidth_hz=3e5, transmit_watts=0.5)


def test_rate_without_fading() -> None:
    assert link(snr_db=0.0).awgn_rate == pytest.approx(1e6, rel=1e-15)
    assert link().awgn_rate == pytest.approx(2.057373e6, rel=3e-7)
    # At -100 dB log2(1 + x) is x/ln 2 to ten digits, where 1 + x alone would keep six.
    assert link(snr_db=-100.0).awgn_rate == pytest.approx(1e6 * 1e-10 / math.log(2), rel=1e-9)


def test_sending_snr_by_hand() -> None:
    # 10 dB; 10 users side by side: 100; 3 dB of shadow is a factor of 10^0.3.
    assert link(snr_db=10.0).sending_snr(-10.0) == pytest.approx(1.0)
    assert link(snr_db=10.0, sharing="fdma", sharers=10).sending_snr() == pytest.approx(100.0)
    assert link(snr_db=10.0, sharing="tdma", sharers=10).sending_snr() == pytest.approx(10.0)
    assert link(csi_error_variance=0.05).sending_snr() == pytest.approx(2.594014, abs=5e-7)
    # Side by side and imperfectly known: 100 * 0.9 / (1 + 100 * 0.1).
    both = link(snr_db=10.0, sharing="fdma", sharers=10, csi_error_variance=0.1)
    assert both.sending_snr() == pytest.approx(90 / 11)


def test_an_error_of_the_known_channel_is_one_of_its_scattered_part() -> None:
    assert link().gain_k == 0
    assert link(fading="none").gain_k == math.inf
    assert link(fading="rician", rician_k=3.0).gain_k == 3
    # Direct 3/4, scattered 1/4, of which 1/20 is unknown: (3/4) / (1/4 - 1/20).
    known = link(fading="rician", rician_k=3.0, csi_error_variance=0.05)
    assert known.gain_k == pytest.approx(0.75 / 0.2)


def test_fixed_rate_is_as_given_or_the_best() -> None:
    assert link(scheme="fixed-rate").sending_rate(10**0.5) == pytest.approx(1.553867, abs=5e-7)
    given = link(scheme="fixed-rate", rate_bits_per_hz=0.5)
    assert given.sending_rate(10**0.5) == 0.5


def test_cut_off_gain_is_as_given_or_a_tenth() -> None:
    assert link(scheme="inversion").least_sending_gain() == 0.1
    assert link(scheme="inversion", cut_off_gain=0.3).least_sending_gain() == 0.3


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("bandwidth_hz", -1e6), ("bandwidth_hz", 0.0), ("bandwidth_hz", math.nan),
        ("bandwidth_hz", math.inf), ("coherence_seconds", 0.0), ("coherence_seconds", -0.01),
        ("transmit_watts", -1.0), ("transmit_watts", math.inf), ("snr_db", math.nan),
        ("snr_db", math.inf), ("snr_db", 101.0), ("snr_db", -101.0), ("shadowing_db", -1.0),
        ("shadowing_db", 21.0), ("shadowing_db", math.nan), ("csi_error_variance", -0.1),
        ("csi_error_variance", 1.0), ("csi_error_variance", math.nan), ("sharers", 0),
    ],
)  # fmt: skip
def test_a_link_that_cannot_be_is_refused_by_field_and_value(field: str, value: float) -> None:
    with pytest.raises(InputError, match=f"^{field} = {value}; give"):
        link(**{field: value})


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"scheme": "fixed-rate", "rate_bits_per_hz": 0.0}, "rate_bits_per_hz = 0.0; give a value"),
        ({"scheme": "inversion", "cut_off_gain": -1.0}, "cut_off_gain = -1.0; give a value above"),
        ({"fading": "rician"}, "rician_k is missing; give 0 to 1000"),
        ({"fading": "rician", "rician_k": 0.0}, "rician_k = 0.0; give a ratio above 0"),
        (
            {"fading": "rician", "rician_k": 1e4},
            "rician_k = 10000.0; give a ratio above 0, at most",
        ),
        ({"scheme": "outage"}, "rate_bits_per_hz is missing; scheme 'outage' sends at a rate"),
        ({"rician_k": 3.0}, "rician_k = 3.0 with fading 'rayleigh'; it belongs to 'rician', leave"),
        (
            {"rate_bits_per_hz": 1.0},
            "rate_bits_per_hz = 1.0 with scheme 'adaptive'; it belongs to 'fixed-rate' and",
        ),
        (
            {"scheme": "outage", "rate_bits_per_hz": 1.0, "cut_off_gain": 0.1},
            "cut_off_gain = 0.1 with scheme 'outage'; it belongs to 'inversion', leave it out",
        ),
        (
            {"fading": "none", "csi_error_variance": 0.1},
            "csi_error_variance = 0.1 with fading 'none'; a channel that does not fade is known",
        ),
        (
            {"fading": "rician", "rician_k": 9.0, "csi_error_variance": 0.1},
            "csi_error_variance = 0.1 with rician_k = 9.0; give at most 0.0991",
        ),
        ({"sharers": 4}, "sharers = 4 with sharing 'dedicated'"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(
    changes: dict[str, object], told: str
) -> None:
    with pytest.raises(InputError, match=f"^{told}"):
        link(**changes)


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("fading", "rice", "unknown fading 'rice'; did you mean 'rician'"),
        ("scheme", "adaptiv", "unknown scheme 'adaptiv'; did you mean 'adaptive'"),
        ("sharing", "cdma", "unknown sharing 'cdma'; did you mean 'tdma'"),
    ],
)
def test_an_unknown_name_is_told_with_the_nearest(field: str, value: str, told: str) -> None:
    with pytest.raises(InputError, match=told):
        link(**{field: value})


def test_the_most_that_may_be_unknown_still_makes_a_channel() -> None:
    at_the_bound = link(fading="rician", rician_k=9.0, csi_error_variance=0.0991)
    assert np.isfinite(at_the_bound.gain_k)
    assert at_the_bound.gain_k <= 1000 * (1 + 1e-9)
