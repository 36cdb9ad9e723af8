"""PPO steps on a bandit whose best policies are known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from device_profiles.errors import InputError
from edge_client.alignment.critic import Critic
from edge_client.alignment.descent import policy_descent
from edge_client.alignment.figures import StepFigures
from edge_client.alignment.ppo import ppo_step
from edge_client.alignment.rollouts import Rollout
from edge_client.alignment.settings import PpoSettings
from edge_client.data.prompts import Encoded
from edge_client.descent import Descent
from tests.edge_client.alignment.conftest import (
    ARMS,
    PROMPT,
    Bandit,
    LinearHead,
    linear_critic,
    one_token,
    tilted,
)

THIRD = [0.0, 0.0, 1.0, 0.0, 0.0, 0.0]
FOURTH = [0.0, 0.0, 0.0, 1.0, 0.0, 0.0]
RESPONSES = 64


class Player:
    """A bandit, what learns on it, and the settings of a run."""

    def __init__(
        self, bandit: Bandit, *objectives: str, rate: float = 0.01, **settings: Any
    ) -> None:
        self.bandit = bandit
        self.critics: dict[str, Critic] = {name: linear_critic() for name in objectives}
        self.descent: Descent = policy_descent(bandit.model, learning_rate=rate, clip_norm=1.0)
        self.settings = PpoSettings(kl_target=None, **settings)
        self._draw = np.random.default_rng(0)
        self._steps = 0

    def step(
        self,
        rollouts: list[Rollout],
        weights: Mapping[str, float],
        kl_coefficient: float = 0.0,
        seed: int = 0,
    ) -> StepFigures:
        """Take one step on responses that are given."""
        self._steps += 1
        return ppo_step(
            self.bandit.model,
            self.descent,
            self.critics,
            rollouts,
            reference=self.bandit.reference,
            weights=weights,
            kl_coefficient=kl_coefficient,
            settings=self.settings,
            seed=seed,
            words=("pi5-01", 1, self._steps),
        )

    def play(
        self,
        steps: int,
        pays: Mapping[str, Sequence[float]],
        weights: Mapping[str, float],
        kl_coefficient: float = 0.0,
        seed: int = 0,
    ) -> None:
        """Take steps, each on responses of its own."""
        for _ in range(steps):
            rollouts = self.bandit.play(RESPONSES, pays, self._draw)
            self.step(rollouts, weights, kl_coefficient, seed)


# -- optima ----------------------------------------------------------------------------------------


def test_the_one_arm_that_pays_is_taken(bandit: Bandit) -> None:
    assert bandit.probabilities()[3] < 0.1
    Player(bandit, "helpfulness").play(8, {"helpfulness": FOURTH}, {"helpfulness": 1.0})
    # the best state that a norm of this width can give makes it 0.955
    assert bandit.probabilities()[3] > 0.9


def test_with_a_kl_penalty_the_policy_settles_at_the_tilted_reference(bandit: Bandit) -> None:
    pays = [1.0, 0.0, -1.0, 2.0, 0.5, -0.5]
    reference, weights = bandit.probabilities(), {"helpfulness": 1.0}
    best = tilted(reference, pays, 2.0)
    assert np.abs(best - reference).max() > 0.05
    for rate in (1e-2, 3e-3, 1e-3):
        player = Player(bandit, "helpfulness", rate=rate)
        player.play(12, {"helpfulness": pays}, weights, kl_coefficient=2.0)
    found = []
    for _ in range(8):
        player.play(1, {"helpfulness": pays}, weights, kl_coefficient=2.0)
        found.append(bandit.probabilities())
    # steps of fixed size on batches of 64 keep the policy moving: 0.0035 over four seeds
    assert np.abs(np.mean(found, 0) - best).max() < 0.01


@pytest.mark.parametrize(("weight", "arm"), [(0.8, 2), (0.2, 3)])
def test_the_policy_goes_where_the_larger_weight_is(
    bandit: Bandit, weight: float, arm: int
) -> None:
    # harmlessness has ten times the scale, which must not matter
    pays = {"helpfulness": THIRD, "harmlessness": [10 * pay for pay in FOURTH]}
    weights = {"helpfulness": weight, "harmlessness": 1 - weight}
    Player(bandit, "helpfulness", "harmlessness").play(12, pays, weights)
    assert bandit.probabilities()[arm] > 0.85


@pytest.mark.parametrize(("score", "learned"), [(0.5, False), (5.0, True)])
def test_a_response_that_does_not_end_is_learned_only_if_it_is_worth_its_penalty(
    bandit: Bandit, score: float, learned: bool
) -> None:
    player = Player(bandit, "helpfulness")
    before = bandit.probabilities()[1]
    for _ in range(5):
        arms = np.random.default_rng(1).choice(ARMS, 48, p=bandit.probabilities())
        pays = {"helpfulness": score}
        blank = bandit.play(1, {"helpfulness": [0.0] * ARMS}, np.random.default_rng(0))[0].features
        player.step(
            [
                Rollout(
                    example=one_token(arm),
                    ended=bool(arm != 1),
                    scores=pays if arm == 1 else {"helpfulness": 0.0},
                    features=blank,
                )
                for arm in arms
            ],
            {"helpfulness": 1.0},
        )
    assert 0.3 < before < 0.6
    assert bandit.probabilities()[1] > 0.9 if learned else bandit.probabilities()[1] < 0.1


# -- figures ---------------------------------------------------------------------------------------


def moved(bandit: Bandit) -> None:
    """Take the policy away from the reference."""
    rng = np.random.default_rng(5)
    size = len(bandit.reference)
    bandit.model.put_flat(bandit.reference + rng.normal(0, 0.3, size).astype(np.float32))


def some(bandit: Bandit, arms: Sequence[int]) -> list[Rollout]:
    """Return responses with scores of both objectives; the second was cut off."""
    pays = dict.fromkeys(("helpfulness", "harmlessness"), [0.0] * ARMS)
    features = bandit.play(1, pays, np.random.default_rng(0))[0].features
    return [
        Rollout(
            example=one_token(arm),
            ended=i != 1,
            scores={"helpfulness": float(arm), "harmlessness": -0.5 * i},
            features=features,
        )
        for i, arm in enumerate(arms)
    ]


def test_figures_are_of_the_responses_before_the_updates(bandit: Bandit) -> None:
    reference = bandit.probabilities()
    moved(bandit)
    acting, arms = bandit.probabilities(), [0, 3, 3, 1]
    player = Player(bandit, "helpfulness", "harmlessness", epochs=1, minibatches=2)
    weights = {"helpfulness": 0.25, "harmlessness": 0.75}
    found = player.step(some(bandit, arms), weights, kl_coefficient=0.1)
    assert found.responses == 4
    assert found.scores == {"helpfulness": 7 / 4, "harmlessness": -0.75}  # the one cut off too
    assert found.weighted_score == pytest.approx(0.25 * 7 / 4 - 0.75 * 0.75)
    assert found.ended == 0.75
    assert found.tokens == 1 / 4  # one action each, which is the end token of three
    log_p, log_q = np.log(acting[arms]), np.log(reference[arms])
    assert found.kl == pytest.approx(float(np.mean(log_p - log_q)), rel=1e-5)  # fp32
    assert found.entropy == pytest.approx(float(-np.mean(log_p)), rel=1e-5)
    assert abs(found.kl) > 0.01
    assert found.improvement.updates == 2
    assert set(found.value_losses) == {"helpfulness", "harmlessness"}
    assert found.kl_coefficient == found.next_kl_coefficient == 0.1


def test_before_any_update_the_loss_is_the_cost_of_the_kl(bandit: Bandit) -> None:
    # ratios are 1 and whitened advantages have mean 0: what is left is the penalty, not whitened
    moved(bandit)
    player = Player(bandit, "helpfulness", epochs=1, minibatches=1)
    rollouts = bandit.play(32, {"helpfulness": FOURTH}, np.random.default_rng(2))
    found = player.step(rollouts, {"helpfulness": 1.0}, kl_coefficient=0.7)
    assert found.improvement.policy_loss == pytest.approx(0.7 * found.kl, rel=1e-4)
    assert found.kl > 0.01
    assert found.improvement.clip_fraction == 0


def test_the_loss_of_a_critic_is_of_what_was_paid(bandit: Bandit) -> None:
    player = Player(bandit, "helpfulness", "harmlessness", epochs=1, minibatches=1)
    found = player.step(some(bandit, [0, 3]), {"helpfulness": 0.5, "harmlessness": 0.5}, 5.0)
    # values 0; the second response's scores 3 and -1/2, less 1: half the mean of 0 and their square
    assert found.value_losses == pytest.approx({"helpfulness": 1.0, "harmlessness": 0.5625})


def test_returns_are_advantages_plus_values_with_the_settings_discounts(bandit: Bandit) -> None:
    # Values 2 and 4, reward 1, both factors 1/2: errors 0 + 4/2 - 2 = 0 and 1 - 4 = -3, advantages
    # -3/4 and -3, returns 5/4 and 1. The loss is half the mean of (3/4)^2 and 3^2.
    tensors = {"weight": np.ones(1, np.float32), "bias": np.zeros((), np.float32)}
    player = Player(bandit, "helpfulness", epochs=1, minibatches=1, gamma=0.5, lam=0.5)
    player.critics["helpfulness"] = Critic(LinearHead, tensors, learning_rate=0.01)
    response = Rollout(
        example=Encoded(tokens=np.array([PROMPT, 1, 2]), response_start=1),
        ended=True,
        scores={"helpfulness": 1.0},
        features={"helpfulness": torch.tensor([[2.0], [4.0]])},
    )
    found = player.step([response], {"helpfulness": 1.0})
    assert found.value_losses["helpfulness"] == pytest.approx((0.75**2 + 9) / 4)


def test_critics_do_not_learn_the_kl_penalty(bandit: Bandit) -> None:
    moved(bandit)
    player = Player(bandit, "helpfulness")
    player.play(2, {"helpfulness": [0.0] * ARMS}, {"helpfulness": 1.0}, kl_coefficient=5.0)
    assert all((tensor == 0).all() for tensor in player.critics["helpfulness"].tensors().values())


def test_the_coefficient_of_the_next_step_follows_the_kl(bandit: Bandit) -> None:
    player = Player(bandit, "helpfulness")
    player.settings = PpoSettings(kl_target=6.0, kl_horizon=100)
    rollouts = bandit.play(10, {"helpfulness": THIRD}, np.random.default_rng(0))
    found = player.step(rollouts, {"helpfulness": 1.0}, kl_coefficient=0.15)
    # no KL yet: an error of -1 counts as -0.2, for 10 of 100 responses
    assert found.kl_coefficient == 0.15
    assert found.next_kl_coefficient == pytest.approx(0.15 * (1 - 0.2 * 10 / 100))


# -- what must not matter --------------------------------------------------------------------------


def after_two_steps(seed: int) -> list[Any]:
    bandit = Bandit()
    player = Player(bandit, "helpfulness")
    player.play(2, {"helpfulness": THIRD}, {"helpfulness": 1.0}, 0.15, seed=seed)
    moments = player.descent.moments()
    critic = player.critics["helpfulness"].tensors()
    return [bandit.model.take_flat(), *moments.first.values(), *critic.values()]


def test_the_same_seed_gives_the_same_bits_and_another_seed_others() -> None:
    one, again, other = (after_two_steps(seed) for seed in (0, 0, 1))
    assert all(np.array_equal(a, b) for a, b in zip(one, again, strict=True))
    assert not np.array_equal(one[0], other[0])


# -- what is refused -------------------------------------------------------------------------------


def test_weights_without_a_critic_are_refused(bandit: Bandit) -> None:
    player = Player(bandit, "helpfulness")
    with pytest.raises(InputError, match="give one for each of helpfulness"):
        player.step(some(bandit, [0, 1, 2, 3]), {"helpfulness": 0.5, "harmlessness": 0.5})


def test_more_minibatches_than_responses_are_refused(bandit: Bandit) -> None:
    player = Player(bandit, "helpfulness", minibatches=4)
    with pytest.raises(InputError, match="minibatches = 4 of 3 responses; choose at most 3"):
        player.step(some(bandit, [0, 1, 2]), {"helpfulness": 1.0})
