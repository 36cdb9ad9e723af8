"""DPO: its gradient by autograd, and optima that follow from its loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch

from device_profiles.errors import InputError
from edge_client.alignment.descent import policy_descent
from edge_client.alignment.dpo import Compared, DpoFigures, dpo_steps
from edge_client.alignment.settings import DpoSettings
from edge_client.data.batches import make_batch
from edge_client.data.prompts import Encoded, encode_example
from edge_client.peft.tuned_model import TunedModel
from quantization.frozen_gpt2 import load_frozen
from quantization.identity import BaseIdentity
from tests.edge_client.alignment.conftest import Bandit, one_token
from tests.edge_client.conftest import EXAMPLES
from tests.edge_client.peft.test_packed_model import doubled, filled, furthest, make

COUNT, BETA, TEMPERATURE = 13, 0.1, 0.7
WEIGHTS = {"helpfulness": 0.75, "harmlessness": 0.25}


@pytest.mark.parametrize("most_tokens", [None, 1])
def test_the_gradient_of_a_batch_is_autograds(
    identity: BaseIdentity, tuned: Callable[..., TunedModel], most_tokens: int | None
) -> None:
    base = load_frozen(identity)
    encoded = [encode_example(e, base.tokenizer, 128) for e in EXAMPLES]
    pairs = [
        Compared(objective="helpfulness", chosen=encoded[0], rejected=encoded[1]),
        Compared(objective="harmlessness", chosen=encoded[2], rejected=encoded[0]),
        Compared(objective="helpfulness", chosen=encoded[4], rejected=encoded[3]),
    ]
    model = make(doubled(base), COUNT)
    stage_1 = filled(model, seed=1)
    reference = model.take_flat()
    tensors = filled(model, seed=2)
    found = dpo_steps(
        model,
        policy_descent(model, learning_rate=1e-9, clip_norm=1e9),
        pairs,
        reference=reference,
        weights=WEIGHTS,
        settings=DpoSettings(steps=1, beta=BETA, temperature=TEMPERATURE, most_tokens=most_tokens),
        seed=0,
        words=(),
    )
    plain, before = tuned(COUNT), tuned(COUNT)
    plain.put(tensors)
    before.put(stage_1)

    def total(policy: TunedModel, example: Encoded) -> torch.Tensor:
        padded = make_batch([example], 7)
        logits = policy.logits_at(padded.tokens, padded.places) / TEMPERATURE
        return -torch.nn.functional.cross_entropy(logits, padded.targets, reduction="sum")

    for policy in (plain, before):
        policy.model.double()
    losses, margins = [], []
    for pair in pairs:
        gained = [total(plain, e) - total(before, e).detach() for e in (pair.chosen, pair.rejected)]
        margin = BETA * (gained[0] - gained[1])
        losses.append(-WEIGHTS[pair.objective] * torch.log(torch.sigmoid(margin)))
        margins.append(margin.item())
    loss = torch.stack(losses).mean()
    parameters = plain.trainable()
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    expected = dict(zip(parameters, gradients, strict=True))
    assert furthest(model.gradients(), expected) < 1e-9  # double; a sigmoid of a sum of hundreds
    assert found.loss == pytest.approx(loss.item(), rel=1e-9)
    assert found.margin == pytest.approx(sum(margins) / 3, rel=1e-9)
    assert found.accuracy == sum(m > 0 for m in margins) / 3


def train(
    bandit: Bandit,
    pairs: Sequence[Compared],
    weights: dict[str, float],
    steps: int = 150,
    batch_size: int = 8,
) -> DpoFigures:
    for rate in (0.01, 0.001):
        found = dpo_steps(
            bandit.model,
            policy_descent(bandit.model, learning_rate=rate, clip_norm=1.0),
            pairs,
            reference=bandit.reference,
            weights=weights,
            settings=DpoSettings(
                steps=steps, beta=1.0, temperature=TEMPERATURE, batch_size=batch_size
            ),
            seed=0,
            words=(),
        )
    return found


def pair(chosen: int, rejected: int, objective: str = "helpfulness") -> Compared:
    return Compared(objective=objective, chosen=one_token(chosen), rejected=one_token(rejected))


def gain(bandit: Bandit, reference: np.ndarray, one: int, other: int) -> float:
    """Return by how many nats the odds of one arm against another have grown."""
    now = bandit.probabilities()
    return math.log(now[one] / now[other]) - math.log(reference[one] / reference[other])


def test_the_odds_grow_by_those_of_being_preferred(bandit: Bandit) -> None:
    # Arm 3 wins three times of four: sum of log sigmoid(x) three times and of log sigmoid(-x) once
    # is largest where sigmoid(x) = 3/4, so x = ln 3. Full batches: Adam settles to 1e-3 of it.
    reference = bandit.probabilities()
    train(bandit, [pair(3, 1)] * 3 + [pair(1, 3)], {"helpfulness": 1.0})
    assert gain(bandit, reference, 3, 1) == pytest.approx(math.log(3), abs=0.01)


@pytest.mark.parametrize("weight", [0.75, 0.25])
def test_objectives_that_disagree_settle_at_the_odds_of_their_weights(
    bandit: Bandit, weight: float
) -> None:
    # -w log sigmoid(x) - (1 - w) log sigmoid(-x) is least where sigmoid(x) = w
    reference = bandit.probabilities()
    pairs = [pair(3, 1), pair(1, 3, "harmlessness")]
    train(bandit, pairs, {"helpfulness": weight, "harmlessness": 1 - weight})
    expected = math.log(weight / (1 - weight))
    assert gain(bandit, reference, 3, 1) == pytest.approx(expected, abs=0.01)


def test_what_is_preferred_throughout_is_told_apart(bandit: Bandit) -> None:
    found = train(bandit, [pair(3, 1), pair(3, 5), pair(0, 2)], {"helpfulness": 1.0}, batch_size=2)
    assert found.accuracy == 1.0
    assert found.margin > 1
    assert found.loss < math.log(2)


def test_no_pairs_are_refused(bandit: Bandit) -> None:
    with pytest.raises(InputError, match="no preference pairs to train on"):
        train(bandit, [], {"helpfulness": 1.0})


def test_weights_of_other_objectives_are_refused(bandit: Bandit) -> None:
    with pytest.raises(InputError, match="give one for each of helpfulness"):
        train(bandit, [pair(3, 1)], {"harmlessness": 1.0})
