"""Dropout of LoRA's inputs: the masks themselves, and both passes against autograd through peft."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from edge_client.data.batches import make_batch
from edge_client.data.packing import Packed, pack
from edge_client.data.prompts import Encoded, encode_example
from edge_client.peft.dropout import LoraDropout
from edge_client.peft.packed_model import PackedModel
from edge_client.peft.tuned_model import TunedModel
from quantization.base_model import load_base
from quantization.frozen_gpt2 import FrozenBase, load_frozen
from quantization.identity import BaseIdentity
from tests.edge_client.conftest import ADAPTER_SIZE, EXAMPLES, RANK, random_tensors
from tests.edge_client.peft.test_packed_model import doubled, furthest, run

CPU = torch.device("cpu")
SITE = "transformer.h.0.attn.c_attn.query"
DROP = LoraDropout(share=0.3, seed=7, words=("pi5-01", 1, 0))


@pytest.fixture(scope="module")
def tiny(identity: BaseIdentity) -> FrozenBase:
    return load_frozen(identity)


@pytest.fixture(scope="module")
def examples(tiny: FrozenBase) -> list[Encoded]:
    return [encode_example(e, tiny.tokenizer, 128) for e in EXAMPLES]


def model_with(base: FrozenBase, identity: BaseIdentity, placement: str = "qkv") -> PackedModel:
    """Return a model with all modules, no entry of which is zero."""
    model = PackedModel(
        base, adapter_size=ADAPTER_SIZE, placement=placement, lora_count=36, lora_rank=RANK
    )
    model.put(random_tensors(identity, placement=placement))
    return model


@dataclass(frozen=True)
class Spread:
    """The masks of a packed batch, laid out as the padded one is: what peft is given.

    In the last block nothing is computed behind attention but the rows that are looked at.
    """

    drop: LoraDropout
    batch: Packed
    lengths: Sequence[int]

    @property
    def scale(self) -> float:
        """As the mask's."""
        return self.drop.scale

    def kept(self, site: str, shape: Sequence[int], device: torch.device) -> Tensor:
        """Return the mask of a padded batch. Shape (B, T, D)."""
        rows = torch.arange(len(self.batch.tokens))
        if site.startswith("transformer.h.11.mlp"):
            rows = self.batch.places
        mask = torch.ones(len(self.batch.tokens), shape[-1], dtype=torch.bool)
        mask[rows] = self.drop.kept(site, (len(rows), shape[-1]), device)
        padded = torch.ones(tuple(shape), dtype=torch.bool)
        start = 0
        for i, length in enumerate(self.lengths):
            padded[i, :length] = mask[start : start + length]
            start += length
        return padded


def test_a_mask_leaves_out_its_share_and_keeps_the_mean() -> None:
    kept = DROP.kept(SITE, (1000, 200), CPU)
    # a share of 200,000 draws deviates by sqrt(0.3 * 0.7 / 2e5) = 0.001
    assert float(kept.double().mean()) == pytest.approx(0.7, abs=0.004)
    # 0.3 of 65,536 levels, rounded to a whole one
    assert DROP.scale == pytest.approx(1 / 0.7, rel=1e-5)


def test_a_mask_is_of_its_place_however_often_and_whenever_it_is_drawn() -> None:
    first = DROP.kept(SITE, (50, 16), CPU)
    others = [
        DROP.at(1).kept(SITE, (50, 16), CPU),
        DROP.kept(SITE.replace("query", "value"), (50, 16), CPU),
        LoraDropout(share=0.3, seed=8, words=DROP.words).kept(SITE, (50, 16), CPU),
        LoraDropout(share=0.3, seed=7, words=("pi5-01", 1, 1)).kept(SITE, (50, 16), CPU),
    ]
    assert torch.equal(DROP.kept(SITE, (50, 16), CPU), first)
    assert not any(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("placement", ["qkv", "wide"])
def test_loss_and_gradients_under_dropout_are_those_of_autograd_through_peft(
    tiny: FrozenBase, identity: BaseIdentity, examples: list[Encoded], placement: str
) -> None:
    model = model_with(doubled(tiny), identity, placement)
    batch = pack(examples, share=False)
    loss, found = run(model, batch, drop=DROP)
    plain = TunedModel(
        load_base(identity),
        adapter_size=ADAPTER_SIZE,
        placement=placement,
        lora_count=36,
        lora_rank=RANK,
    )
    plain.put(random_tensors(identity, placement=placement))
    plain.model.double()
    lengths = [len(e.tokens) - 1 for e in examples]
    plain.drop = Spread(DROP, batch, lengths)  # type: ignore[assignment]
    padded = make_batch(examples, 7)
    logits = plain.logits_at(padded.tokens, padded.places)
    expected = torch.nn.functional.cross_entropy(logits, padded.targets)
    names = list(plain.trainable())
    gradients = torch.autograd.grad(expected, list(plain.trainable().values()))
    assert loss == pytest.approx(float(expected.detach()), rel=1e-9)
    assert furthest(found, dict(zip(names, gradients, strict=True))) < 1e-8  # rounding in double
    without, _ = run(model, batch)
    assert abs(loss - without) > 1e-3


def test_a_block_that_is_computed_twice_is_given_the_same_masks(
    tiny: FrozenBase, identity: BaseIdentity, examples: list[Encoded]
) -> None:
    model = model_with(tiny, identity)
    batch = pack(examples, share=False)
    loss, kept = run(model, batch, drop=DROP)
    again, computed = run(model, batch, drop=DROP, checkpoint=True)
    assert loss == again
    assert all(np.array_equal(kept[n], computed[n]) for n in kept)
