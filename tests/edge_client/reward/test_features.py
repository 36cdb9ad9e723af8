"""Features of responses and states, against hidden states of one example at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from device_profiles.reward_heads import initial_heads
from edge_client.data.packing import pack
from edge_client.data.prompts import Encoded, encode_example
from edge_client.peft.packed_model import PackedModel
from edge_client.reward import features as features_module
from edge_client.reward.features import Trunk
from edge_client.reward.head import Head, scores
from quantization.frozen_gpt2 import FrozenBase, load_frozen
from quantization.identity import BaseIdentity
from tests.conftest import WIDTH
from tests.edge_client.conftest import EXAMPLES

#: Rows of a batch are summed in another order than alone: fp32 rounding of twelve blocks, made
#: larger where a small vector is normalised.
ROUNDING = 1e-4


@pytest.fixture(scope="module")
def tiny(identity: BaseIdentity) -> FrozenBase:
    return load_frozen(identity)


@pytest.fixture(scope="module")
def model(tiny: FrozenBase) -> PackedModel:
    return PackedModel(tiny, adapter_size=0, placement="qkv", lora_count=0, lora_rank=1)


@pytest.fixture(scope="module")
def examples(tiny: FrozenBase) -> list[Encoded]:
    return [encode_example(e, tiny.tokenizer, 128) for e in EXAMPLES]


def normal(vector: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
    centred = vector - vector.mean()
    found: np.ndarray = centred / math.sqrt(float((centred**2).mean()) + 1e-5)  # type: ignore[type-arg]
    return found


def naively(model: PackedModel, example: Encoded) -> np.ndarray:  # type: ignore[type-arg]
    """Return an example's features in float64, place by place, from its hidden states alone."""
    hidden = model.hidden(pack([example], share=False)).double().numpy()
    rows = []
    for place in range(len(hidden)):
        mean = sum(hidden[: place + 1]) / (place + 1)
        rows.append([*normal(hidden[place]), *normal(mean), math.log(place + 1)])
    return np.array(rows)


def test_features_are_state_mean_so_far_and_length(
    model: PackedModel, examples: list[Encoded]
) -> None:
    found, lengths = Trunk(model).token_features(examples)
    assert lengths == [len(e.tokens) - e.response_start for e in examples]
    assert len(set(lengths)) > 1
    assert found.shape == (sum(lengths), 2 * WIDTH + 1)
    for own, example in zip(found.split(lengths), examples, strict=True):
        assert own.numpy() == pytest.approx(naively(model, example), abs=ROUNDING)


def test_a_response_has_the_features_of_its_last_place(
    model: PackedModel, examples: list[Encoded]
) -> None:
    trunk = Trunk(model)
    every, lengths = trunk.token_features(examples)
    ends = np.cumsum(lengths) - 1
    assert torch.equal(trunk.response_features(examples), every[ends])


def test_the_value_at_the_last_place_is_the_score(
    model: PackedModel, examples: list[Encoded]
) -> None:
    trunk = Trunk(model)
    head = Head(initial_heads(["helpfulness"], WIDTH, 8, seed=1))
    every, lengths = trunk.token_features(examples)
    values = scores(head, every)[np.cumsum(lengths) - 1]
    # the same features; products of more rows may be summed in another order
    assert values == pytest.approx(scores(head, trunk.response_features(examples)), abs=1e-6)


def test_features_do_not_depend_on_who_else_is_in_the_batch(
    model: PackedModel, examples: list[Encoded], monkeypatch: pytest.MonkeyPatch
) -> None:
    trunk = Trunk(model)
    together = trunk.response_features(examples)
    turned = trunk.response_features(examples[::-1]).flip(0)
    assert turned.numpy() == pytest.approx(together.numpy(), abs=ROUNDING)
    monkeypatch.setattr(features_module, "_MOST_TOKENS", 1)  # each by itself
    alone = trunk.response_features(examples)
    assert alone.numpy() == pytest.approx(together.numpy(), abs=ROUNDING)


def test_the_same_examples_give_the_same_bits(model: PackedModel, examples: list[Encoded]) -> None:
    one, other = (Trunk(model).response_features(examples) for _ in range(2))
    assert torch.equal(one, other)


def test_the_end_token_is_not_read(model: PackedModel, examples: list[Encoded]) -> None:
    def ending(example: Encoded, token: int) -> Encoded:
        tokens = np.array([*example.tokens[:-1], token])
        return Encoded(tokens=tokens, response_start=example.response_start)

    trunk = Trunk(model)
    assert torch.equal(
        trunk.response_features([ending(e, 7) for e in examples]),
        trunk.response_features(examples),
    )


def test_the_last_word_of_a_response_is_read(model: PackedModel, examples: list[Encoded]) -> None:
    first = examples[0]
    tokens = first.tokens.copy()
    tokens[-2] = 7 if tokens[-2] != 7 else 8
    other = Encoded(tokens=tokens, response_start=first.response_start)
    found: Tensor = Trunk(model).response_features([first, other])
    assert (found[0] - found[1]).abs().max() > 100 * ROUNDING


def test_one_example_and_none_have_features(model: PackedModel, examples: list[Encoded]) -> None:
    trunk = Trunk(model)
    assert trunk.response_features(examples[:1]).shape == (1, 2 * WIDTH + 1)
    assert trunk.response_features([]).shape == (0, 2 * WIDTH + 1)
    found, lengths = trunk.token_features([])
    assert (found.shape, lengths) == ((0, 2 * WIDTH + 1), [])


def test_features_carry_no_graph(model: PackedModel, examples: list[Encoded]) -> None:
    # a critic trains on them: no inference tensors either
    features = Trunk(model).response_features(examples)
    assert not features.requires_grad
    assert not features.is_inference()
