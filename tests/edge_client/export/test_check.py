"""An exported model held against the trained one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_client.data.instructions import load_instructions
from edge_client.data.partition import partition
from edge_client.data.prompts import Encoded, encode_example
from edge_client.export.check import Check, Text, compare, held_out_text
from edge_client.export.personal import Personal, find_in_run
from quantization.base_model import load_base
from quantization.identity import BaseIdentity
from tests.edge_client.export.conftest import CLIENT, MakeRun

CUT = {"clients": 3, "alpha": 0.5, "skew": 1.0, "held_out_share": 0.25, "seed": 4}


class Reader:
    """A model whose logits are written down, for each place of a text."""

    name = "reader"
    positions = 100

    def __init__(self, logits: Sequence[Sequence[float]]) -> None:
        self._logits = np.array(logits, np.float32)
        self.fed: list[list[int]] = []

    def reset(self) -> None:
        """Begin anew."""
        self.fed = []

    def feed(self, tokens: Sequence[int]) -> Any:
        """Return what is written down for the last token."""
        self.fed.append(list(tokens))
        return self._logits[sum(len(piece) for piece in self.fed) - 1]


def test_logits_are_compared_where_a_response_is_predicted() -> None:
    # two tokens of prompt, three of response: predicted from the places 1, 2 and 3
    example = Encoded(tokens=np.array([7, 8, 2, 1, 0]), response_start=2)
    reader = Reader([[9, 9, 9], [0, 0, 1], [0, 4, 1], [1.5, 2, 0], [9, 9, 9]])
    trained = np.array([[0, 0, 1], [0, 4.25, 1], [2, 1.5, 0]], np.float32)
    check = compare(reader, Text(words="a text", examples=[example]), [trained])
    # the largest difference is at the last place, which alone is decided otherwise
    assert check == Check(
        text="a text",
        examples=1,
        tokens=3,
        largest_difference=0.5,
        largest_logit=4.25,
        agreement=2 / 3,
    )
    assert reader.fed == [[7, 8], [2], [1]]  # as in generation, and not the last token


@pytest.mark.parametrize(
    ("difference", "logit", "same"),
    [(1e-4, 0.5, True), (1.1e-4, 0.5, False), (9e-4, 10.0, True), (1.1e-3, 10.0, False)],
)
def test_the_same_means_one_part_in_ten_thousand(
    difference: float, logit: float, same: bool
) -> None:
    check = Check(
        text="", examples=1, tokens=1, largest_difference=difference, largest_logit=logit,
        agreement=1.0,
    )  # fmt: skip
    assert check.same is same


@pytest.fixture
def of_a_file(make_run: MakeRun, tmp_path: Path) -> tuple[Personal, list[int]]:
    """Return a client of a run on a file, and which of its rows the client held out."""
    path = tmp_path / "rows.jsonl"
    rows = [
        {"instruction": f"Say {i}.", "output": f"word {i}", "category": "ab"[i % 2]}
        for i in range(24)
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    data = load_instructions(str(path))
    cut: dict[str, Any] = CUT
    parts = partition(data.examples, kind="category", **cut)
    part = max(parts, key=lambda p: len(p.train))
    personal = replace(
        find_in_run(make_run(), CLIENT),
        settings={**CUT, "data": str(path), "partition": "category"},
        record={
            "examples": len(part.train),
            "held_out_examples": len(part.held_out),
            "categories": part.groups,
        },
        data_sha256=data.sha256,
    )
    return personal, list(part.held_out)


def test_the_client_s_held_out_text_is_found_again(
    of_a_file: tuple[Personal, list[int]], identity: BaseIdentity
) -> None:
    personal, held_out = of_a_file
    tokenizer = load_base(identity).tokenizer
    examples = load_instructions(personal.settings["data"]).examples
    text = held_out_text(personal, tokenizer)
    assert text.words == "the client's held-out text"
    expected = [encode_example(examples[i], tokenizer, 128) for i in held_out]
    assert [e.tokens.tolist() for e in text.examples] == [e.tokens.tolist() for e in expected]


@pytest.mark.parametrize(
    "changes",
    [
        {"data_sha256": "0" * 64},
        {"settings": {}},
        {"record": {"examples": 1000, "held_out_examples": 1, "categories": {}}},
        {"settings": {**CUT, "data": "./nowhere.jsonl", "partition": "category"}},
    ],
)
def test_text_that_is_not_surely_the_client_s_is_not_called_so(
    of_a_file: tuple[Personal, list[int]], identity: BaseIdentity, changes: dict[str, Any]
) -> None:
    personal = replace(of_a_file[0], **changes)
    text = held_out_text(personal, load_base(identity).tokenizer)
    assert text.words == "the kit's held-out text"
    assert len(text.examples) == 8
