"""Waiting for good blocks against a plain loop, a closed form and the same upload at once."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, special

from device_profiles.channel import Link, upload
from device_profiles.errors import InputError
from device_profiles.upload_policy import SAFETY, PatientUpload, patient_upload

ADAPTER_BITS = 580_968 * 32
SNR = 10**0.5


def link(**changes: object) -> Link:
    values: dict[str, object] = {"snr_db": 5.0, "bandwidth_hz": 1e6, "transmit_watts": 1.0}
    return Link(**(values | changes))  # type: ignore[arg-type]


def rate_above(gain: float) -> float:
    """Return E[log2(1 + snr*X); X >= gain], by parts: the boundary and an exponential integral."""
    rest = math.exp(1 / SNR) * float(special.exp1(1 / SNR + gain)) / math.log(2)
    return math.exp(-gain) * math.log2(1 + SNR * gain) + rest


def many(deadline: float, count: int, over: Link | None = None) -> list[PatientUpload]:
    return [
        patient_upload(ADAPTER_BITS, over or link(), deadline, np.random.default_rng(seed))
        for seed in range(count)
    ]


@pytest.mark.parametrize("deadline", [12.0, 20.0, 100.0])
def test_the_threshold_is_the_highest_whose_expected_end_meets_the_deadline(
    deadline: float,
) -> None:
    by_integral = integrate.quad(lambda x: math.log2(1 + SNR * x) * math.exp(-x), 0.7, 60)[0]
    assert rate_above(0.7) == pytest.approx(by_integral, rel=1e-9)
    least = many(deadline, 1)[0].least_gain
    assert ADAPTER_BITS / 1e6 / rate_above(least) <= deadline
    assert ADAPTER_BITS / 1e6 / rate_above(least * 1.001) > deadline


def walk(
    bits: float, least: float, hurried_after: float | None, seed: int, share: float = 1.0
) -> tuple[float, float]:
    """Return delay and time on the air over the blocks of a seed, one block at a time."""
    gains = iter(np.random.default_rng(seed).standard_exponential(64 * 1024).tolist())
    left, block, air = bits, 0, 0.0
    while True:
        gain = next(gains)
        if gain >= least or (hurried_after is not None and block * 0.01 >= hurried_after - 1e-9):
            rate = share * 1e6 * math.log2(1 + SNR * gain)
            if left <= rate * 0.01:
                return block * 0.01 + left / rate, share * (air + left / rate)
            left -= rate * 0.01
            air += 0.01
        block += 1


@pytest.mark.parametrize("deadline", [5.0, 11.0, 12.0, 20.0, 60.0])
@pytest.mark.parametrize("seed", range(4))
def test_what_it_took_is_what_a_walk_over_the_blocks_gives(deadline: float, seed: int) -> None:
    got = patient_upload(ADAPTER_BITS, link(), deadline, np.random.default_rng(seed))
    seconds, air = walk(ADAPTER_BITS, got.least_gain, got.hurried_after, seed)
    assert got.sent.seconds == pytest.approx(seconds, rel=1e-9)
    assert got.sent.air_seconds == pytest.approx(air, rel=1e-9)
    assert got.sent.transmit_joules == pytest.approx(air, rel=1e-9)  # one watt
    assert got.late == (seconds > deadline)


def test_the_comparison_is_the_same_upload_over_the_same_blocks() -> None:
    got = patient_upload(ADAPTER_BITS, link(), 30.0, np.random.default_rng(1))
    once = upload(ADAPTER_BITS, link(), np.random.default_rng(1))
    assert got.at_once.seconds == pytest.approx(once.seconds, rel=1e-12)
    assert got.at_once.transmit_joules == pytest.approx(once.transmit_joules, rel=1e-12)
    assert got.joules_saved == pytest.approx(once.transmit_joules - got.sent.transmit_joules)


def test_with_much_time_the_time_on_the_air_is_that_of_good_blocks_only() -> None:
    got = many(40.0, 60)
    least = got[0].least_gain
    # Bits over the mean rate of a block that is good: 18.59 / (rate_above / exp(-least)).
    expected = ADAPTER_BITS / 1e6 * math.exp(-least) / rate_above(least)
    unhurried = np.array([one.sent.air_seconds for one in got if one.hurried_after is None])
    assert unhurried.size > 10
    # Five standard deviations of the mean; and that these had the better half of the luck, at most
    # one standard deviation of a single one.
    tolerance = (5 / unhurried.size**0.5 + 1) * float(unhurried.std())
    assert unhurried.mean() == pytest.approx(expected, abs=tolerance)
    assert all(one.joules_saved > 4 for one in got)  # of 10.8 J


@pytest.mark.parametrize("deadline", [12.0, 15.0, 40.0])
def test_the_deadline_is_met_by_hurrying_in_time(deadline: float) -> None:
    got = many(deadline, 150)
    # SAFETY standard deviations: one in 740 is late.
    assert sum(one.late for one in got) <= 2
    assert any(one.hurried_after is not None for one in got)
    assert any(one.hurried_after is None for one in got)


def test_it_hurries_no_earlier_than_it_must() -> None:
    got = next(one for one in many(20.0, 50) if one.hurried_after is not None)
    assert got.hurried_after is not None
    remaining = 20.0 - got.hurried_after
    # At the mean rate and SAFETY standard deviations that time was just needed, so what is used of
    # it is less, by some standard deviations of as many blocks.
    spread = 0.01 * math.sqrt(0.955848 / 1.715974**2 * remaining / 0.01)
    used = got.sent.seconds - got.hurried_after
    assert remaining - (SAFETY + 4) * spread < used <= remaining


@pytest.mark.parametrize("deadline", [0.001, 5.0, 10.0])
def test_a_deadline_that_cannot_be_met_is_late_and_sends_at_once(deadline: float) -> None:
    for got in many(deadline, 5):
        assert got.late
        assert (got.least_gain, got.hurried_after) == (0.0, 0.0)
        assert got.sent == got.at_once
        assert got.joules_saved == 0


@settings(max_examples=40)
@given(
    bits=st.floats(1, 3e6),
    deadline=st.floats(1e-3, 60),
    snr_db=st.floats(-5, 30),
    seed=st.integers(0, 2**32),
)
def test_waiting_never_ends_earlier_and_late_is_after_the_deadline(
    bits: float, deadline: float, snr_db: float, seed: int
) -> None:
    over = link(snr_db=snr_db)
    got = patient_upload(bits, over, deadline, np.random.default_rng(seed))
    assert got.sent.seconds >= got.at_once.seconds * (1 - 1e-12)
    assert 0 < got.sent.air_seconds <= got.sent.seconds * (1 + 1e-12)
    assert got.late == (got.sent.seconds > deadline)


def test_electronics_that_stay_on_can_eat_the_saving() -> None:
    cheap = patient_upload(ADAPTER_BITS, link(), 40.0, np.random.default_rng(2), circuit_watts=0.01)
    dear = patient_upload(ADAPTER_BITS, link(), 40.0, np.random.default_rng(2), circuit_watts=1.0)
    assert cheap.sent.seconds == dear.sent.seconds
    assert dear.sent.circuit_joules == pytest.approx(dear.sent.seconds)
    assert dear.at_once.circuit_joules == pytest.approx(dear.at_once.seconds)
    assert cheap.joules_saved > 0 > dear.joules_saved


def test_clients_in_turn_wait_on_their_turns() -> None:
    over = link(sharing="tdma", sharers=4)
    got = patient_upload(ADAPTER_BITS, over, 80.0, np.random.default_rng(3), circuit_watts=0.5)
    seconds, air = walk(ADAPTER_BITS, got.least_gain, got.hurried_after, 3, share=0.25)
    assert got.sent.seconds == pytest.approx(seconds, rel=1e-9)
    assert got.sent.air_seconds == pytest.approx(air, rel=1e-9)
    assert got.sent.circuit_joules == pytest.approx(0.5 * seconds / 4, rel=1e-9)


def test_a_still_channel_gives_nothing_to_wait_for() -> None:
    got = patient_upload(2.057373e6, link(fading="none"), 10.0, np.random.default_rng(0))
    assert got.sent == got.at_once
    assert got.sent.seconds == pytest.approx(1.0, rel=3e-7)


def test_a_shadow_is_that_of_the_upload_itself() -> None:
    over = link(shadowing_db=8.0)
    got = patient_upload(ADAPTER_BITS, over, 60.0, np.random.default_rng(4))
    once = upload(ADAPTER_BITS, over, np.random.default_rng(4))
    assert got.at_once.seconds == pytest.approx(once.seconds, rel=1e-12)


def test_behind_too_deep_a_shadow_it_gives_up_late() -> None:
    over = link(snr_db=-34.0, shadowing_db=20.0)
    seed = next(s for s in range(99) if np.random.default_rng(s).standard_normal() < -1)
    got = patient_upload(ADAPTER_BITS, over, 60.0, np.random.default_rng(seed), circuit_watts=0.1)
    assert got.late
    assert (got.sent.seconds, got.sent.transmit_joules) == (1e5, 1e5)
    assert got.sent.circuit_joules == pytest.approx(1e4)


def test_nothing_to_send_takes_nothing() -> None:
    got = patient_upload(0.0, link(), 1.0, np.random.default_rng(0))
    assert (got.sent.seconds, got.sent.joules, got.late) == (0.0, 0.0, False)


@pytest.mark.parametrize(
    ("changes", "deadline", "watts", "told"),
    [
        ({}, 0.0, 0.0, "deadline_seconds = 0.0; give a time above 0"),
        ({}, math.nan, 0.0, "deadline_seconds = nan; give a time above 0"),
        ({}, 1e6, 0.0, r"deadline_seconds = 1e\+06 spans over 10,000,000 coherence blocks"),
        ({}, 1.0, -1.0, "circuit_watts = -1.0; give 0 or more"),
        ({"scheme": "inversion"}, 1.0, 0.0, "scheme 'inversion' does not wait for good blocks"),
    ],
)
def test_what_cannot_be_decided_is_refused(
    changes: dict[str, object], deadline: float, watts: float, told: str
) -> None:
    with pytest.raises(InputError, match=f"^{told}"):
        patient_upload(1e6, link(**changes), deadline, np.random.default_rng(0), watts)
