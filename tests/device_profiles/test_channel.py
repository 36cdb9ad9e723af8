"""The uplink against closed forms (exponential integral) and a block-by-block walk."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import exp1

from device_profiles.channel import (
    MOST_BLOCKS,
    PAPER_LINK,
    Link,
    block_rates,
    profile_link,
    upload_seconds,
)
from device_profiles.errors import InputError
from device_profiles.profile import Radio

ADAPTER_BITS = 580_968 * 32  # 18.591 Mbit
GAINS, WEIGHTS = np.polynomial.laguerre.laggauss(128)  # E[f(X)] for X ~ Exp(1)


def link(**changes: object) -> Link:
    values: dict[str, object] = {"snr_db": 5.0, "bandwidth_hz": 1e6, "transmit_watts": 1.0}
    return Link(**(values | changes))  # type: ignore[arg-type]


def ergodic_rate(snr: float) -> float:
    """Return E[log2(1 + snr*X)] for X ~ Exp(1), bit/s/Hz."""
    return math.exp(1 / snr) * float(exp1(1 / snr)) / math.log(2)


def rate_variance(snr: float) -> float:
    """Return the variance of log2(1 + snr*X) by Gauss-Laguerre quadrature."""
    rates = np.log2(1 + snr * GAINS)
    return float(WEIGHTS @ rates**2 - (WEIGHTS @ rates) ** 2)


@pytest.mark.parametrize(
    ("snr_db", "published"), [(0, 0.860347), (5, 1.715974), (10, 2.906515), (20, 5.884048)]
)
def test_mean_block_rate_is_the_ergodic_rate_of_rayleigh_fading(
    snr_db: float, published: float
) -> None:
    snr, n = 10 ** (snr_db / 10), 400_000
    assert ergodic_rate(snr) == pytest.approx(published, abs=5e-7)
    rates = block_rates(link(snr_db=snr_db), n, np.random.default_rng(0)) / 1e6
    # Five standard deviations of the mean of n independent blocks.
    assert rates.mean() == pytest.approx(published, abs=5 * math.sqrt(rate_variance(snr) / n))


def test_variance_of_the_block_rate_at_5_db() -> None:
    assert rate_variance(10**0.5) == pytest.approx(0.955848, abs=1e-4)
    n = 400_000
    rates = block_rates(PAPER_LINK, n, np.random.default_rng(1)) / 1e6
    # The fourth central moment is 2.34 variances squared (quadrature): relative error
    # sqrt((2.34 - 1)/n), below sqrt(2/n).
    assert rates.var() == pytest.approx(0.955848, rel=5 * math.sqrt(2 / n))


@pytest.mark.parametrize(("rate", "outage"), [(0.5, 0.122770), (1, 0.271107), (2, 0.612749)])
def test_share_of_blocks_below_a_rate_is_the_outage_probability(rate: float, outage: float) -> None:
    assert 1 - math.exp(-(2**rate - 1) / 10**0.5) == pytest.approx(outage, abs=5e-7)
    n = 200_000
    rates = block_rates(PAPER_LINK, n, np.random.default_rng(2)) / 1e6
    tolerance = 5 * math.sqrt(outage * (1 - outage) / n)  # of a binomial share
    assert (rates < rate).mean() == pytest.approx(outage, abs=tolerance)


def test_one_adapter_upload_takes_10_834_seconds_give_or_take_0_19() -> None:
    n = 2_000
    generator = np.random.default_rng(3)
    seconds = np.array([upload_seconds(ADAPTER_BITS, PAPER_LINK, generator) for _ in range(n)])
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
        rate = 1e6 * math.log2(1 + 10**0.5 * next(gains))
        used = min(0.01, left / rate)
        left -= rate * used if used == 0.01 else left
        seconds += used
    got = upload_seconds(bits, PAPER_LINK, np.random.default_rng(seed))
    assert got == pytest.approx(seconds, rel=1e-9)


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


def test_fading_costs_rate_on_average() -> None:
    assert link().awgn_rate == pytest.approx(2.057373e6, rel=3e-7)
    for snr_db in (-10.0, 0.0, 10.0, 30.0):
        assert ergodic_rate(10 ** (snr_db / 10)) * 1e6 < link(snr_db=snr_db).awgn_rate


def test_a_very_weak_link_keeps_its_rate() -> None:
    # At -100 dB log2(1 + x) is x/ln 2 to ten digits, where 1 + x alone would keep six.
    weak = link(snr_db=-100.0, fading="none")
    assert weak.awgn_rate == pytest.approx(1e6 * 1e-10 / math.log(2), rel=1e-9)


def test_the_papers_link_is_5_db_1_mhz_1_watt_rayleigh() -> None:
    assert link(fading="rayleigh", coherence_seconds=0.01) == PAPER_LINK
    assert PAPER_LINK.snr == pytest.approx(3.1622776601683795, rel=1e-15)


def test_a_profiles_link_has_the_figures_of_its_radio() -> None:
    radio = Radio(snr_db=2.0, bandwidth_hz=3e5, transmit_watts=0.5)
    assert profile_link(radio) == link(snr_db=2.0, bandwidth_hz=3e5, transmit_watts=0.5)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("bandwidth_hz", -1e6), ("bandwidth_hz", 0.0), ("bandwidth_hz", math.nan),
        ("bandwidth_hz", math.inf), ("coherence_seconds", 0.0), ("coherence_seconds", -0.01),
        ("transmit_watts", -1.0), ("transmit_watts", math.inf), ("snr_db", math.nan),
        ("snr_db", math.inf), ("snr_db", 101.0), ("snr_db", -101.0),
    ],
)  # fmt: skip
def test_a_link_that_cannot_be_is_refused_by_field_and_value(field: str, value: float) -> None:
    with pytest.raises(InputError, match=f"^{field} = {value}; give"):
        link(**{field: value})


def test_an_unknown_fading_is_told_with_the_known() -> None:
    with pytest.raises(InputError, match=r"unknown fading 'rice'.*choose one of none, rayleigh"):
        link(fading="rice")


@pytest.mark.parametrize("bits", [-1.0, math.nan, math.inf])
@pytest.mark.parametrize("fading", ["rayleigh", "none"])
def test_a_number_of_bits_that_cannot_be_sent_is_refused(bits: float, fading: str) -> None:
    with pytest.raises(InputError, match=f"bits = {bits}; "):
        upload_seconds(bits, link(fading=fading), np.random.default_rng(0))


def test_a_link_too_weak_to_walk_is_refused_before_it_is_walked() -> None:
    class Untouched(np.random.Generator):
        def standard_exponential(self, *_args: object, **_options: object) -> float:
            raise AssertionError("a block was drawn")

    weak = link(snr_db=-80.0)
    with pytest.raises(InputError, match=f"above {MOST_BLOCKS:,}; raise one of the three") as err:
        upload_seconds(ADAPTER_BITS, weak, Untouched(np.random.Philox(0)))
    assert "snr_db = -80" in str(err.value)
