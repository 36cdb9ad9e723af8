"""Clipped updates on responses of several tokens."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from device_profiles.errors import InputError
from edge_client.alignment.descent import policy_descent
from edge_client.alignment.policy import all_log_probabilities
from edge_client.alignment.settings import PpoSettings
from edge_client.alignment.update import Improvement, improve
from edge_client.data.prompts import Encoded
from edge_client.peft.packed_model import PackedModel
from tests.edge_client.alignment.conftest import ARMS, Bandit

RESPONSES = 6


def responses() -> list[Encoded]:
    """Return responses of one to six actions to prompts of two tokens."""
    rng = np.random.default_rng(0)
    return [
        Encoded(tokens=rng.integers(0, ARMS, 3 + i), response_start=2) for i in range(RESPONSES)
    ]


ACTIONS = sum(range(1, RESPONSES + 1))


def run(model: PackedModel, rate: float = 0.01, seed: int = 0, **settings: Any) -> Improvement:
    examples = responses()
    beside = settings.pop("beside", None)
    chosen = PpoSettings(**{"minibatches": 1, "epochs": 1, **settings})
    return improve(
        model,
        policy_descent(model, learning_rate=rate, clip_norm=1e6),
        examples,
        all_log_probabilities(model, examples, chosen.temperature),
        np.random.default_rng(1).normal(size=ACTIONS),
        settings=chosen,
        seed=seed,
        words=("pi5-01",),
        beside=beside,
    )


def test_every_action_comes_once_an_epoch_and_responses_are_not_torn_apart(bandit: Bandit) -> None:
    seen: list[Tensor] = []
    run(bandit.model, epochs=3, minibatches=3, beside=seen.append)
    assert len(seen) == 9
    begins = np.cumsum([0, *range(1, RESPONSES + 1)])
    for epoch in range(3):
        actions = torch.cat(seen[3 * epoch : 3 * epoch + 3])
        assert sorted(actions.tolist()) == list(range(ACTIONS))
    for minibatch in seen:
        mine = set(minibatch.tolist())
        for first, last in pairwise(begins):
            assert len(mine & set(range(first, last))) in (0, last - first)
    assert seen[0].tolist() != seen[3].tolist()


def test_a_minibatch_in_parts_has_the_gradient_of_the_whole() -> None:
    gradients, figures = [], []
    for most in (None, 1, 9):
        model = Bandit().model
        figures.append(run(model, most_tokens=most))
        gradients.append(torch.cat([g.reshape(-1).clone() for g in model.gradients().values()]))
    largest = float(gradients[0].abs().max())
    assert largest > 0
    for found, figure in zip(gradients[1:], figures[1:], strict=True):
        # fp32 sums in another order
        torch.testing.assert_close(found, gradients[0], rtol=0, atol=1e-5 * largest)
        assert figure.policy_loss == pytest.approx(figures[0].policy_loss, rel=1e-5)


def test_a_step_ends_where_the_policy_has_gone_too_far() -> None:
    once, stopped = Bandit(), Bandit()
    assert not run(once.model, rate=0.1).stopped
    found = run(stopped.model, rate=0.1, epochs=4, most_kl=1e-3)
    assert found.stopped
    assert found.updates == 1
    assert found.policy_kl > 1e-3
    assert np.array_equal(stopped.model.take_flat(), once.model.take_flat())


def test_the_first_look_is_at_the_policy_that_acted(bandit: Bandit) -> None:
    found = run(bandit.model)
    advantages = np.random.default_rng(1).normal(size=ACTIONS)
    assert found.policy_loss == pytest.approx(-advantages.mean(), rel=1e-5)  # ratios of 1
    assert found.policy_kl == pytest.approx(0, abs=1e-6)
    assert found.clip_fraction == 0


def test_a_policy_far_beyond_the_clip_is_counted_as_clipped(bandit: Bandit) -> None:
    found = run(bandit.model, rate=0.1, epochs=20, most_kl=100.0)
    assert found.updates == 20
    assert 0.1 < found.clip_fraction < 1


def test_training_that_diverges_ends_in_words(bandit: Bandit) -> None:
    # one weight of 1e30 and the attention of everything is not a number
    bandit.model.put_flat(np.full(3, 1e30, np.float32))
    with pytest.raises(InputError, match=r"learning_rate = 0\.01: .*; choose a lower one"):
        run(bandit.model)
