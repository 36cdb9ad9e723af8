"""A head against its formula, and the scale of its scores."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from device_profiles.errors import InputError
from device_profiles.reward_heads import initial_heads
from edge_client.reward.head import Head, of_objective, scores
from edge_client.reward.scale import Scale
from tests.edge_client.reward.conftest import HIDDEN, NAME, WIDTH, a_head, by_hand, some_features

ROUNDING = 1e-5  # fp32 sums of some ten terms of size 1


def test_scores_are_those_of_a_network_with_one_hidden_layer() -> None:
    tensors, features = a_head(), some_features(7)
    assert scores(Head(tensors), features) == pytest.approx(
        by_hand(tensors, features), abs=ROUNDING
    )


def test_a_heads_parameters_are_frozen_copies_in_the_order_given() -> None:
    tensors = dict(reversed(a_head().items()))
    head = Head(tensors)
    parameters = list(head.parameters())
    assert not any(p.requires_grad for p in parameters)
    for parameter, values in zip(parameters, tensors.values(), strict=True):
        assert np.array_equal(parameter.numpy(), values)
    parameters[0].fill_(9.0)
    assert not (next(iter(tensors.values())) == 9).any()
    assert list(head.take()) == list(tensors)


def test_one_objectives_tensors_are_found_among_several() -> None:
    both = initial_heads(["helpfulness", "harmlessness"], WIDTH, HIDDEN, seed=0)
    own = of_objective(both, "harmlessness")
    assert list(own) == [n for n in both if n.startswith("reward.harmlessness.")]
    with pytest.raises(InputError, match="no reward head of objective 'honesty' among 8 tensors"):
        of_objective(both, "honesty")


def test_tensors_that_are_no_head_are_refused() -> None:
    tensors = a_head()
    with pytest.raises(InputError, match="give those of one objective"):
        Head({n: t for n, t in tensors.items() if not n.endswith("outer.bias")})
    with pytest.raises(InputError, match="give those of one objective"):
        Head(initial_heads(["helpfulness", "harmlessness"], WIDTH, HIDDEN, seed=0))
    with pytest.raises(InputError, match=r"do not fit one another: .*outer.weight \(1, 5\)"):
        Head({**tensors, f"{NAME}.outer.weight": np.ones((1, HIDDEN - 1), np.float32)})


def test_centred_scores_of_the_reference_set_have_mean_0_and_deviation_1() -> None:
    head, reference = Head(a_head()), some_features(64)
    scale = Scale.of(head, reference)
    centred = scale.centred(scores(head, reference))
    assert centred.mean() == pytest.approx(0, abs=1e-12)  # float64
    assert centred.std() == pytest.approx(1, abs=1e-12)
    raw = by_hand(a_head(), reference)
    assert scale.mean == pytest.approx(sum(raw) / 64, abs=ROUNDING)
    assert scale.deviation == pytest.approx(
        (sum((raw - raw.mean()) ** 2) / 64) ** 0.5, abs=ROUNDING
    )


def test_averaged_heads_are_centred_alike_on_two_devices() -> None:
    # each device has the cloud's head and the reference set, and nothing else: the same bits
    heads = [a_head(seed) for seed in (1, 2)]
    mean = {n: ((heads[0][n] + heads[1][n]) / 2).astype(np.float32) for n in heads[0]}
    reference, responses = some_features(64), some_features(5, seed=3)
    found = []
    for _ in range(2):
        head = Head({n: t.copy() for n, t in mean.items()})
        found.append(Scale.of(head, reference.clone()).centred(scores(head, responses)))
    assert np.array_equal(found[0], found[1])


def test_offset_and_size_of_a_head_leave_centred_scores_as_they_are() -> None:
    tensors = a_head()
    changed = dict(tensors)
    changed[f"{NAME}.outer.weight"] = 4 * tensors[f"{NAME}.outer.weight"]
    changed[f"{NAME}.outer.bias"] = tensors[f"{NAME}.outer.bias"] + 3
    reference, responses = some_features(64), some_features(5, seed=3)
    found = [
        Scale.of(head, reference).centred(scores(head, responses))
        for head in (Head(tensors), Head(changed))
    ]
    assert found[1] == pytest.approx(found[0], abs=ROUNDING)


def test_a_folded_head_gives_centred_scores_by_itself() -> None:
    tensors, reference, responses = a_head(), some_features(64), some_features(5, seed=3)
    scale = Scale.of(Head(tensors), reference)
    folded = Head(scale.folded(tensors))
    assert scores(folded, responses) == pytest.approx(
        scale.centred(scores(Head(tensors), responses)),
        abs=10 * ROUNDING,  # divided by 0.2 or so
    )


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_a_head_that_scores_all_alike_has_no_scale(offset: float) -> None:
    tensors = a_head()
    tensors[f"{NAME}.outer.weight"] = np.full((1, HIDDEN), 1e-9 * offset, np.float32)
    tensors[f"{NAME}.outer.bias"] = np.array([offset], np.float32)
    with pytest.raises(InputError, match=r"scores the 64 responses .* alike .*must be above 0"):
        Scale.of(Head(tensors), some_features(64))


def test_one_reference_response_or_none_gives_no_scale() -> None:
    for rows in (0, 1):
        with pytest.raises(InputError, match=f"scores the {rows} responses"):
            Scale.of(Head(a_head()), some_features(rows))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_head_that_diverged_has_no_scale(value: float) -> None:
    tensors = a_head()
    tensors[f"{NAME}.outer.bias"] = np.array([value], np.float32)
    with pytest.raises(InputError, match="not finite: its training diverged"):
        Scale.of(Head(tensors), some_features(64))


def test_scores_leave_no_graph() -> None:
    features = some_features(2)
    features.requires_grad_(True)
    assert isinstance(scores(Head(a_head()), features), np.ndarray)
    assert features.grad is None
    assert Head(a_head())(torch.zeros(3, 2 * WIDTH + 1)).shape == (3,)
