"""Bradley-Terry learning: its gradient, its bits, and what it finds."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from device_profiles.errors import InputError
from edge_client.descent import Moments
from edge_client.reward.evaluation import wins
from edge_client.reward.head import Head, scores
from edge_client.reward.training import HeadTraining, PairSteps, bradley_terry, train_head
from messaging.layout import Tensors
from tests.edge_client.reward.conftest import NAME, a_head, by_hand, some_features


def learn(
    tensors: Tensors, chosen: Tensor, rejected: Tensor, *, steps: int = 5, **changes: Any
) -> HeadTraining:
    how: dict[str, Any] = {"batch_size": 16, "learning_rate": 1e-2, "seed": 3, "words": ("pi", 1)}
    moments = changes.pop("moments", None)
    steps_ = PairSteps(steps=steps, **{**how, **changes})
    return train_head(tensors, chosen, rejected, steps_, moments)


def same(one: Tensors, other: Tensors) -> bool:
    return list(one) == list(other) and all(np.array_equal(one[n], other[n]) for n in one)


@pytest.mark.parametrize("margin", [0.0, 0.7])
def test_the_loss_is_that_of_bradley_and_terry(margin: float) -> None:
    chosen, rejected = torch.tensor([2.0, -1.0]).double(), torch.tensor([0.5, 3.0]).double()
    # differences 1.5 and -4: -ln(1 / (1 + exp(margin - difference)))
    expected = sum(math.log(1 + math.exp(margin - d)) for d in (1.5, -4.0)) / 2
    assert float(bradley_terry(chosen, rejected, margin)) == pytest.approx(expected, abs=1e-12)


def test_the_gradient_is_that_of_finite_differences() -> None:
    # in float64, through the head: central differences of step 1e-5 are right to about 1e-10
    tensors = a_head()
    chosen, rejected = some_features(6, seed=1).double(), some_features(6, seed=2).double()
    head = Head(tensors).double()

    def loss() -> Tensor:
        return bradley_terry(head(chosen), head(rejected), 0.3)

    for parameter in head.parameters():
        parameter.requires_grad_(True)
    gradients = torch.autograd.grad(loss(), list(head.parameters()))
    for parameter, gradient in zip(head.parameters(), gradients, strict=True):
        flat = parameter.detach().view(-1)
        for i in range(len(flat)):
            before = flat[i].item()
            sides = []
            for step in (1e-5, -1e-5):
                flat[i] = before + step
                sides.append(float(loss().detach()))
            flat[i] = before
            slope = (sides[0] - sides[1]) / 2e-5
            assert float(gradient.view(-1)[i]) == pytest.approx(slope, abs=1e-8)


def test_the_reported_loss_is_that_before_the_step() -> None:
    tensors, chosen, rejected = a_head(), some_features(10, seed=1), some_features(10, seed=2)
    result = learn(tensors, chosen, rejected, steps=1, batch_size=99, margin=0.5)
    ahead = by_hand(tensors, chosen) - by_hand(tensors, rejected) - 0.5
    assert result.loss == pytest.approx(np.mean(np.log1p(np.exp(-ahead))), rel=1e-5)  # fp32
    assert (result.pairs, result.moments.steps) == (10, 1)


def test_the_first_step_of_adam_is_the_learning_rate_against_the_gradients_sign() -> None:
    tensors, chosen, rejected = a_head(), some_features(10, seed=1), some_features(10, seed=2)
    after = learn(tensors, chosen, rejected, steps=1, batch_size=99, weight_decay=0.5).tensors
    head = Head(tensors).double()
    for parameter in head.parameters():
        parameter.requires_grad_(True)
    bradley_terry(head(chosen.double()), head(rejected.double())).backward()  # type: ignore[no-untyped-call]
    for parameter, (name, values) in zip(head.parameters(), tensors.items(), strict=True):
        if name == f"{NAME}.outer.bias":
            continue
        gradient = parameter.grad.numpy()  # type: ignore[union-attr]
        # m/sqrt(v) of one step is the sign, but for an epsilon of 1e-8; decay first
        expected = values * (1 - 1e-2 * 0.5) - 1e-2 * gradient / (np.abs(gradient) + 1e-8)
        assert after[name] == pytest.approx(expected, abs=1e-5)  # gradients down to 1e-5, in fp32


def test_pairs_that_can_be_told_apart_are_learned(separable: tuple[Tensor, Tensor]) -> None:
    chosen, rejected = separable
    train, held_out = slice(0, 150), slice(150, 200)
    result = learn(a_head(), chosen[train], rejected[train], steps=300, weight_decay=0.0)
    head = Head(result.tensors)
    right = wins(scores(head, chosen[held_out]) - scores(head, rejected[held_out]))
    assert right.mean() >= 0.95  # one feature decides, by 1 or more deviations
    swapped = learn(a_head(), rejected[train], chosen[train], steps=300, weight_decay=0.0)
    head = Head(swapped.tensors)
    right = wins(scores(head, chosen[held_out]) - scores(head, rejected[held_out]))
    assert right.mean() <= 0.05


def test_the_same_seed_and_words_give_the_same_bits(separable: tuple[Tensor, Tensor]) -> None:
    one, again = (learn(a_head(), *separable) for _ in range(2))
    assert same(one.tensors, again.tensors)
    assert one.loss == again.loss
    assert not same(one.tensors, learn(a_head(), *separable, seed=4).tensors)
    assert not same(one.tensors, learn(a_head(), *separable, words=("pi", 2)).tensors)


def test_a_round_goes_on_with_the_moments_of_the_round_before() -> None:
    # with all pairs in every batch, their order matters by rounding alone: 2 + 3 steps are 5
    chosen, rejected = some_features(10, seed=1), some_features(10, seed=2)
    whole = learn(a_head(), chosen, rejected, steps=5, batch_size=10)
    half = learn(a_head(), chosen, rejected, steps=2, batch_size=10)
    rest = learn(half.tensors, chosen, rejected, steps=3, batch_size=10, moments=half.moments)
    anew = learn(half.tensors, chosen, rejected, steps=3, batch_size=10)
    assert rest.moments.steps == 5
    for name, values in whole.tensors.items():
        assert rest.tensors[name] == pytest.approx(values, abs=1e-4)  # a step is 1e-2
    inner = f"{NAME}.inner.weight"
    assert np.abs(anew.tensors[inner] - whole.tensors[inner]).max() > 1e-3


def test_training_changes_neither_what_it_was_given_nor_the_outer_bias() -> None:
    tensors, chosen, rejected = a_head(), some_features(10, seed=1), some_features(10, seed=2)
    copies = {name: values.copy() for name, values in tensors.items()}
    first = learn(tensors, chosen, rejected)
    kept = {name: values.copy() for name, values in first.moments.first.items()}
    result = learn(tensors, chosen, rejected, moments=first.moments)
    assert same(tensors, copies)
    assert same(first.moments.first, kept)
    changed = [n for n in tensors if not np.array_equal(result.tensors[n], tensors[n])]
    # it cancels in a difference: a gradient of rounding alone would make Adam walk about
    assert sorted(set(tensors) - set(changed)) == [f"{NAME}.outer.bias"]
    assert list(result.moments.first) == changed


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"steps": 0}, "steps = 0 of reward learning; it must be at least 1"),
        ({"batch_size": 0}, "batch_size = 0 of reward learning; it must be at least 1"),
        ({"learning_rate": 0.0}, "learning_rate = 0 of reward learning; it must be above 0"),
        ({"weight_decay": -0.1}, "weight_decay = -0.1 of reward learning"),
        ({"margin": -1.0}, "margin = -1 of reward learning; it must be at least 0"),
        ({"margin": math.nan}, "margin = nan of reward learning"),
    ],
)
def test_numbers_out_of_their_range_are_refused(changes: dict[str, Any], sentence: str) -> None:
    features = some_features(4)
    with pytest.raises(InputError, match=sentence):
        learn(a_head(), features, features, **changes)


def test_features_that_do_not_fit_are_refused() -> None:
    features = some_features(4)
    with pytest.raises(
        InputError, match=r"chosen responses \(4, 9\) and of rejected ones \(3, 9\)"
    ):
        learn(a_head(), features, features[:3])
    with pytest.raises(InputError, match="at least 1 pair"):
        learn(a_head(), features[:0], features[:0])
    with pytest.raises(InputError, match="8 features and a reward head that reads 9"):
        learn(a_head(), features[:, :8], features[:, :8])


def test_training_that_diverges_names_the_learning_rate() -> None:
    chosen, rejected = some_features(10, seed=1), some_features(10, seed=2)
    with pytest.raises(InputError, match=r"learning_rate = 1e\+20: .* at step \d+; choose a lower"):
        learn(a_head(), chosen, rejected, learning_rate=1e20, weight_decay=0.0)


def test_no_moments_are_the_same_as_a_beginning() -> None:
    chosen, rejected = some_features(10, seed=1), some_features(10, seed=2)
    begun = learn(a_head(), chosen, rejected, moments=Moments())
    assert same(begun.tensors, learn(a_head(), chosen, rejected).tensors)
