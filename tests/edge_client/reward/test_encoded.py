"""Reward models on an encoder: whole texts are scored, and critics read the base."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from device_profiles.methods import OBJECTIVES
from device_profiles.reward_heads import TrunkShape, initial_rewards
from edge_client.alignment.rollouts import judged
from edge_client.data.instructions import Example
from edge_client.data.prompts import encode_example, prompt
from edge_client.inference.batched import Response
from edge_client.reward.encoder import Encoder
from edge_client.reward.head import Head, of_objective
from edge_client.reward.judging import Heads, Judging
from messaging.layout import Tensors
from quantization.frozen_gpt2 import FrozenBase, load_frozen
from quantization.identity import identify
from tests.edge_client.reward.encoders import WIDTH, write_encoder

EXAMPLES = [
    Example(instruction="Name a river", output="The Nile, in Africa."),
    Example(instruction="Name a bridge", input="of four", output="Tower"),
]


@pytest.fixture(scope="module")
def base() -> FrozenBase:
    return load_frozen(identify("mini"), "fp32")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    folder = tmp_path_factory.mktemp("encoders") / "bert"
    return Encoder(str(write_encoder(folder, positions=256, letters=True)), "e" * 64)


@pytest.fixture
def judging(base: FrozenBase, encoder: Encoder) -> Judging:
    return Judging(base, encoder=encoder)


def rewards(base: FrozenBase) -> Tensors:
    return initial_rewards(OBJECTIVES, TrunkShape(base=base.identity.shape, encoder_width=WIDTH), 5)


def test_an_encoder_reads_the_texts_of_the_bases_tokens(judging: Judging, encoder: Encoder) -> None:
    examples = [encode_example(e, judging.base.tokenizer, 128) for e in EXAMPLES]
    found = judging.response_features({}, "helpfulness", examples)
    texts = [(prompt(e.instruction, e.input), e.output) for e in EXAMPLES]
    assert torch.equal(found, encoder.response_features(texts))
    assert found.shape == (2, 2 * WIDTH + 1)


def test_what_is_kept_of_an_encoder_is_not_taken_for_the_bases(
    base: FrozenBase, encoder: Encoder, tmp_path: Path
) -> None:
    examples = [encode_example(e, base.tokenizer, 128) for e in EXAMPLES]
    encoded = Judging(base, encoder=encoder, kept=tmp_path)
    bare = Judging(base, kept=tmp_path)
    first = encoded.response_features({}, "helpfulness", examples)
    wide = bare.response_features({}, "helpfulness", examples)
    assert (first.shape[1], wide.shape[1]) == (17, 257)
    assert torch.equal(encoded.response_features({}, "helpfulness", examples), first)


@pytest.mark.parametrize("ended", [True, False])
def test_a_response_is_scored_by_its_text_and_critics_are_shown_the_base(
    ended: bool, judging: Judging, encoder: Encoder
) -> None:
    base, tensors = judging.base, rewards(judging.base)
    heads = Heads(tensors, OBJECTIVES, judging)
    asked = np.array(base.tokenizer(prompt("Name a river", "")).input_ids)
    answer = np.array(base.tokenizer("The Nile").input_ids)
    (found,) = judged(
        [asked],
        [Response(tokens=answer, ended=ended)],
        end_token=base.end_token,
        token_features=heads.token_features,
        scores={name: heads.score(name) for name in OBJECTIVES},
        encoded=heads.encoded_features,
    )
    read = encoder.response_features([(prompt("Name a river", ""), "The Nile")])
    for name in OBJECTIVES:
        raw = Head(of_objective(tensors, name))(read)
        scale = heads.scales[name]
        assert found.scores[name] == pytest.approx((raw.item() - scale.mean) / scale.deviation)
        assert found.features[name].shape == (len(answer) + ended, 257)


def test_critics_start_from_a_head_on_the_base_that_is_the_same_everywhere(
    judging: Judging, base: FrozenBase, encoder: Encoder
) -> None:
    heads = Heads(rewards(base), OBJECTIVES, judging)
    again = Heads(rewards(base), OBJECTIVES, Judging(base, encoder=encoder))
    for name in OBJECTIVES:
        tensors, mean, deviation = heads.critic(name)
        assert (mean, deviation) == (0.0, 1.0)
        assert Head(tensors).features == 257
        assert {n: t.tobytes() for n, t in tensors.items()} == {
            n: t.tobytes() for n, t in again.critic(name)[0].items()
        }


def test_without_an_encoder_they_start_from_their_reward_models(base: FrozenBase) -> None:
    bare = Judging(base)
    tensors = initial_rewards(OBJECTIVES, TrunkShape(base=base.identity.shape), 5)
    heads = Heads(tensors, OBJECTIVES, bare)
    own, mean, deviation = heads.critic("helpfulness")
    assert own is heads.tensors("helpfulness")
    assert (mean, deviation) == (
        heads.scales["helpfulness"].mean,
        heads.scales["helpfulness"].deviation,
    )
    assert heads.encoded_features([]) is None
    with pytest.raises(ValueError, match="no encoder"):
        bare.encoded([])
