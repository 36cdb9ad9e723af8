"""REINFORCE with a leave-one-out baseline, on the bandit that PPO plays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from device_profiles.errors import InputError
from edge_client.alignment.descent import policy_descent
from edge_client.alignment.figures import StepFigures
from edge_client.alignment.policy import policy_gradient
from edge_client.alignment.rloo import rloo_step
from edge_client.alignment.rollouts import Rollout
from edge_client.alignment.settings import RlooSettings
from edge_client.data.packing import pack
from edge_client.data.prompts import Encoded
from tests.edge_client.alignment.conftest import Bandit, one_token, tilted

FOURTH = [0.0, 0.0, 0.0, 1.0, 0.0, 0.0]


def step(
    bandit: Bandit,
    rollouts: list[Rollout],
    weights: Mapping[str, float],
    *,
    kl_coefficient: float = 0.0,
    descent: Any = None,
    **settings: Any,
) -> StepFigures:
    return rloo_step(
        bandit.model,
        descent or policy_descent(bandit.model, learning_rate=0.01, clip_norm=1e6),
        rollouts,
        reference=bandit.reference,
        weights=weights,
        kl_coefficient=kl_coefficient,
        settings=RlooSettings(**{"kl_target": None, **settings}),
        seed=0,
        words=("pi5-01",),
    )


def play(
    bandit: Bandit,
    steps: int,
    pays: Mapping[str, Sequence[float]],
    weights: Mapping[str, float],
    *,
    rate: float = 0.01,
    kl_coefficient: float = 0.0,
) -> list[Any]:
    """Return the policy after each step."""
    descent = policy_descent(bandit.model, learning_rate=rate, clip_norm=1.0)
    draw, found = np.random.default_rng(0), []
    for _ in range(steps):
        rollouts = bandit.play(64, pays, draw)
        step(bandit, rollouts, weights, kl_coefficient=kl_coefficient, descent=descent)
        found.append(bandit.probabilities())
    return found


def test_the_one_arm_that_pays_is_taken(bandit: Bandit) -> None:
    assert bandit.probabilities()[3] < 0.1
    assert play(bandit, 60, {"helpfulness": FOURTH}, {"helpfulness": 1.0})[-1][3] > 0.9


def test_with_a_kl_penalty_the_policy_settles_at_the_tilted_reference(bandit: Bandit) -> None:
    pays = [1.0, 0.0, -1.0, 2.0, 0.5, -0.5]
    best = tilted(bandit.probabilities(), pays, 2.0)
    for rate in (1e-2, 1e-3):
        found = play(
            bandit,
            60,
            {"helpfulness": pays},
            {"helpfulness": 1.0},
            rate=rate,
            kl_coefficient=2.0,
        )
    # 0.003 over three seeds
    assert np.abs(np.mean(found[-30:], 0) - best).max() < 0.01


@pytest.mark.parametrize(("weight", "arm"), [(0.8, 2), (0.2, 3)])
def test_the_policy_goes_where_the_larger_weight_is(
    bandit: Bandit, weight: float, arm: int
) -> None:
    third = [0.0, 0.0, 10.0, 0.0, 0.0, 0.0]
    pays = {"helpfulness": third, "harmlessness": FOURTH}
    weights = {"helpfulness": weight, "harmlessness": 1 - weight}
    assert play(bandit, 80, pays, weights)[-1][arm] > 0.85


def test_one_update_follows_the_gradient_by_hand(bandit: Bandit) -> None:
    arms, scores = [0, 1, 2, 3], [1.0, 2.0, 3.0, 6.0]
    rollouts = [
        Rollout(
            example=one_token(arm),
            ended=True,
            scores={"helpfulness": score},
            features={"helpfulness": torch.ones(1, 1)},
        )
        for arm, score in zip(arms, scores, strict=True)
    ]
    other = Bandit()
    found = step(bandit, rollouts, {"helpfulness": 1.0}, samples=2)
    # whitened: (-2, -1, 0, 3) / sqrt(3.5); two to a prompt, so each against the other
    advantages = torch.tensor([-1.0, 1.0, -3.0, 3.0]) / np.sqrt(3.5)
    batch = pack([one_token(arm) for arm in arms])
    policy_gradient(other.model, batch, lambda _, rows: -advantages[rows] / 4, 0.7)
    for name, gradient in other.model.gradients().items():
        torch.testing.assert_close(bandit.model.gradients()[name], gradient, rtol=1e-5, atol=1e-7)
    assert found.improvement.updates == 1
    assert found.value_losses == {}
    assert found.scores == {"helpfulness": 3.0}


def test_answers_to_different_prompts_are_not_held_against_one_another(bandit: Bandit) -> None:
    rollouts = bandit.play(4, {"helpfulness": FOURTH}, np.random.default_rng(0))
    stray = Rollout(
        example=Encoded(tokens=np.array([2, 1]), response_start=1),
        ended=True,
        scores={"helpfulness": 0.0},
        features={"helpfulness": torch.ones(1, 1)},
    )
    for wrong in ([*rollouts[:3], stray], rollouts[:3]):
        with pytest.raises(InputError, match=r"response \d: samples = 2 responses to its prompt"):
            step(bandit, wrong, {"helpfulness": 1.0}, samples=2)
