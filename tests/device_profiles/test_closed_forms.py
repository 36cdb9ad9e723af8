"""The reference numbers: each formula against known digits, another formula, and a simulation.

Simulations are of independent draws; a tolerance of five standard deviations of the simulated mean
fails a right formula once in two million seeds, and the seeds are fixed.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import mpmath
import numpy as np
import numpy.typing as npt
import pytest
from scipy import integrate, optimize, special, stats

from device_profiles import closed_forms as cf
from device_profiles.errors import InputError

SNR = 10**0.5  # 5 dB
DRAWS = 400_000
Floats = npt.NDArray[np.float64]


def assert_mean(samples: Floats, expected: float) -> None:
    assert samples.mean() == pytest.approx(expected, abs=5 * samples.std() / samples.size**0.5)


def rayleigh(seed: int, *shape: int) -> Floats:
    """Return |h|^2 for circular complex normal h of unit variance: not by way of an exponential."""
    h = np.random.default_rng(seed).normal(scale=0.5**0.5, size=(*(shape or (DRAWS,)), 2))
    return np.asarray((h**2).sum(axis=-1), dtype=np.float64)


def rician(seed: int, k: float) -> Floats:
    """Return |direct path + scattered paths|^2, the phase of the direct path at random."""
    generator = np.random.default_rng(seed)
    scattered = generator.normal(scale=(0.5 / (k + 1)) ** 0.5, size=(2, DRAWS))
    phase = generator.uniform(0, 2 * np.pi, DRAWS)
    direct = (k / (k + 1)) ** 0.5 * np.exp(1j * phase)
    return np.asarray(np.abs(direct + scattered[0] + 1j * scattered[1]) ** 2, dtype=np.float64)


def rayleigh_integral(function: Callable[[float], float], above: float = 0.0) -> float:
    return float(integrate.quad(lambda x: function(x) * math.exp(-x), above, 60, limit=200)[0])


# 1, 2: the rate of a block


@pytest.mark.parametrize(
    ("snr_db", "known"), [(0, 0.860347), (5, 1.715974), (10, 2.906515), (20, 5.884048)]
)
def test_ergodic_rate(snr_db: float, known: float) -> None:
    snr = 10 ** (snr_db / 10)
    assert cf.ergodic_rate(snr) == pytest.approx(known, abs=5e-7)
    by_integral = math.exp(1 / snr) * float(special.exp1(1 / snr)) / math.log(2)
    assert cf.ergodic_rate(snr) == pytest.approx(by_integral, rel=1e-12)
    assert_mean(np.log2(1 + snr * rayleigh(1)), known)


@pytest.mark.parametrize("snr_db", [-100, -50, -20, 60, 100])
def test_ergodic_rate_keeps_its_digits_at_the_ends_of_the_range(snr_db: float) -> None:
    with mpmath.workdps(40):
        inverse = 1 / mpmath.mpf(10) ** (mpmath.mpf(snr_db) / 10)
        expected = mpmath.exp(inverse) * mpmath.e1(inverse) / mpmath.log(2)
    assert cf.ergodic_rate(10 ** (snr_db / 10)) == pytest.approx(float(expected), rel=1e-9)


def test_awgn_rate() -> None:
    assert cf.awgn_rate(SNR) == pytest.approx(2.057373, abs=5e-7)
    assert cf.awgn_rate(SNR) == cf.ergodic_rate(SNR, math.inf)
    assert cf.awgn_rate(15.0) == pytest.approx(4.0, rel=1e-15)


def test_variance_and_third_moment_of_the_rate() -> None:
    moments = cf.rate_moments(SNR)
    assert moments.variance == pytest.approx(0.955848, abs=5e-7)
    mean = rayleigh_integral(lambda x: math.log2(1 + SNR * x))
    second = rayleigh_integral(lambda x: (math.log2(1 + SNR * x) - mean) ** 2)
    third = rayleigh_integral(lambda x: (math.log2(1 + SNR * x) - mean) ** 3)
    assert moments.variance == pytest.approx(second, rel=1e-8)
    assert moments.third == pytest.approx(third, rel=1e-7)
    rates = np.log2(1 + SNR * rayleigh(2))
    assert_mean((rates - moments.mean) ** 2, moments.variance)
    assert_mean((rates - moments.mean) ** 3, moments.third)


# 3, 4: outage


@pytest.mark.parametrize(("rate", "known"), [(0.5, 0.122770), (1, 0.271107), (2, 0.612749)])
def test_outage_probability(rate: float, known: float) -> None:
    assert cf.outage_probability(rate, SNR) == pytest.approx(known, abs=5e-7)
    assert cf.outage_probability(rate, SNR) == pytest.approx(
        1 - math.exp(-(2**rate - 1) / SNR), rel=1e-12
    )
    assert_mean((np.log2(1 + SNR * rayleigh(3)) < rate).astype(float), known)


@pytest.mark.parametrize(("probability", "known"), [(0.01, 0.045138), (0.1, 0.414871)])
def test_outage_rate(probability: float, known: float) -> None:
    assert cf.outage_rate(probability, SNR) == pytest.approx(known, abs=5e-7)
    exact = math.log2(1 - SNR * math.log(1 - probability))
    assert cf.outage_rate(probability, SNR) == pytest.approx(exact, rel=1e-12)
    assert_mean((np.log2(1 + SNR * rayleigh(4)) < known).astype(float), probability)


@pytest.mark.parametrize("rician_k", [0.0, 3.0, 10.0])
def test_outage_rate_is_the_inverse_of_the_outage_probability(rician_k: float) -> None:
    rate = cf.outage_rate(0.05, SNR, rician_k)
    assert cf.outage_probability(rate, SNR, rician_k) == pytest.approx(0.05, rel=1e-9)


# 5: a fixed rate, sent again until it is through


def test_best_fixed_rate_goodput_and_transmissions() -> None:
    rate = cf.best_fixed_rate(SNR)
    assert rate == pytest.approx(1.553867, abs=5e-7)
    assert rate == pytest.approx(float(special.lambertw(SNR).real) / math.log(2), rel=1e-12)
    assert cf.goodput(rate, SNR) == pytest.approx(0.842417, abs=5e-7)
    assert cf.mean_transmissions(rate, SNR) == pytest.approx(1.844534, abs=5e-7)
    through = np.log2(1 + SNR * rayleigh(5)) >= rate
    assert_mean(rate * through, 0.842417)
    # Transmissions until each success: the distances between successes in a row of blocks.
    assert_mean(np.diff(np.flatnonzero(through)).astype(float), 1.844534)


@pytest.mark.parametrize("snr", [1e-10, 1e-3, 1.0, 2.718281828459045, 30.0, 1e4, 1e10])
def test_best_fixed_rate_is_lamberts_function_at_any_snr(snr: float) -> None:
    expected = float(special.lambertw(snr).real) / math.log(2)
    assert cf.best_fixed_rate(snr) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("rician_k", [1e-6, 3.0, 10.0, 500.0])
def test_best_fixed_rate_under_rician_fading_has_the_best_goodput(rician_k: float) -> None:
    def lost(rate: float) -> float:
        gain = (2**rate - 1) / SNR
        return -rate * float(stats.ncx2(2, 2 * rician_k).sf(2 * (rician_k + 1) * gain))

    found = optimize.minimize_scalar(lost, bounds=(0.5, 3), options={"xatol": 1e-9})
    # A maximum is flat: half the digits of the goodput.
    assert cf.best_fixed_rate(SNR, rician_k) == pytest.approx(float(found.x), rel=1e-6)
    assert cf.best_fixed_rate(SNR, math.inf) == cf.awgn_rate(SNR)


# 6: the best and the worst of several users


def test_order_statistics_of_ten_users() -> None:
    assert cf.best_gain_mean(10) == pytest.approx(2.928968, abs=5e-7)
    assert cf.best_user_rate(SNR, 10) == pytest.approx(3.261299, abs=5e-7)
    assert cf.best_user_rate(SNR, 2) == pytest.approx(2.275350, abs=5e-7)
    assert cf.worst_user_rate(SNR, 10) == pytest.approx(0.362150, abs=5e-7)
    gains = rayleigh(6, DRAWS // 10, 10)
    assert_mean(gains.max(axis=1), 2.928968)
    assert_mean(np.log2(1 + SNR * gains.max(axis=1)), 3.261299)
    assert_mean(np.log2(1 + SNR * gains[:, :2].max(axis=1)), 2.275350)
    assert_mean(np.log2(1 + SNR * gains.min(axis=1)), 0.362150)


@pytest.mark.parametrize("users", [1, 2, 10])
def test_best_user_rate_is_that_of_inclusion_and_exclusion(users: int) -> None:
    # 1 - (1 - exp(-x))^n expanded: the least of j users has a gain of X/j.
    terms = [
        (-1) ** (j + 1) * math.comb(users, j) * cf.worst_user_rate(SNR, j)
        for j in range(1, users + 1)
    ]
    assert cf.best_user_rate(SNR, users) == pytest.approx(math.fsum(terms), rel=1e-11)


# 7: truncated channel inversion


def test_truncated_inversion() -> None:
    assert cf.active_probability(0.1) == pytest.approx(0.904837, abs=5e-7)
    assert cf.inverse_gain_mean(0.1) == pytest.approx(1.822924, abs=5e-7)
    assert cf.inverse_gain_mean(0.1) == pytest.approx(float(special.exp1(0.1)), rel=1e-12)
    rate = math.log2(1 + SNR / 1.8229239584193906)
    assert cf.inversion_rate(SNR, 0.1) == pytest.approx(rate, rel=1e-12)
    gains = rayleigh(7)
    active = gains >= 0.1
    assert_mean(active.astype(float), 0.904837)
    power = np.divide(1 / 1.822924, gains, out=np.zeros_like(gains), where=active)
    assert_mean(power, 1.0)  # the mean power is kept
    # and the received SNR is the same in every block that is used
    np.testing.assert_allclose((SNR * power * gains)[active], SNR / 1.822924)


def test_inverse_gain_mean_under_rician_fading() -> None:
    expected = integrate.quad(lambda x: stats.ncx2(2, 6).pdf(8 * x) * 8 / x, 0.1, 12, limit=200)[0]
    assert cf.inverse_gain_mean(0.1, 3.0) == pytest.approx(expected, rel=1e-8)


# 8: Rician fading


@pytest.mark.parametrize(
    ("rician_k", "rate", "outage"), [(3.0, 1.877938, 0.130539), (10.0, 1.984390, 0.023813)]
)
def test_rician_rate_and_outage(rician_k: float, rate: float, outage: float) -> None:
    assert cf.ergodic_rate(SNR, rician_k) == pytest.approx(rate, abs=5e-7)
    assert cf.outage_probability(1.0, SNR, rician_k) == pytest.approx(outage, abs=5e-7)
    law = stats.ncx2(2, 2 * rician_k)
    scale = 2 * (rician_k + 1)
    by_scipy = integrate.quad(
        lambda x: math.log2(1 + SNR * x) * law.pdf(scale * x) * scale, 0, 12, limit=200
    )[0]
    assert cf.ergodic_rate(SNR, rician_k) == pytest.approx(by_scipy, rel=1e-8)
    rates = np.log2(1 + SNR * rician(8, rician_k))
    assert_mean(rates, rate)
    assert_mean((rates < 1).astype(float), outage)


# 9: a channel that is not known exactly


def test_effective_snr_of_an_imperfectly_known_channel() -> None:
    effective = cf.effective_snr(SNR, 0.05)
    assert effective == pytest.approx(2.594014, abs=5e-7)
    assert cf.ergodic_rate(effective) == pytest.approx(1.542816, abs=5e-7)
    # h = known part of variance 0.95 + unknown part of 0.05, which arrives as noise.
    generator = np.random.default_rng(9)
    parts = generator.normal(scale=0.5**0.5, size=(2, DRAWS, 2))
    known = 0.95 * (parts[0] ** 2).sum(axis=-1)
    unknown = 0.05 * (parts[1] ** 2).sum(axis=-1)
    assert_mean(known + unknown, 1.0)
    noise = 1 + SNR * float(unknown.mean())
    # The mean of the unknown power is itself of DRAWS values: relative error 1/sqrt(DRAWS).
    assert SNR * float(known.mean()) / noise == pytest.approx(effective, rel=10 / DRAWS**0.5)
    assert_mean(np.log2(1 + SNR * known / (1 + SNR * 0.05)), 1.542816)


def test_a_perfectly_known_channel_keeps_its_snr() -> None:
    assert cf.effective_snr(SNR, 0.0) == SNR


# 10: why an upload is not one draw


def test_mean_time_of_a_single_draw_diverges_and_that_of_many_blocks_does_not() -> None:
    # E[1/R; X >= x0] grows like ln(1/x0) * ln 2 / snr for ever: each factor of ten adds the same.
    def one_draw(least: float) -> float:
        def over_log_gain(u: float) -> float:  # x = exp(u)
            return math.exp(u - math.exp(u)) * math.log(2) / math.log1p(SNR * math.exp(u))

        return float(integrate.quad(over_log_gain, math.log(least), 4, limit=500)[0])

    step = math.log(10) * math.log(2) / SNR
    growth = [one_draw(least / 10) - one_draw(least) for least in (1e-6, 1e-9, 1e-12)]
    assert growth == pytest.approx([step] * 3, rel=1e-5)
    gains = rayleigh(10, 400, 2000)
    through = np.cumsum(np.log2(1 + SNR * gains) * 0.01, axis=1) >= 18.590976
    blocks = through.argmax(axis=1)
    # 18.59 / 0.01716 = 1,083.4 blocks, give or take sqrt(1083 * 0.955848)/1.715974 = 18.75.
    assert blocks.mean() == pytest.approx(1083.4, abs=1 + 5 * 18.75 / 400**0.5)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: cf.ergodic_rate(0.0), "snr = 0.0; give a power ratio above 0"),
        (lambda: cf.ergodic_rate(math.nan), "snr = nan; "),
        (lambda: cf.outage_probability(-0.5, 1.0), "rate = -0.5; give 0 bit/s/Hz or more"),
        (lambda: cf.outage_rate(0.0, 1.0), "probability = 0.0; give a number between 0 and 1"),
        (lambda: cf.outage_rate(1.0, 1.0), "probability = 1.0; give a number between 0 and 1"),
        (lambda: cf.best_user_rate(1.0, 0), "users = 0; give 1 or more"),
        (lambda: cf.inverse_gain_mean(0.0), "cut_off_gain = 0.0; give a power ratio above 0"),
        (lambda: cf.inverse_gain_mean(2.0, math.inf), "cut_off_gain = 2.0; the channel is never"),
        (lambda: cf.effective_snr(1.0, 1.0), "csi_error_variance = 1.0; give 0 or more, and below"),
        (lambda: cf.effective_snr(1.0, -0.1), "csi_error_variance = -0.1; give 0 or more"),
    ],
)
def test_a_number_out_of_range_is_refused(call: Callable[[], float], told: str) -> None:
    with pytest.raises(InputError, match=f"^{told}"):
        call()


def test_a_rate_that_never_gets_through_takes_for_ever() -> None:
    assert cf.mean_transmissions(5.0, 1.0, math.inf) == math.inf
    assert cf.goodput(5.0, 1.0, math.inf) == 0.0
    assert cf.outage_probability(5000.0, 1.0) == 1.0
