"""Features of a bare trunk outlive the process that read them, and nothing else passes for them."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from edge_client.data.prompts import Encoded
from edge_client.reward.judging import Judging
from edge_client.reward.kept_features import KeptFeatures
from messaging.layout import Tensors
from quantization.frozen_gpt2 import FrozenBase, load_frozen
from quantization.identity import identify

NONE: Tensors = {}


@pytest.fixture(scope="module")
def base() -> FrozenBase:
    return load_frozen(identify("mini"), "fp32")


def example(*tokens: int) -> Encoded:
    return Encoded(tokens=np.array(tokens, np.int64), response_start=2)


EXAMPLES = [example(5, 6, 7, 8), example(9, 10, 11)]


def read(judging: Judging, examples: list[Encoded]) -> torch.Tensor:
    return judging.response_features(NONE, "helpfulness", examples)


def test_the_next_process_has_the_same_bits_without_the_trunk(
    base: FrozenBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = read(Judging(base, kept=tmp_path), EXAMPLES)
    assert torch.equal(first, read(Judging(base), EXAMPLES))
    again = Judging(base, kept=tmp_path)
    monkeypatch.setattr(again, "trunk", None)
    assert torch.equal(read(again, EXAMPLES), first)


@pytest.mark.parametrize(
    "others",
    [
        EXAMPLES[::-1],
        EXAMPLES[:1],
        [*EXAMPLES, example(1, 2, 3)],
        [EXAMPLES[0], example(9, 10, 12)],
        [EXAMPLES[0], Encoded(tokens=EXAMPLES[1].tokens, response_start=1)],
        [example(5, 6, 7, 8, 9), example(10, 11, 12)],
    ],
    ids=["order", "fewer", "more", "token", "start", "boundary"],
)
def test_other_examples_are_read_for_themselves(
    others: list[Encoded], base: FrozenBase, tmp_path: Path
) -> None:
    judging = Judging(base, kept=tmp_path)
    read(judging, EXAMPLES)
    assert torch.equal(read(judging, others), read(Judging(base), others))
    assert len(list(tmp_path.iterdir())) == 2


def test_another_precision_and_another_number_of_threads_are_read_for_themselves(
    base: FrozenBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read(Judging(base, kept=tmp_path), EXAMPLES)
    coarse = load_frozen(identify("mini"), "int8")
    assert torch.equal(
        read(Judging(coarse, kept=tmp_path), EXAMPLES), read(Judging(coarse), EXAMPLES)
    )
    monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
    read(Judging(base, kept=tmp_path), EXAMPLES)
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("damage", ["cut", "shape", "name", "infinite", "type"])
def test_what_is_damaged_is_read_again(damage: str, base: FrozenBase, tmp_path: Path) -> None:
    wanted = read(Judging(base, kept=tmp_path), EXAMPLES)
    (path,) = tmp_path.iterdir()
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-4])
    else:
        spoilt = {
            "shape": {"features": wanted[:1].clone()},
            "name": {"other": wanted},
            "infinite": {"features": wanted * float("inf")},
            "type": {"features": wanted.double()},
        }[damage]
        save_file(spoilt, path)
    assert torch.equal(read(Judging(base, kept=tmp_path), EXAMPLES), wanted)
    assert torch.equal(load_file(path)["features"], wanted)


def test_a_trunk_with_adapters_is_always_read(
    base: FrozenBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judging = Judging(base, adapter_size=4, kept=tmp_path)
    monkeypatch.setattr(judging, "trunk_of", lambda _tensors, _objective: judging.trunk)
    read(judging, EXAMPLES)
    assert not list(tmp_path.iterdir())


def test_two_processes_may_keep_the_same_at_once(base: FrozenBase, tmp_path: Path) -> None:
    kept = [KeptFeatures(tmp_path), KeptFeatures(tmp_path)]

    def slower() -> torch.Tensor:
        return kept[1].of(base, EXAMPLES, lambda: torch.ones(2, 3))

    assert kept[0].of(base, EXAMPLES, slower).eq(1).all()
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]


def test_a_disk_that_takes_nothing_is_told_and_costs_no_more(
    base: FrozenBase, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    judging = Judging(base, kept=tmp_path / "file" / "below")
    assert torch.equal(read(judging, EXAMPLES), read(Judging(base), EXAMPLES))
    assert "is not kept in" in caplog.text


def test_another_head_count_is_read_for_itself(base: FrozenBase, tmp_path: Path) -> None:
    """The checkpoint's weights are the same; what is computed with them is not."""
    read(Judging(base, kept=tmp_path), EXAMPLES)
    other = replace(base, weights=replace(base.weights, heads=base.weights.heads * 2))
    assert torch.equal(
        read(Judging(other, kept=tmp_path), EXAMPLES), read(Judging(other), EXAMPLES)
    )
    assert len(list(tmp_path.iterdir())) == 2


def test_what_was_not_asked_for_the_longest_goes_when_the_folder_is_full(
    base: FrozenBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[int] = []

    def asked(kept: KeptFeatures, token: int) -> None:
        def reading() -> torch.Tensor:
            reads.append(token)
            return torch.full((1, 256), float(token))

        kept.of(base, [example(5, 6, token)], reading)
        for number, path in enumerate(sorted(tmp_path.iterdir(), key=lambda p: p.stat().st_mtime)):
            os.utime(path, (number, number))  # a clock that ticks between any two files

    kept = KeptFeatures(tmp_path)
    asked(kept, 7)
    one = next(tmp_path.iterdir()).stat().st_size
    monkeypatch.setattr("edge_client.reward.kept_features._MOST_BYTES", 2 * one)
    (tmp_path / "model.safetensors").write_bytes(b"the user's")
    for token in (8, 7, 9, 7, 8):  # 9 takes the place of 8, and 8 that of 9
        asked(kept, token)
    assert reads == [7, 8, 9, 8]
    assert len([*tmp_path.iterdir()]) == 3
    assert (tmp_path / "model.safetensors").exists()
