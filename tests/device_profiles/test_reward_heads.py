"""Reward heads: names, sizes, and first values that belong to the seed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from device_profiles.errors import InputError
from device_profiles.methods import OBJECTIVES
from device_profiles.modules import BaseShape, base_tensors
from device_profiles.pricing import PRICED_SHAPES
from device_profiles.reward_heads import (
    TrunkShape,
    check_trunk,
    feature_count,
    head_tensors,
    initial_heads,
    initial_rewards,
    reward_tensors,
)
from messaging.layout import Layout


def test_a_head_has_two_layers_on_two_vectors_and_a_length() -> None:
    tensors = head_tensors("helpfulness", 128, 64)
    assert [(t.name, t.shape) for t in tensors] == [
        ("reward.helpfulness.inner.weight", (64, 257)),
        ("reward.helpfulness.inner.bias", (64,)),
        ("reward.helpfulness.outer.weight", (1, 64)),
        ("reward.helpfulness.outer.bias", (1,)),
    ]
    # 64 * 257 + 64 + 64 + 1
    assert sum(t.size for t in tensors) == 16_577
    assert feature_count(384) == 769


def test_first_values_travel_in_the_layout_of_the_heads() -> None:
    layout = Layout.of(t for o in OBJECTIVES for t in head_tensors(o, 16, 8))
    heads = initial_heads(OBJECTIVES, 16, 8, seed=3)
    back = layout.unpack(layout.pack(heads))
    assert list(back) == list(heads)
    assert all(np.array_equal(back[name], heads[name]) for name in heads)
    assert all(t.dtype == np.float32 for t in heads.values())
    # a scale for each hidden unit of the inner weight, one for each of the others, twice
    assert layout.scales == 2 * (8 + 1 + 1 + 1)


def test_first_values_belong_to_seed_and_objective_alone() -> None:
    both = initial_heads(OBJECTIVES, 16, 8, seed=3)
    alone = initial_heads(["harmlessness"], 16, 8, seed=3)
    assert all(np.array_equal(both[name], alone[name]) for name in alone)
    inner = "reward.{}.inner.weight"
    assert not np.array_equal(both[inner.format("helpfulness")], alone[inner.format(OBJECTIVES[1])])
    other = initial_heads(["harmlessness"], 16, 8, seed=4)
    assert not np.array_equal(
        other[inner.format("harmlessness")], alone[inner.format(OBJECTIVES[1])]
    )


def test_first_weights_stay_within_one_over_the_root_of_their_inputs() -> None:
    heads = initial_heads(["helpfulness"], 127, 64, seed=0)
    inner, outer = (heads[f"reward.helpfulness.{part}.weight"] for part in ("inner", "outer"))
    for weights, bound in ((inner, 255**-0.5), (outer, 1 / 8)):
        assert np.abs(weights).max() <= bound
        assert np.abs(weights).max() > 0.8 * bound  # of 64 uniform draws, all but surely
    assert not any(heads[f"reward.helpfulness.{part}.bias"].any() for part in ("inner", "outer"))


@pytest.mark.parametrize(
    ("width", "hidden", "sentence"),
    [(0, 64, "trunk width 0 of a reward head"), (16, 0, "hidden units 0 of a reward head")],
)
def test_a_head_of_nothing_is_refused(width: int, hidden: int, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        head_tensors("helpfulness", width, hidden)


SMALL = BaseShape(layers=2, width=16, inner=64, vocabulary=100, positions=32)


def test_a_whole_trunk_is_the_head_and_every_weight_of_the_base() -> None:
    trunk = TrunkShape(base=SMALL, whole=True)
    tensors = reward_tensors("helpfulness", trunk)
    head = head_tensors("helpfulness", 16)
    assert tensors[: len(head)] == head
    # embeddings; a block: two norms, four projections with their biases; the last norm
    block = 4 * 16 + (16 * 48 + 48) + (16 * 16 + 16) + (16 * 64 + 64) + (64 * 16 + 16)
    assert sum(t.size for t in tensors[len(head) :]) == 132 * 16 + 2 * block + 32
    assert all(t.name.startswith("reward.helpfulness.trunk.") for t in tensors[len(head) :])
    first = initial_rewards(["helpfulness"], trunk, seed=3)
    assert [(n, t.shape) for n, t in first.items()] == [(t.name, t.shape) for t in tensors]
    assert not any(t.any() for n, t in first.items() if ".trunk." in n)


def test_the_weights_of_gpt2_small_are_all_counted() -> None:
    base, parameters = PRICED_SHAPES["gpt2-small"]
    assert sum(t.size for t in base_tensors(base)) == parameters


@pytest.mark.parametrize(
    "base", [replace(SMALL, vocabulary=0), replace(SMALL, positions=0), replace(SMALL, family="x")]
)
def test_weights_that_are_not_known_are_no_trunk(base: BaseShape) -> None:
    with pytest.raises(InputError, match="give a GPT-2"):
        reward_tensors("helpfulness", TrunkShape(base=base, whole=True))


def test_only_a_base_in_fp32_changes() -> None:
    check_trunk("base", "adapters", "int8")
    check_trunk("base", "all", "fp32")
    check_trunk("base", "all")  # of an aggregator, which holds no trunk
    check_trunk("an/encoder", "head", "int8")
    for shares in ("adapters", "all"):
        with pytest.raises(InputError, match="give reward_trunk = 'base', or reward_shares = 'he"):
            check_trunk("an/encoder", shares, "fp32")
    with pytest.raises(InputError, match=r"^here: trunk_precision = 'int8'.*'fp32'$"):
        check_trunk("base", "all", "int8", "here: ")
