"""Decoding with a cache, against full passes over everything that was read so far."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from edge_client.data.packing import pack
from edge_client.data.prompts import Encoded
from edge_client.peft import decoding
from edge_client.peft.decoding import Decoder
from edge_client.peft.packed_model import PackedModel
from quantization.frozen_gpt2 import FrozenBase, load_frozen
from quantization.identity import BaseIdentity
from tests.conftest import VOCABULARY
from tests.edge_client.conftest import ADAPTER_SIZE, RANK

Rows = list[npt.NDArray[np.int64]]

# This base's weights and modules are large: on the way through 12 blocks they make of fp32's
# rounding up to some 1e-5 of the largest logit. A place or a module gone wrong changes all of it.
TOLERANCE = 5e-4


@pytest.fixture(scope="module")
def tiny(identity: BaseIdentity) -> FrozenBase:
    return load_frozen(identity)


def make(base: FrozenBase, count: int = 36, placement: str = "qkv", size: int = 4) -> PackedModel:
    """Return a model with no entry of its modules zero."""
    model = PackedModel(
        base, adapter_size=size, placement=placement, lora_count=count, lora_rank=RANK
    )
    rng = np.random.default_rng(0)
    model.put_flat(rng.normal(0, 0.3, len(model.take_flat())).astype(np.float32))
    return model


def prompts_of(*lengths: int, common: int = 5) -> Rows:
    """Return prompts of random tokens, of which the first few are the same."""
    rng = np.random.default_rng(1)
    prompts = [rng.integers(1, VOCABULARY, length) for length in lengths]
    for prompt in prompts:
        prompt[:common] = np.arange(7, 7 + common)[: len(prompt)]
    return prompts


def in_full(model: PackedModel, rows: Rows) -> Tensor:
    """Return the logits of each row's next token, each row by itself and without a cache."""
    parts = [
        model.logits(pack([Encoded(tokens=np.append(row, 0), response_start=len(row))]))
        for row in rows
    ]
    return torch.cat(parts)


def error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


def follow(
    decoder: Decoder, model: PackedModel, rows: Rows, tokens: Sequence[Sequence[int]]
) -> float:
    """Read tokens, a list a step, and return the largest error of any logits."""
    worst = error(decoder.logits, in_full(model, rows))
    for step in tokens:
        logits = decoder.step(torch.tensor(step))
        rows[:] = [np.append(row, token) for row, token in zip(rows, step, strict=True)]
        worst = max(worst, error(logits, in_full(model, rows)))
    return worst


@pytest.mark.parametrize(
    ("count", "placement", "size"),
    [
        (36, "qkv", ADAPTER_SIZE),
        (20, "wide", ADAPTER_SIZE),
        (30, "qkv", 0),
        (0, "qkv", 4),
        (0, "qkv", 0),
    ],
)
def test_logits_are_those_of_full_passes_whatever_is_active(
    tiny: FrozenBase, count: int, placement: str, size: int
) -> None:
    model = make(tiny, count, placement, size)
    rows = prompts_of(1, 40, 7, 90, 7)
    decoder = Decoder(model, rows, 3)
    steps = [[5, 6, 7, 8, 9], [1, 1, 1, 1, 1], [300, 2, 500, 4, 11]]
    assert follow(decoder, model, rows, steps) < TOLERANCE


def test_only_what_is_active_counts(tiny: FrozenBase) -> None:
    model = make(tiny)
    rows = prompts_of(6, 9)
    whole = Decoder(model, rows, 1).logits
    model.activate(12)
    assert follow(Decoder(model, rows, 1), model, rows, [[3, 4]]) < TOLERANCE
    assert error(Decoder(model, prompts_of(6, 9), 1).logits, whole) > 0.01


def test_lora_modules_give_the_same_joined_and_apart(
    tiny: FrozenBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, rows = make(tiny), prompts_of(6, 9)
    monkeypatch.setattr(decoding, "_JOINED_ENTRIES", 0)
    assert follow(Decoder(model, rows, 1), model, rows, [[3, 4]]) < TOLERANCE


@pytest.mark.parametrize("prompts", [[[1, 2, 3]] * 3, [[1, 2, 3], [1, 2], [1, 2, 3, 4], [1, 2]]])
def test_equal_prompts_and_prompts_within_others_are_rows_of_their_own(
    tiny: FrozenBase, prompts: list[list[int]]
) -> None:
    model = make(tiny)
    rows = [np.array(prompt, np.int64) for prompt in prompts]
    steps = np.arange(2 * len(rows)).reshape(2, -1).tolist()
    assert follow(Decoder(model, rows, 2), model, rows, steps) < TOLERANCE


def test_rows_that_stay_go_on_as_if_none_had_been_dropped(tiny: FrozenBase) -> None:
    model = make(tiny)
    rows = prompts_of(30, 4, 11, 60, 8, 20)
    decoder = Decoder(model, rows, 4)
    assert follow(decoder, model, rows, [[1, 2, 3, 4, 5, 6]]) < TOLERANCE
    # rows 0, 2 and 3 go, the longest among them: 5 and 4 move to their places, in some order
    order = decoder.keep(np.array([False, True, False, False, True, True]))
    assert sorted(order) == [1, 4, 5]
    assert order[1] == 1
    rows[:] = [rows[i] for i in order]
    decoder.logits = in_full(model, rows)
    assert follow(decoder, model, rows, [[9, 8, 7], [6, 5, 4]]) < TOLERANCE
    order = decoder.keep(np.array([False, False, True]))
    assert order.tolist() == [2]
    rows[:] = [rows[2]]
    decoder.logits = in_full(model, rows)
    assert follow(decoder, model, rows, [[77]]) < TOLERANCE
