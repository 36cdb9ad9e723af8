"""Client-level differential privacy: sensitivity, noise and epsilon against closed forms."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud_aggregator.privacy import (
    PrivacyRecord,
    PrivacySettings,
    draw_noise_key,
    emulated_noise,
    epsilon,
    noise_generator,
    privacy_record,
    private_mean,
    withheld,
)
from device_profiles.errors import InputError
from messaging.layout import Vector
from messaging.protocol import Costs, Report

pytest.importorskip("dp_accounting", reason="the accountant is in the extra 'privacy'")

PHI = NormalDist().cdf


def vector(*values: float) -> Vector:
    return np.array(values, np.float32)


def settings(**changes: float) -> PrivacySettings:
    values = {"clip_norm": 1.0, "noise_multiplier": 1.0, "delta": 1e-5, "expected_clients": 4}
    return PrivacySettings(**(values | changes))  # type: ignore[arg-type]


def noiseless(state: Vector, updates: list[tuple[Vector, int]], how: PrivacySettings) -> Vector:
    """Return the mean without its noise: that of nobody, under the same key, is noise alone."""
    with_noise = private_mean(state, updates, how, noise_generator(7))
    alone = private_mean(np.zeros_like(state), [], how, noise_generator(7))
    return with_noise - alone


# -- the mean -------------------------------------------------------------------------------------


def test_each_update_is_clipped_counts_once_and_is_divided_by_the_fixed_number() -> None:
    # (3, 4) -> (0.6, 0.8); (0.5, 0) stays; divided by 4, though two came; examples do not count
    how = settings(noise_multiplier=0.01)
    got = noiseless(vector(10, 20), [(vector(3, 4), 1), (vector(0.5, 0), 999)], how)
    # float32 near 20: two roundings of 1e-6
    np.testing.assert_allclose(got, [10 + 1.1 / 4, 20 + 0.8 / 4], rtol=0, atol=4e-6)


def test_a_part_is_clipped_over_what_it_has_and_adds_nothing_elsewhere() -> None:
    how = settings(noise_multiplier=0.01, expected_clients=1)
    got = noiseless(vector(0, 0, 0), [(vector(3, 4), 1)], how)
    np.testing.assert_allclose(got, [0.6, 0.8, 0.0], rtol=0, atol=1e-6)  # roundings near 1


ENTRIES = st.lists(st.floats(-1e6, 1e6, width=32), min_size=0, max_size=5)


@given(
    st.lists(ENTRIES, min_size=1, max_size=5),
    ENTRIES,
    st.floats(0.01, 100.0),
    st.integers(1, 20),
)
def test_whatever_one_client_sends_moves_the_mean_by_twice_c_over_n_at_most(
    rows: list[list[float]], other: list[float], limit: float, expected: int
) -> None:
    how = settings(clip_norm=limit, expected_clients=expected, noise_multiplier=0.01)
    state = np.zeros(5, np.float32)
    updates = [(vector(*row), 1) for row in rows]
    means = [
        noiseless(state, mine, how).astype(np.float64)
        for mine in (updates, [*updates[:-1], (vector(*other), 1)], updates[:-1])
    ]
    # 5 entries of at most 6 C/n each, rounded to float32 twice (state, and noise taken off)
    rounding = 5 * 4 * 6 * limit / expected * 2**-24 + 1e-12
    assert np.linalg.norm(means[1] - means[0]) <= 2 * limit / expected + rounding
    assert np.linalg.norm(means[2] - means[0]) <= limit / expected + rounding


def test_the_noise_has_the_deviation_sigma_c_over_n_on_every_entry() -> None:
    how = settings(clip_norm=3.0, noise_multiplier=2.0, expected_clients=12)
    state = np.zeros(50, np.float32)
    drawn = np.stack(
        [
            private_mean(state, [(vector(0.0), 1)], how, emulated_noise(seed, 1))
            for seed in range(800)
        ]
    )
    # 40,000 draws of deviation 2 * 3 / 12 = 0.5: the mean has a deviation of 0.5 / 200, the
    # variance a relative one of sqrt(2 / 40000); five deviations of each. Seeds are fixed.
    assert abs(drawn.mean()) < 5 * 0.5 / 200
    assert drawn.var() == pytest.approx(0.25, rel=5 * math.sqrt(2 / 40_000))
    # of each entry 800 draws: six deviations, since there are fifty of them
    assert drawn.var(axis=0) == pytest.approx(0.25, rel=6 * math.sqrt(2 / 800))
    # what two entries have in common: a correlation of 800 draws has a deviation of 1/sqrt(800)
    common = np.corrcoef(drawn.T)[np.triu_indices(50, 1)]
    assert np.abs(common).max() < 6 / math.sqrt(800)


def test_a_round_of_nobody_only_adds_noise() -> None:
    got = private_mean(vector(1, 1, 1, 1), [], settings(), emulated_noise(0, 1))
    assert len(set(got.tolist())) == 4


def test_noise_is_of_the_round_in_emulation_and_of_the_key_in_deployment() -> None:
    def noise(rng: np.random.Generator) -> list[float]:
        return private_mean(np.zeros(3, np.float32), [], settings(), rng).tolist()  # type: ignore[no-any-return]

    assert noise(emulated_noise(1, 2)) == noise(emulated_noise(1, 2))
    assert noise(emulated_noise(1, 2)) != noise(emulated_noise(1, 3))
    key = draw_noise_key()
    assert noise(noise_generator(key)) == noise(noise_generator(key))
    assert noise(noise_generator(key)) != noise(noise_generator(draw_noise_key()))


@pytest.mark.parametrize("bad", [vector(math.nan), vector(math.inf)])
def test_an_update_that_is_not_finite_or_too_long_fails(bad: Vector) -> None:
    with pytest.raises(ValueError, match="finite"):
        private_mean(vector(0.0), [(bad, 1)], settings(), emulated_noise(0, 1))
    with pytest.raises(ValueError, match="an update of 2 entries; at most 1"):
        private_mean(vector(0.0), [(vector(0, 0), 1)], settings(), emulated_noise(0, 1))


# -- epsilon --------------------------------------------------------------------------------------


def gaussian_delta(nats: float, sigma: float) -> float:
    """Return delta of the Gaussian mechanism of sensitivity 1 (Balle and Wang 2018, theorem 8)."""
    return PHI(1 / (2 * sigma) - nats * sigma) - math.exp(nats) * PHI(
        -1 / (2 * sigma) - nats * sigma
    )


def sampled_delta(nats: float, sigma: float, rate: float) -> float:
    """Return delta of one sampled Gaussian, of whom it may hold against who it does not.

    P = (1 - q) N(0, s^2) + q N(1, s^2) outweighs e^nats N(0, s^2) above the x where they meet.
    """
    meet = sigma**2 * math.log((math.exp(nats) - 1 + rate) / rate) + 0.5
    without, within = 1 - PHI(meet / sigma), 1 - PHI((meet - 1) / sigma)
    return (1 - rate) * without + rate * within - math.exp(nats) * without


def solved(delta_of: object, delta: float) -> float:
    """Return where a falling function of epsilon is delta, by halving."""
    low, high = 0.0, 100.0
    for _ in range(80):
        middle = (low + high) / 2
        above = delta_of(middle) > delta  # type: ignore[operator]
        low, high = (middle, high) if above else (low, middle)
    return high


@pytest.mark.parametrize(("sigma", "rounds"), [(1.0, 1), (2.0, 1), (0.7, 1), (4.0, 16), (1.0, 3)])
def test_epsilon_is_the_analytic_gaussians(sigma: float, rounds: int) -> None:
    # so many Gaussians are one of sigma / sqrt(rounds)
    exact = solved(lambda e: gaussian_delta(e, sigma / math.sqrt(rounds)), 1e-5)
    got = epsilon(settings(noise_multiplier=sigma), rounds)
    # from above, by no more than the grid of 1e-4 nats; 1e-6 for the halving and sums of 1e-15
    assert exact - 1e-6 <= got <= exact + 1e-4


def test_one_sampled_round_has_the_epsilon_of_its_closed_form() -> None:
    exact = solved(lambda e: sampled_delta(e, 1.0, 0.1), 1e-5)
    got = epsilon(settings(), 1, 0.1)
    assert exact - 1e-6 <= got <= exact + 1e-4
    assert got < epsilon(settings(), 1)


def test_epsilon_rises_with_rounds_and_is_zero_before_the_first() -> None:
    assert epsilon(settings(), 0) == 0.0
    spent = [epsilon(settings(), n, 0.2) for n in (1, 2, 5)]
    assert spent == sorted(set(spent))


def test_little_noise_over_many_rounds_is_answered_on_a_coarser_grid_from_above() -> None:
    # mu = sqrt(100) / 0.05 = 200: a loss of 20,000 nats on average; the grid is 0.0224 nats
    mu = 200.0
    got = epsilon(settings(noise_multiplier=0.05), 100)
    # delta = P[loss > e] - e^e Q[loss > e] <= P[loss > e]: e = mu^2/2 + 4.27 mu is enough
    upper = mu**2 / 2 + NormalDist().inv_cdf(1 - 1e-5) * mu
    assert mu**2 / 2 < got <= upper + 0.03


@pytest.mark.parametrize(("rounds", "rate"), [(-1, 1.0), (1, 0.0), (1, 1.5)])
def test_impossible_rounds_and_rates_are_refused(rounds: int, rate: float) -> None:
    with pytest.raises(InputError, match="rounds = "):
        epsilon(settings(), rounds, rate)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("clip_norm", 0.0),
        ("clip_norm", math.inf),
        ("noise_multiplier", 0.0),
        ("noise_multiplier", math.nan),
        ("delta", 0.0),
        ("delta", 1.0),
        ("expected_clients", 0),
    ],
)
def test_settings_out_of_range_are_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(InputError, match=rf"privacy\.{field} = "):
        settings(**{field: value})


# -- the record -----------------------------------------------------------------------------------


def test_the_record_says_what_was_spent_and_under_what() -> None:
    record = privacy_record(settings(), 3, repeatable_noise=False)
    assert (record.rounds, record.unit, record.sampling_rate) == (3, "client", 1.0)
    assert record.epsilon == epsilon(settings(), 3)
    assert PrivacyRecord.model_validate_json(record.model_dump_json()) == record


def test_a_run_goes_on_under_the_settings_it_began_with() -> None:
    earlier = privacy_record(settings(), 2, repeatable_noise=True)
    privacy_record(settings(), 3, repeatable_noise=True, earlier=earlier)
    with pytest.raises(InputError, match=r"privacy\.noise_multiplier = 2.*2 rounds.*with 1"):
        privacy_record(settings(noise_multiplier=2.0), 3, repeatable_noise=True, earlier=earlier)
    sampled = privacy_record(settings(), 2, repeatable_noise=True, sampling_rate=0.5)
    with pytest.raises(InputError, match=r"privacy\.sampling_rate = 1"):
        privacy_record(settings(), 3, repeatable_noise=True, earlier=sampled)


def test_what_a_device_of_a_private_run_tells_all_the_same_is_not_listened_to() -> None:
    told = Report(
        run="r",
        client="pi5-01",
        session="0" * 16,
        stage="instruction",
        round=3,
        phase="evaluate",
        examples=51,
        train_loss=1.5,
        eval_loss=2.5,
        eval_accuracy=0.25,
        others_loss=2.75,
        others_accuracy=0.125,
        kept_steps=2,
        costs=Costs(download_bytes=9),
        spent={"training": 1.0},
    )
    kept = ("run", "client", "session", "stage", "round", "phase", "costs")
    heard = withheld(told)
    assert heard == Report(examples=1, **{name: getattr(told, name) for name in kept})
