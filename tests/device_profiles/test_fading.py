"""The law of the gain against scipy's noncentral chi-square, mpmath's integrals and draws."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from device_profiles.errors import InputError
from device_profiles.fading import draw_gains, gain_below, gain_expectation

FACTORS = [0.0, 1e-3, 1.0, 3.0, 10.0, 40.0, 55.0, 300.0, 1000.0]


def chi_square(rician_k: float) -> stats.rv_frozen:
    """Return the law of 2(K+1)X: two squared normals, one of them off zero."""
    return stats.ncx2(2, 2 * rician_k)


@pytest.mark.parametrize("rician_k", [0.0, 0.5, 3.0, 10.0, 200.0])
def test_drawn_gains_have_the_law_of_two_squared_normals(rician_k: float) -> None:
    gains = draw_gains(rician_k, 50_000, np.random.default_rng(4))
    law = stats.chi2(2) if rician_k == 0 else chi_square(rician_k)
    # The seed is fixed: a right law fails once in a thousand seeds, and this one does not.
    assert stats.kstest(2 * (rician_k + 1) * gains, law.cdf).pvalue > 1e-3


@pytest.mark.parametrize("rician_k", [0.0, 3.0])
def test_the_first_gains_do_not_depend_on_how_many_are_drawn(rician_k: float) -> None:
    few, many = (draw_gains(rician_k, n, np.random.default_rng(9)) for n in (7, 700))
    assert few.tolist() == many[:7].tolist()


def test_without_fading_nothing_is_drawn() -> None:
    generator = np.random.default_rng(0)
    assert draw_gains(math.inf, 3, generator).tolist() == [1.0, 1.0, 1.0]
    assert generator.random() == np.random.default_rng(0).random()


@pytest.mark.parametrize("rician_k", FACTORS)
def test_mean_is_one_and_the_variance_that_of_two_squared_normals(rician_k: float) -> None:
    assert gain_expectation(np.ones_like, rician_k) == pytest.approx(1, rel=1e-10)
    assert gain_expectation(lambda x: x, rician_k) == pytest.approx(1, rel=1e-10)
    variance = (2 * rician_k + 1) / (rician_k + 1) ** 2
    assert gain_expectation(lambda x: (x - 1) ** 2, rician_k) == pytest.approx(variance, rel=1e-9)


@pytest.mark.parametrize("rician_k", FACTORS[1:])
@pytest.mark.parametrize("gain", [1e-4, 0.05, 0.3, 0.9, 1.0, 1.3, 3.0, 60.0])
def test_probability_below_is_the_noncentral_chi_squares(rician_k: float, gain: float) -> None:
    expected = float(chi_square(rician_k).cdf(2 * (rician_k + 1) * gain))
    # scipy itself is off below 1e-30 where the direct path is strong.
    assert gain_below(gain, rician_k) == pytest.approx(expected, rel=1e-9, abs=1e-30)


def test_a_tiny_probability_keeps_its_digits() -> None:
    # 1 - exp(-x) by its series, where 1 minus the other side would keep nothing.
    assert gain_below(1e-18) == pytest.approx(1e-18, rel=1e-12)
    # The density at 0 is (K + 1)*exp(-K).
    assert gain_below(1e-12, 20.0) == pytest.approx(21 * math.exp(-20) * 1e-12, rel=1e-9)


@pytest.mark.parametrize(("rician_k", "above"), [(0.0, 0.0), (0.0, 0.7), (3.0, 0.2), (10.0, 1.1)])
def test_expectation_is_the_integral_that_mpmath_gets(rician_k: float, above: float) -> None:
    def integrand(x: mpmath.mpf) -> mpmath.mpf:
        k = mpmath.mpf(rician_k)
        bessel = mpmath.besseli(0, 2 * mpmath.sqrt(k * (k + 1) * x))
        return mpmath.log1p(5 * x) * (k + 1) * mpmath.exp(-k - (k + 1) * x) * bessel

    expected = mpmath.quad(integrand, [above, above + 1, above + 4, 60])
    got = gain_expectation(lambda x: np.log1p(5 * x), rician_k, above)
    assert got == pytest.approx(float(expected), rel=1e-10)


@given(
    rician_k=st.floats(0, 100) | st.just(math.inf),
    gains=st.lists(st.floats(0, 60), min_size=2, max_size=2).map(sorted),
)
def test_probability_below_rises_from_0_to_1(rician_k: float, gains: list[float]) -> None:
    low, high = (gain_below(gain, rician_k) for gain in gains)
    assert 0 <= low <= high + 1e-12  # sums of some hundred rounded terms
    assert high <= 1


def test_without_fading_the_gain_is_1() -> None:
    assert (gain_below(1.0, math.inf), gain_below(1.001, math.inf)) == (0.0, 1.0)
    assert gain_expectation(lambda x: 3 * x, math.inf) == 3.0
    assert gain_expectation(lambda x: 3 * x, math.inf, above=1.1) == 0.0


@pytest.mark.parametrize("rician_k", [-1.0, 1001.0, math.nan])
def test_a_channel_that_cannot_be_is_refused(rician_k: float) -> None:
    for refused in (
        lambda: gain_below(0.5, rician_k),
        lambda: gain_expectation(np.ones_like, rician_k),
    ):
        with pytest.raises(InputError, match=f"^rician_k = {rician_k}; give 0 to 1000"):
            refused()
