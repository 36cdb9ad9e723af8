"""The public reference set: where it is from, and that both objectives vary on it."""

from __future__ import annotations

import hashlib
import json
from collections import Counter

from device_profiles.methods import OBJECTIVES
from edge_client.data.instructions import kit_file
from edge_client.reward.reference import as_lines, draw_reference, load_reference


def kit_rows(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in kit_file(name).read_text("utf-8").splitlines()]


def test_the_file_is_what_its_rule_draws_from_the_kit() -> None:
    drawn = draw_reference(
        {name: kit_rows(f"{name}_preferences.jsonl") for name in OBJECTIVES},
        kit_rows("instructions.jsonl"),
    )
    assert kit_file("reference_responses.jsonl").read_text("utf-8") == as_lines(drawn)


def test_its_hash_is_that_of_the_file() -> None:
    content = kit_file("reference_responses.jsonl").read_bytes()
    assert load_reference().sha256 == hashlib.sha256(content).hexdigest()


def test_good_and_careless_responses_of_either_objective_are_in_it() -> None:
    examples = load_reference().examples
    assert len(examples) == 64
    assert len({e.instruction for e in examples}) == 64
    sides: Counter[str] = Counter()
    for name in OBJECTIVES:
        for row in kit_rows(f"{name}_preferences.jsonl"):
            for side in ("chosen", "rejected"):
                key = (row["instruction"], row[side])
                sides[f"{name} {side}"] += key in {(e.instruction, e.output) for e in examples}
    assert set(sides.values()) == {12}


def test_nothing_held_out_is_in_it() -> None:
    kept = {e.instruction for e in load_reference().examples}
    files = ["instructions.jsonl", *(f"{name}_preferences.jsonl" for name in OBJECTIVES)]
    held_out = {r["instruction"] for f in files for r in kit_rows(f) if r["split"] == "held_out"}
    assert held_out
    assert not kept & held_out
