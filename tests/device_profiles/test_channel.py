"""Uploads, scheme by scheme, against a block-by-block walk, closed forms and hand arithmetic."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from device_profiles.blocks import MOST_BLOCKS, pieces
from device_profiles.channel import (
    PAPER_LINK,
    Link,
    Upload,
    block_rates,
    pilot_rate,
    upload,
    upload_seconds,
)
from device_profiles.closed_forms import (
    awgn_rate,
    best_fixed_rate,
    ergodic_rate,
    inverse_gain_mean,
    inversion_rate,
)
from device_profiles.errors import InputError
from device_profiles.link import Scheme

ADAPTER_BITS = 580_968 * 32  # 18.591 Mbit
SNR = 10**0.5
GAINS, WEIGHTS = np.polynomial.laguerre.laggauss(128)  # E[f(X)] for X ~ Exp(1)


def link(**changes: object) -> Link:
    values: dict[str, object] = {"snr_db": 5.0, "bandwidth_hz": 1e6, "transmit_watts": 1.0}
    return Link(**(values | changes))  # type: ignore[arg-type]


def uploads(bits: float, over: Link, count: int, seed: int = 0) -> list[Upload]:
    generator = np.random.default_rng(seed)
    return [upload(bits, over, generator) for _ in range(count)]


def rate_variance(snr: float) -> float:
    """Return the variance of log2(1 + snr*X) by Gauss-Laguerre quadrature."""
    rates = np.log2(1 + snr * GAINS)
    return float(WEIGHTS @ rates**2 - (WEIGHTS @ rates) ** 2)


# The rate of a block


@pytest.mark.parametrize(
    ("snr_db", "published"), [(0, 0.860347), (5, 1.715974), (10, 2.906515), (20, 5.884048)]
)
def test_mean_block_rate_is_the_ergodic_rate_of_rayleigh_fading(
    snr_db: float, published: float
) -> None:
    n = 400_000
    rates = block_rates(link(snr_db=snr_db), n, np.random.default_rng(0)) / 1e6
    # Five standard deviations of the mean of n independent blocks.
    spread = math.sqrt(rate_variance(10 ** (snr_db / 10)) / n)
    assert rates.mean() == pytest.approx(published, abs=5 * spread)


def test_variance_of_the_block_rate_at_5_db() -> None:
    n = 400_000
    rates = block_rates(PAPER_LINK, n, np.random.default_rng(1)) / 1e6
    # The fourth central moment is 2.34 variances squared (quadrature): relative error
    # sqrt((2.34 - 1)/n), below sqrt(2/n).
    assert rates.var() == pytest.approx(0.955848, rel=5 * math.sqrt(2 / n))


@pytest.mark.parametrize(("rate", "outage"), [(0.5, 0.122770), (1, 0.271107), (2, 0.612749)])
def test_share_of_blocks_below_a_rate_is_the_outage_probability(rate: float, outage: float) -> None:
    n = 200_000
    tolerance = 5 * math.sqrt(outage * (1 - outage) / n)  # of a binomial share
    adaptive = block_rates(PAPER_LINK, n, np.random.default_rng(2)) / 1e6
    assert (adaptive < rate).mean() == pytest.approx(outage, abs=tolerance)
    fixed = link(scheme="fixed-rate", rate_bits_per_hz=rate)
    carried = block_rates(fixed, n, np.random.default_rng(2)) / 1e6
    assert set(carried.tolist()) == {0.0, rate}
    assert (carried == 0).tolist() == (adaptive < rate).tolist()


def test_blocks_of_inversion_are_silent_or_of_one_rate() -> None:
    carried = block_rates(link(scheme="inversion"), 200_000, np.random.default_rng(3)) / 1e6
    rate = math.log2(1 + SNR / 1.822924)
    assert sorted(set(carried.tolist())) == [0.0, pytest.approx(rate, rel=1e-6)]
    tolerance = 5 * math.sqrt(0.904837 * 0.095163 / 200_000)
    assert (carried > 0).mean() == pytest.approx(0.904837, abs=tolerance)


@pytest.mark.parametrize(
    ("changes", "rate"),
    [
        ({"fading": "rician", "rician_k": 3.0}, 1.877938),
        ({"fading": "rician", "rician_k": 10.0}, 1.984390),
        ({"csi_error_variance": 0.05}, 1.542816),
        ({"sharing": "tdma", "sharers": 10}, 0.1715974),
        ({"sharing": "fdma", "sharers": 10}, 0.1 * ergodic_rate(10**1.5)),
    ],
)
def test_mean_block_rate_of_other_links(changes: dict[str, object], rate: float) -> None:
    rates = block_rates(link(**changes), 400_000, np.random.default_rng(4)) / 1e6
    assert rates.mean() == pytest.approx(rate, abs=5 * rates.std() / 400_000**0.5)


# The adaptive scheme


def test_one_adapter_upload_takes_10_834_seconds_give_or_take_0_19() -> None:
    n = 2_000
    seconds = np.array([one.seconds for one in uploads(ADAPTER_BITS, PAPER_LINK, n, seed=3)])
    # About 1,083 blocks of 10 ms; their summed rates have variance 1083 * 0.955848, and one second
    # is worth 1.715974 Mbit: 0.01 * sqrt(1083 * 0.955848) / 1.715974 = 0.1875 s.
    spread = 0.1875
    # Renewal theory: the last, partly used block adds var/(2 mean^2) = 0.162 blocks = 1.6 ms.
    assert seconds.mean() == pytest.approx(10.834, abs=0.0016 + 5 * spread / math.sqrt(n))
    # The relative error of a standard deviation of n normal values is 1/sqrt(2n).
    assert seconds.std(ddof=1) == pytest.approx(spread, rel=5 / math.sqrt(2 * n))


@pytest.mark.parametrize("bits", [1.0, 7_000.0, 50_000.0, 3e6, ADAPTER_BITS, 60e6])
@pytest.mark.parametrize("seed", range(3))
def test_an_upload_is_what_a_walk_over_the_blocks_gives(bits: float, seed: int) -> None:
    # 60 Mbit are some 3,500 blocks, so the walk crosses the blocks drawn at a time.
    gains = iter(np.random.default_rng(seed).standard_exponential(8 * 1024).tolist())
    left, seconds = bits, 0.0
    while left > 0:
        rate = 1e6 * math.log2(1 + SNR * next(gains))
        used = min(0.01, left / rate)
        left -= rate * used if used == 0.01 else left
        seconds += used
    got = upload(bits, PAPER_LINK, np.random.default_rng(seed))
    assert got.seconds == pytest.approx(seconds, rel=1e-9)
    assert got.air_seconds == got.radio_seconds == got.transmit_joules == got.seconds
    assert got.delivered


@given(
    bits=st.lists(st.floats(0, 1e8), min_size=2, max_size=2).map(sorted),
    snr_db=st.floats(-10, 40),
    seed=st.integers(0, 2**32),
)
def test_more_bits_over_the_same_fading_never_take_less_time(
    bits: list[float], snr_db: float, seed: int
) -> None:
    less, more = (upload_seconds(b, link(snr_db=snr_db), np.random.default_rng(seed)) for b in bits)
    assert 0 <= less <= more


@given(seed=st.integers(0, 2**32), factor=st.floats(0.1, 100))
def test_time_scales_with_the_coherence_time_when_bits_do(seed: int, factor: float) -> None:
    one = upload_seconds(1e6, link(), np.random.default_rng(seed))
    slow = link(coherence_seconds=0.01 * factor)
    scaled = upload_seconds(1e6 * factor, slow, np.random.default_rng(seed))
    assert scaled == pytest.approx(one * factor, rel=1e-9)


@pytest.mark.parametrize(
    ("snr_db", "bits", "seconds"),
    [
        (0.0, 3e6, 3.0),  # log2(1 + 1) = 1 bit/s/Hz
        (10 * math.log10(15), 8e6, 2.0),  # log2(1 + 15) = 4 bit/s/Hz
        (5.0, 2.057373e6, 1.0),
        (5.0, 0.0, 0.0),
    ],
)
def test_without_fading_an_upload_takes_bits_over_the_awgn_rate(
    snr_db: float, bits: float, seconds: float
) -> None:
    still = link(snr_db=snr_db, fading="none")
    assert upload_seconds(bits, still, np.random.default_rng(0)) == pytest.approx(seconds, rel=3e-7)
    rates = block_rates(still, 4, np.random.default_rng(0))
    assert rates.shape == (4,)
    if bits:
        assert rates.tolist() == pytest.approx([bits / seconds] * 4, rel=3e-7)


# Sharing


def test_ten_clients_in_turn_take_ten_times_the_delay_at_the_same_energy() -> None:
    got = uploads(ADAPTER_BITS, link(sharing="tdma", sharers=10), 200)
    seconds = np.array([one.seconds for one in got])
    # In turn 10,834 blocks are touched: 108.34 s, give or take 0.1875 * sqrt(10).
    assert seconds.mean() == pytest.approx(108.34, abs=5 * 0.593 / 200**0.5)
    for one in got:
        assert one.air_seconds == pytest.approx(one.seconds / 10)
        assert one.transmit_joules == one.air_seconds == one.radio_seconds


def test_ten_clients_side_by_side_take_42_9_seconds_and_joules() -> None:
    got = uploads(ADAPTER_BITS, link(sharing="fdma", sharers=10), 200)
    seconds = np.array([one.seconds for one in got])
    expected = ADAPTER_BITS / (1e5 * ergodic_rate(10**1.5))
    assert expected == pytest.approx(42.9, abs=0.05)
    assert seconds.mean() == pytest.approx(expected, abs=0.002 + 5 * seconds.std() / 200**0.5)
    assert all(one.transmit_joules == one.seconds == one.radio_seconds for one in got)


# Shadowing


def test_shadowing_is_one_draw_an_upload_and_comes_first() -> None:
    generator = np.random.default_rng(5)
    snr = SNR * 10 ** (0.8 * generator.standard_normal())
    gains = generator.standard_exponential(6)
    expected = 1e6 * np.log2(1 + snr * gains)
    got = block_rates(link(shadowing_db=8.0), 6, np.random.default_rng(5))
    assert got.tolist() == pytest.approx(expected.tolist(), rel=1e-12)


def test_shadowing_leaves_the_median_and_spreads_uploads() -> None:
    still = link(shadowing_db=6.0, fading="none")
    seconds = np.array([one.seconds for one in uploads(2.057373e6, still, 4_000)])
    # Half of all uploads are above the median: a binomial share.
    assert (seconds > 1.0).mean() == pytest.approx(0.5, abs=5 * 0.5 / 4_000**0.5)
    shadows = 10 * np.log10((2 ** (2.057373 / seconds) - 1) / SNR)
    assert shadows.std() == pytest.approx(6.0, rel=5 / math.sqrt(2 * 4_000))


def test_a_pilot_shows_the_uploads_own_first_block() -> None:
    shadowed = link(shadowing_db=8.0)
    pilot = pilot_rate(shadowed, np.random.default_rng(6))
    first = block_rates(shadowed, 3, np.random.default_rng(6))[0]
    assert pilot == first
    bits = 0.999 * 0.01 * pilot  # fits the first block
    seconds = upload_seconds(bits, shadowed, np.random.default_rng(6))
    assert seconds == pytest.approx(bits / pilot, rel=1e-12)


# A fixed rate, sent again until it is through


def fixed_rate_walk(
    bits: float, rate: float, generator: np.random.Generator
) -> tuple[float, float]:
    """Return delay and time on the air, one block at a time, SNR 5 dB, 1 MHz, 10 ms."""
    left, seconds, air = bits, 0.0, 0.0
    while left > 1e-6:
        sent = min(left, 1e6 * rate * 0.01)
        air += sent / (1e6 * rate)
        if math.log2(1 + SNR * generator.standard_exponential()) >= rate:
            left -= sent
            seconds += 0.01 if left > 1e-6 else sent / (1e6 * rate)
        else:
            seconds += 0.01
    return seconds, air


@pytest.mark.parametrize("bits", [4_000.0, 50_000.0, 120_000.0])
def test_fixed_rate_takes_what_a_walk_with_retransmissions_takes(bits: float) -> None:
    n = 4_000
    over = link(scheme="fixed-rate", rate_bits_per_hz=1.0)
    got = np.array([(one.seconds, one.air_seconds) for one in uploads(bits, over, n, seed=7)])
    generator = np.random.default_rng(8)
    walked = np.array([fixed_rate_walk(bits, 1.0, generator) for _ in range(n)])
    # Five standard deviations of the difference of two means; 6 % of one of two spreads.
    np.testing.assert_allclose(
        got.mean(axis=0), walked.mean(axis=0), atol=5 * float(walked.std() * (2 / n) ** 0.5)
    )
    shares = [np.mean(x[:, 0] > np.median(walked[:, 0])) for x in (got, walked)]
    assert shares[0] == pytest.approx(shares[1], abs=5 * 0.5 * (2 / n) ** 0.5)


def test_best_fixed_rate_sends_each_block_1_84_times() -> None:
    over = link(scheme="fixed-rate")
    rate = best_fixed_rate(SNR)
    blocks = 200
    got = uploads(blocks * 1e6 * rate * 0.01, over, 500)
    sent = np.array([one.seconds for one in got]) / 0.01 / blocks
    assert sent.mean() == pytest.approx(1.844534, abs=5 * sent.std() / 500**0.5)
    for one in got:
        # The last piece fills its block, so that it is on the air whenever its delay runs.
        assert one.air_seconds == pytest.approx(one.seconds, rel=1e-9)
        assert one.transmit_joules == one.air_seconds
        assert one.delivered


def test_fixed_rate_without_fading_fails_never_or_always() -> None:
    below = link(scheme="fixed-rate", rate_bits_per_hz=2.0, fading="none")
    assert upload_seconds(3e6, below, np.random.default_rng(0)) == pytest.approx(1.5)
    above = link(scheme="fixed-rate", rate_bits_per_hz=2.1, fading="none")
    with pytest.raises(InputError, match="under scheme 'fixed-rate' spans inf coherence blocks"):
        upload(3e6, above, np.random.default_rng(0))


# Outage: sent once


def test_outage_drops_the_whole_upload_if_any_block_fails() -> None:
    n = 20_000
    over = link(scheme="outage", rate_bits_per_hz=0.1)
    got = uploads(2_500.0, over, n)  # two blocks and a half at 1,000 bits each
    every_block = math.exp(-3 * (2**0.1 - 1) / SNR)
    share = np.mean([one.delivered for one in got])
    assert share == pytest.approx(every_block, abs=5 * (every_block * (1 - every_block) / n) ** 0.5)
    # Delivered or not: nobody told the sender.
    for one in got[:50]:
        assert one.seconds == one.air_seconds == one.transmit_joules == pytest.approx(0.025)


def test_outage_of_one_long_block_is_the_outage_probability() -> None:
    slow = link(scheme="outage", rate_bits_per_hz=1.0, coherence_seconds=100.0)
    got = uploads(ADAPTER_BITS, slow, 20_000)
    lost = np.mean([not one.delivered for one in got])
    assert lost == pytest.approx(0.271107, abs=5 * (0.271107 * 0.728893 / 20_000) ** 0.5)
    assert got[0].seconds == pytest.approx(18.590976)


# Truncated inversion


def test_inversion_is_what_a_walk_over_the_blocks_gives() -> None:
    over = link(scheme="inversion", cut_off_gain=0.3, transmit_watts=2.0)
    rate = 1e6 * inversion_rate(SNR, 0.3)
    bits = 1500.5 * rate * 0.01  # more blocks than are drawn at a time
    gains = iter(np.random.default_rng(9).standard_exponential(4 * 1024).tolist())
    left, seconds, air, joules = bits, 0.0, 0.0, 0.0
    while left > 1e-6:
        gain = next(gains)
        used = min(0.01, left / rate) if gain >= 0.3 else 0.0
        left -= used * rate
        air += used
        joules += used * 2.0 / (gain * inverse_gain_mean(0.3))
        seconds += used if left <= 1e-6 else 0.01
    got = upload(bits, over, np.random.default_rng(9))
    assert got.seconds == got.radio_seconds == pytest.approx(seconds, rel=1e-9)
    assert got.air_seconds == pytest.approx(air, rel=1e-9)
    assert got.transmit_joules == pytest.approx(joules, rel=1e-9)


def test_inversion_keeps_the_mean_power() -> None:
    got = uploads(ADAPTER_BITS, link(scheme="inversion"), 300)
    watts = np.array([one.transmit_joules / one.seconds for one in got])
    assert watts.mean() == pytest.approx(1.0, abs=5 * watts.std() / 300**0.5)
    active = np.array([one.air_seconds / one.seconds for one in got])
    assert active.mean() == pytest.approx(0.904837, abs=5 * active.std() / 300**0.5)


@pytest.mark.parametrize("scheme", ["fixed-rate", "inversion"])
def test_schemes_that_adapt_share_a_still_channel_alike(scheme: Scheme) -> None:
    still = link(scheme=scheme, fading="none", sharing="tdma", sharers=4)
    got = upload(1e6 * awgn_rate(SNR), still, np.random.default_rng(0))
    assert got.seconds == pytest.approx(4.0)
    assert (got.air_seconds, got.transmit_joules) == (pytest.approx(1.0), pytest.approx(1.0))


@pytest.mark.parametrize(
    ("bits", "filled"),
    [(2_500.0, (2, 0.5)), (2_000.0, (1, 1.0)), (1_000.0, (0, 1.0)), (1.0, (0, 0.001))],
)
def test_bits_fill_whole_blocks_and_a_piece(bits: float, filled: tuple[int, float]) -> None:
    assert pieces(bits, 1_000.0) == pytest.approx(filled)


def test_a_rounding_error_is_no_block() -> None:
    a_block = 0.1 + 0.2  # 0.30000000000000004
    assert pieces(0.9, a_block / 3 * 3) == (2, pytest.approx(1.0))
    assert pieces(3 * a_block, 0.3) == (2, 1.0)


# What is refused


@pytest.mark.parametrize("bits", [-1.0, math.nan, math.inf])
@pytest.mark.parametrize("fading", ["rayleigh", "none"])
def test_a_number_of_bits_that_cannot_be_sent_is_refused(bits: float, fading: str) -> None:
    with pytest.raises(InputError, match=f"bits = {bits}; "):
        upload_seconds(bits, link(fading=fading), np.random.default_rng(0))


@pytest.mark.parametrize("scheme", ["adaptive", "fixed-rate", "outage", "inversion"])
def test_a_link_too_weak_to_walk_is_refused_before_it_is_walked(scheme: Scheme) -> None:
    class Untouched(np.random.Generator):
        def standard_exponential(self, *_args: object, **_options: object) -> float:
            raise AssertionError("a block was drawn")

    rate = 1e-8 if scheme == "outage" else None
    weak = link(snr_db=-80.0, scheme=scheme, rate_bits_per_hz=rate)
    with pytest.raises(InputError, match=f"above {MOST_BLOCKS:,}; raise one of the three") as err:
        upload_seconds(ADAPTER_BITS, weak, Untouched(np.random.Philox(0)))
    assert "snr_db = -80" in str(err.value)


@pytest.mark.parametrize("scheme", ["adaptive", "fixed-rate", "inversion"])
def test_nothing_to_send_takes_nothing(scheme: Scheme) -> None:
    got = upload(0.0, link(scheme=scheme), np.random.default_rng(0))
    assert got == Upload(seconds=0.0, air_seconds=0.0, radio_seconds=0.0, transmit_joules=0.0)
