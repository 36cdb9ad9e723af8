"""KL estimates, by their exact expectation over a categorical; the coefficient's rule by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from edge_client.alignment.kl import adapted, approximate, summed

# q is p with the logit of one token raised by SHIFT: q_i = p_i e^{shift [i = k]} / z with
# z = 1 + p_k (e^shift - 1), so KL(p || q) = log z - p_k shift.
P = np.array([0.5, 0.3, 0.15, 0.05])
K, SHIFT = 1, 1.5
Z = 1 + P[K] * (math.exp(SHIFT) - 1)
KL = math.log(Z) - P[K] * SHIFT


def shifted() -> np.ndarray:
    log_q = np.log(P) - math.log(Z)
    log_q[K] += SHIFT
    return log_q


def test_the_expectation_of_the_sum_is_the_kl_of_a_shifted_categorical() -> None:
    per_token = summed(np.log(P), shifted(), [1, 1, 1, 1])
    assert float(P @ per_token) == pytest.approx(KL, rel=1e-12)


def test_the_expectation_over_responses_of_two_tokens_is_twice_that_of_one() -> None:
    # all 16 responses of two independent tokens
    log_p, log_q = np.log(P), shifted()
    pairs = [(i, j) for i in range(4) for j in range(4)]
    flat = [token for pair in pairs for token in pair]
    found = summed(log_p[flat], log_q[flat], [2] * 16)
    assert sum(P[i] * P[j] * x for (i, j), x in zip(pairs, found, strict=True)) == pytest.approx(
        2 * KL, rel=1e-12
    )


def test_sums_are_of_one_response_each() -> None:
    acting, reference = np.array([-1.0, -2.0, -3.0, -4.0]), np.array([-2.0, -2.0, -1.0, -8.0])
    assert summed(acting, reference, [1, 2, 1]).tolist() == [1.0, -2.0, 4.0]


def test_the_expectation_of_the_approximate_kl_is_exact_too_and_no_term_is_negative() -> None:
    found = approximate(torch.from_numpy(np.log(P)), torch.from_numpy(shifted()))
    assert float(torch.from_numpy(P) @ found) == pytest.approx(KL, rel=1e-12)
    assert (found > 0).all()
    assert float(approximate(torch.tensor([-1.0]), torch.tensor([-1.0]))) == 0


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        (6.0, 0.15),
        (6.6, 0.15 * (1 + 0.1 * 64 / 1000)),
        (60.0, 0.15 * (1 + 0.2 * 64 / 1000)),  # an error of 9 counts as 0.2
        (5.4, 0.15 * (1 - 0.1 * 64 / 1000)),
        (-1.0, 0.15 * (1 - 0.2 * 64 / 1000)),
    ],
)
def test_the_coefficient_follows_the_clipped_error(kl: float, expected: float) -> None:
    found = adapted(0.15, kl, responses=64, target=6.0, horizon=1000)
    assert found == pytest.approx(expected, rel=1e-12)
