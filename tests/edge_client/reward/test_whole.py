"""Whole trunks that learn: gradients against finite differences, and the bare base at no change."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from device_profiles.methods import OBJECTIVES
from device_profiles.reward_heads import initial_rewards
from edge_client.data.instructions import Example
from edge_client.data.prompts import Encoded, encode_example
from edge_client.progress import Interruption, StoppedError
from edge_client.reward.adapted import batch_gradient, train_with_trunk
from edge_client.reward.head import Head, of_objective, trunk_tensors_of
from edge_client.reward.judging import Judging, reward_layout
from edge_client.reward.training import PairSteps
from edge_client.reward.whole import WholeTrunk
from messaging.layout import Tensors
from quantization.frozen_gpt2 import changed, load_frozen
from quantization.identity import BaseIdentity

ONE = "helpfulness"
PAIRS = [("Name a river", "The Nile.", "No"), ("Say seven", "Seven it is, as you say.", "Eight")]


@pytest.fixture(scope="module")
def judging(identity: BaseIdentity) -> Judging:
    return Judging(load_frozen(identity, "fp32"), whole=True)


@pytest.fixture(scope="module")
def sides(judging: Judging) -> list[tuple[Encoded, Encoded]]:
    def encoded(asked: str, answer: str) -> Encoded:
        row = Example(instruction=asked, output=answer)
        return encode_example(row, judging.base.tokenizer, 128)

    return [(encoded(asked, a), encoded(asked, b)) for asked, a, b in PAIRS]


def moved(judging: Judging) -> Tensors:
    """Return reward models whose trunks have gone away from the base."""
    rng = np.random.default_rng(3)
    first = initial_rewards(OBJECTIVES, judging.shape, seed=5)
    return {n: (t + rng.normal(0, 0.02, t.shape)).astype(np.float32) for n, t in first.items()}


def test_without_changes_it_reads_as_the_bare_base_does_to_the_bit(
    judging: Judging, sides: list[tuple[Encoded, Encoded]]
) -> None:
    examples = [side for pair in sides for side in pair]
    first = initial_rewards(OBJECTIVES, judging.shape, seed=5)
    bare = Judging(judging.base)
    for name in OBJECTIVES:
        found = judging.response_features(first, name, examples)
        assert torch.equal(found, bare.response_features(first, name, examples))


def test_each_reward_model_reads_with_its_own_weights(
    judging: Judging, sides: list[tuple[Encoded, Encoded]]
) -> None:
    examples = [side for pair in sides for side in pair]
    tensors = moved(judging)
    heads = judging.heads(tensors, OBJECTIVES)
    features, _ = heads.token_features(examples)
    assert judging.reads(OBJECTIVES) == 2
    read = {}
    for name in OBJECTIVES:
        base = changed(judging.base, trunk_tensors_of(tensors, name))
        read[name], _ = Judging(base).trunk.token_features(examples)
        assert torch.equal(features[name], read[name])
    assert not torch.equal(read["helpfulness"], read["harmlessness"])
    assert not torch.equal(read["helpfulness"], judging.trunk.token_features(examples)[0])


def test_the_way_there_is_the_packed_one_to_rounding(
    judging: Judging, sides: list[tuple[Encoded, Encoded]]
) -> None:
    examples = [side for pair in sides for side in pair]
    tensors = moved(judging)
    trunk = WholeTrunk(judging.base)
    trunk.put(trunk_tensors_of(tensors, ONE))
    hidden, _ = trunk.forward(examples)
    features, lengths = judging.trunk_of(tensors, ONE).token_features(examples)
    width = judging.shape.width
    normal = torch.nn.functional.layer_norm(hidden, (width,))
    assert len(hidden) == sum(lengths)
    torch.testing.assert_close(normal, features[:, :width], rtol=0, atol=2e-4)


def test_the_gradient_is_that_of_finite_differences(
    judging: Judging, sides: list[tuple[Encoded, Encoded]]
) -> None:
    tensors = moved(judging)
    trunk = WholeTrunk(judging.base)
    head = Head(of_objective(tensors, ONE)).requires_grad_(True)
    own = trunk_tensors_of(tensors, ONE)
    trunk.put(own)
    batch_gradient(trunk, head, sides, margin=0.3)
    (flat,) = trunk.parameters()
    assert flat.grad is not None
    gradient = flat.grad.clone()
    assert int((gradient != 0).sum()) > 0.2 * len(gradient)  # words that are not there have none

    def loss(vector: torch.Tensor) -> float:
        with torch.no_grad():
            flat.copy_(vector)
        return batch_gradient(trunk, head, sides, margin=0.3)

    rng = np.random.default_rng(1)
    start, step = flat.detach().clone(), 1e-2
    for _ in range(4):
        along = torch.from_numpy(rng.standard_normal(len(start)).astype(np.float32))
        along = (along + 30 * gradient / gradient.norm() * math.sqrt(len(start)) / 30).div_(
            along.norm()
        )
        slope = (loss(start + step * along) - loss(start - step * along)) / (2 * step)
        assert slope == pytest.approx(float(gradient @ along), rel=0.05)


def test_parts_of_a_batch_give_the_gradient_of_the_whole(
    judging: Judging, sides: list[tuple[Encoded, Encoded]], monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors, found = moved(judging), []
    for most in (10_000, 1):
        monkeypatch.setattr("edge_client.reward.adapted.PASS_TOKENS", most)
        trunk = WholeTrunk(judging.base)
        trunk.put(trunk_tensors_of(tensors, ONE))
        head = Head(of_objective(tensors, ONE)).requires_grad_(True)
        batch_gradient(trunk, head, sides)
        (flat,) = trunk.parameters()
        assert flat.grad is not None
        found.append(flat.grad.clone())
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-6)


def taught(judging: Judging, sides: list[tuple[Encoded, Encoded]], **changes: Any) -> Any:
    first = initial_rewards(OBJECTIVES, judging.shape, seed=5)
    how: dict[str, Any] = {
        "steps": 3, "batch_size": 2, "learning_rate": 3e-3, "seed": 7, "words": ("pi", ONE, 2),
    }  # fmt: skip
    rest = {n: changes.pop(n) for n in ("moments", "interruption") if n in changes}
    steps = PairSteps(**{**how, **changes})
    return train_with_trunk(judging.learning, first, sides, steps, objective=ONE, **rest)


def test_learning_lowers_the_loss_and_changes_every_layer(
    judging: Judging, sides: list[tuple[Encoded, Encoded]]
) -> None:
    short, long = (taught(judging, sides, steps=steps) for steps in (1, 12))
    assert long.loss < 0.7 * short.loss
    layout = reward_layout([ONE], judging.shape)
    assert set(long.tensors) == set(layout.names)
    changes = trunk_tensors_of(long.tensors, ONE)
    assert all(np.abs(t).max() > 0 for n, t in changes.items())
    again = taught(judging, sides, steps=12)
    assert {n: t.tobytes() for n, t in again.tensors.items()} == {
        n: t.tobytes() for n, t in long.tensors.items()
    }


def test_moments_go_on(judging: Judging, sides: list[tuple[Encoded, Encoded]]) -> None:
    first = taught(judging, sides, steps=2)
    assert first.moments.steps == 2
    names = set(trunk_tensors_of(first.moments.first, ONE))
    assert names == set(trunk_tensors_of(first.tensors, ONE))
    second = taught(judging, sides, steps=2, moments=first.moments)
    assert second.moments.steps == 4


def test_a_round_that_is_broken_off_is_left_before_its_next_step(
    judging: Judging, sides: list[tuple[Encoded, Encoded]]
) -> None:
    stop = Interruption()
    stop.stop()
    with pytest.raises(StoppedError):
        taught(judging, sides, interruption=stop)


def test_a_bare_trunk_learns_nothing(judging: Judging) -> None:
    with pytest.raises(ValueError, match="nothing of a bare trunk learns"):
        _ = Judging(judging.base).learning
