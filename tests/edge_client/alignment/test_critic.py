"""Critics, and the optimiser whose moments come out as arrays."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from device_profiles.errors import InputError
from edge_client.alignment.critic import Critic
from edge_client.descent import Descent, Moments
from messaging.layout import Tensors
from tests.edge_client.alignment.conftest import LinearHead

FEATURES = torch.tensor([[1.0, 2.0], [3.0, -1.0], [0.0, 1.0]])


def tensors() -> Tensors:
    return {"weight": np.array([2, 1], np.float32), "bias": np.array(-3, np.float32)}


def test_a_critic_begins_as_the_reward_model_on_the_scale_of_its_centred_scores() -> None:
    critic = Critic(LinearHead, tensors(), mean=5.0, deviation=2.0, learning_rate=0.1)
    # raw scores 4 - 3, 5 - 3 and 1 - 3; less 5, by 2
    assert critic.values(FEATURES).tolist() == [-2.0, -1.5, -3.5]


def test_learning_leaves_the_reward_model_as_it_is_and_what_is_taken_is_a_copy() -> None:
    reward = tensors()
    critic = Critic(LinearHead, reward, learning_rate=0.1)
    before, old = critic.tensors(), critic.values(FEATURES)
    critic.improve(FEATURES, old, old + 1, clip=10.0)
    assert all(np.array_equal(reward[n], t) for n, t in tensors().items())
    assert all(np.array_equal(before[n], t) for n, t in tensors().items())
    assert not np.array_equal(critic.tensors()["weight"], reward["weight"])


def test_a_critic_reaches_returns_that_it_can_express() -> None:
    wanted = (FEATURES @ torch.tensor([-1.0, 0.5]) + 4).double().numpy()
    critic = Critic(LinearHead, tensors(), learning_rate=0.1)
    for _ in range(400):
        old = critic.values(FEATURES)
        loss = critic.improve(FEATURES, old, wanted, clip=10.0)
    assert loss < 1e-4  # AdamW at a fixed rate settles within about a rate's square


def test_a_value_goes_no_further_than_the_clip_however_often_it_is_pushed() -> None:
    state = torch.tensor([[1.0, 0.0]])
    critic = Critic(LinearHead, tensors(), learning_rate=0.01)
    old = critic.values(state)
    for _ in range(200):
        loss = critic.improve(state, old, old + 5, clip=0.5)
    moved = (critic.values(state) - old).item()
    # weight and bias move by 0.01 a step each; momentum then goes on for about ten steps
    assert 0.5 <= moved < 0.5 + 13 * 0.02
    assert loss == pytest.approx(0.5 * 4.5**2, rel=1e-6)  # as if the value stood at the clip


def test_a_head_that_holds_its_tensors_elsewhere_is_refused() -> None:
    swapped = dict(reversed(tensors().items()))
    with pytest.raises(ValueError, match="does not hold 'bias' where it was expected"):
        Critic(LinearHead, swapped, learning_rate=0.1)


def test_a_critic_that_was_put_away_and_taken_up_again_has_the_same_bits() -> None:
    wanted = np.array([1.0, 2.0, 3.0])

    def learn(critic: Critic, steps: int) -> None:
        for _ in range(steps):
            critic.improve(FEATURES, critic.values(FEATURES), wanted, clip=10.0)

    whole = Critic(LinearHead, tensors(), learning_rate=0.1)
    learn(whole, 7)
    first = Critic(LinearHead, tensors(), learning_rate=0.1)
    learn(first, 4)
    second = Critic(LinearHead, first.tensors(), learning_rate=0.1, moments=first.moments())
    learn(second, 3)
    assert all(np.array_equal(second.tensors()[n], t) for n, t in whole.tensors().items())
    assert second.moments().steps == 7
    assert np.array_equal(second.moments().second["weight"], whole.moments().second["weight"])


# -- the optimiser ---------------------------------------------------------------------------------


def descent(gradient: list[float], moments: Moments | None = None) -> tuple[Descent, nn.Parameter]:
    parameter = nn.Parameter(torch.zeros(len(gradient)))
    parameter.grad = torch.tensor(gradient)
    like = {"a": torch.zeros(1), "b": torch.zeros(len(gradient) - 1)}
    return Descent([parameter], like, learning_rate=0.1, clip_norm=1.0, moments=moments), parameter


def test_a_step_is_adams_on_the_gradient_cut_to_its_norm() -> None:
    # (3, 4) is cut to (0.6, 0.8); Adam's first step is the rate times its sign, but for epsilon
    optimiser, parameter = descent([3.0, 4.0])
    assert optimiser.step() == pytest.approx(5.0)
    assert parameter.tolist() == pytest.approx([-0.1, -0.1], rel=1e-4)
    found = optimiser.moments()
    assert found.steps == 1
    assert float(found.first["a"][0]) == pytest.approx(0.06, rel=1e-5)  # (1 - 0.9) * 0.6
    assert float(found.second["b"][0]) == pytest.approx(0.001 * 0.64, rel=1e-5)


def test_moments_of_a_tensor_that_is_new_begin_at_zero() -> None:
    old = Moments(
        first={"a": np.ones(1, np.float32)}, second={"a": np.ones(1, np.float32)}, steps=3
    )
    optimiser, _ = descent([0.0, 0.0], old)
    optimiser.step()
    found = optimiser.moments()
    assert found.first["a"].tolist() == pytest.approx([0.9])
    assert found.first["b"].tolist() == [0.0]


def test_before_the_first_step_there_are_no_moments() -> None:
    assert descent([1.0, 1.0])[0].moments() == Moments()


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_ends_training_in_words(broken: float) -> None:
    optimiser, parameter = descent([broken, 1.0])
    with pytest.raises(InputError, match=r"learning_rate = 0\.1: the gradient's norm is"):
        optimiser.step()
    assert parameter.tolist() == [0.0, 0.0]
