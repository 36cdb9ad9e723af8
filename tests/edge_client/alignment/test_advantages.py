"""Advantages, against sums written out and numbers worked out by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from device_profiles.errors import InputError
from edge_client.alignment.advantages import (
    check_weights,
    combine,
    gae,
    leave_one_out,
    on_last,
    whiten,
)

LENGTHS = st.lists(st.integers(1, 7), min_size=1, max_size=5)
SHARES = st.floats(0, 1)


def drawn(seed: int, *shape: int) -> Any:
    return np.random.default_rng(seed).normal(0, 2, shape)


def double_sum(rewards: Any, values: Any, lengths: list[int], gamma: float, lam: float) -> Any:
    """Return the estimate as its definition has it: a sum over later errors, for every action."""
    found, start = [], 0
    for length in lengths:
        r, v = rewards[start : start + length], [*values[start : start + length], 0.0]
        for t in range(length):
            later = range(length - t)
            found.append(
                sum(
                    (gamma * lam) ** k * (r[t + k] + gamma * v[t + k + 1] - v[t + k]) for k in later
                )
            )
        start += length
    return np.array(found)


@given(lengths=LENGTHS, gamma=SHARES, lam=SHARES, seed=st.integers(0, 1000))
def test_the_estimate_is_the_discounted_sum_of_later_errors(
    lengths: list[int], gamma: float, lam: float, seed: int
) -> None:
    rewards, values = drawn(seed, 2, sum(lengths))
    found = gae(rewards, values, lengths, gamma=gamma, lam=lam)
    # at most 7 terms of size 10 in float64
    np.testing.assert_allclose(
        found, double_sum(rewards, values, lengths, gamma, lam), rtol=0, atol=1e-13
    )


@given(
    lengths=LENGTHS,
    gamma=SHARES,
    lam=SHARES,
    weights=st.lists(st.floats(-2, 2), min_size=2, max_size=3),
    seed=st.integers(0, 1000),
)
def test_the_estimate_is_linear_in_rewards_and_values_together(
    lengths: list[int], gamma: float, lam: float, weights: list[float], seed: int
) -> None:
    rewards, values = drawn(seed, 2, len(weights), sum(lengths))
    how = {"gamma": gamma, "lam": lam}
    w = np.array(weights)
    apart = sum(x * gae(r, v, lengths, **how) for x, r, v in zip(w, rewards, values, strict=True))
    together = gae(w @ rewards, w @ values, lengths, **how)
    np.testing.assert_allclose(together, apart, rtol=0, atol=1e-12)  # rounding of a few dozen terms


def test_an_estimate_by_hand() -> None:
    # errors 1 + .5*4 - 2 = 1 and 3 + 0 - 4 = -1; the first looks ahead by gamma*lam = .25
    found = gae(np.array([1.0, 3.0]), np.array([2.0, 4.0]), [2], gamma=0.5, lam=0.5)
    assert found.tolist() == [0.75, -1.0]


def test_nothing_passes_from_one_response_to_another() -> None:
    rewards, values = drawn(3, 2, 5)
    apart = [gae(rewards[part], values[part], [n]) for part, n in ((slice(2), 2), (slice(2, 5), 3))]
    assert np.array_equal(gae(rewards, values, [2, 3]), np.concatenate(apart))


def test_with_lambda_1_the_advantage_is_the_reward_to_come_less_the_value() -> None:
    values = np.array([0.5, 0.25, -1.0, 2.0])
    found = gae(on_last([4.0, 8.0], [3, 1]), values, [3, 1], gamma=1, lam=1)
    assert found.tolist() == [3.5, 3.75, 5.0, 6.0]


def test_whitened_values_have_mean_0_and_deviation_1() -> None:
    found = whiten(np.array([1.0, 2.0, 3.0, 6.0]))
    # mean 3, variance (4 + 1 + 0 + 9) / 4; the guard against zero takes off 1e-8 of them
    np.testing.assert_allclose(found, np.array([-2, -1, 0, 3]) / np.sqrt(3.5), rtol=1e-8)


@pytest.mark.parametrize("value", [0.0, 0.1, -1.0])
def test_values_that_do_not_differ_become_zero(value: float) -> None:
    # the mean of equal numbers may be off by one rounding, which the guard keeps small
    assert np.abs(whiten(np.full(7, value))).max() < 1e-7


def test_objectives_are_whitened_and_then_weighted_and_the_penalty_keeps_its_scale() -> None:
    advantages = {"helpfulness": np.array([0.0, 100.0]), "harmlessness": np.array([0.001, -0.001])}
    weights = {"helpfulness": 0.75, "harmlessness": 0.25}
    found = combine(advantages, weights, np.array([-30.0, 0.0]))
    # whitened: (-1, 1) and (1, -1), whatever their spread; 1e-8 of the guard over 0.001 is 1e-5
    np.testing.assert_allclose(found, [-0.75 + 0.25 - 30, 0.75 - 0.25], rtol=1e-5)


def test_a_reward_stands_on_the_last_action() -> None:
    assert on_last([5.0, 7.0], [3, 1]).tolist() == [0, 0, 5, 7]


def test_a_response_is_held_against_the_others_of_its_prompt() -> None:
    # 1 - (2 + 6)/2, 2 - (1 + 6)/2, 6 - (1 + 2)/2; and another prompt, where all are alike
    found = leave_one_out(np.array([1.0, 2.0, 6.0, 4.0, 4.0, 4.0]), 3)
    assert found.tolist() == [-3.0, -1.5, 4.5, 0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    "weights",
    [
        {"helpfulness": 1.0},
        {"helpfulness": 0.25, "harmlessness": 0.75},
        {"helpfulness": 1.0, "harmlessness": 0.0},
    ],
)
def test_weights_with_the_sum_1_pass(weights: dict[str, float]) -> None:
    check_weights(weights, list(weights))


@pytest.mark.parametrize(
    ("weights", "sentence"),
    [
        (
            {"helpfulness": 0.5, "harmlessness": 0.6},
            r"helpfulness 0\.5 \+ harmlessness 0\.6 = 1\.1; choose weights with the sum 1",
        ),
        (
            {"helpfulness": 1.5, "harmlessness": -0.5},
            r"preference weight helpfulness = 1\.5; choose 0 to 1",
        ),
        (
            {"helpfulness": float("nan"), "harmlessness": 0.5},
            "preference weight helpfulness = nan; choose 0 to 1",
        ),
        ({"helpfulness": 1.0}, "for helpfulness; give one for each of helpfulness, harmlessness"),
    ],
)
def test_weights_that_do_not_fit_are_refused(weights: dict[str, float], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        check_weights(weights, ["helpfulness", "harmlessness"])
