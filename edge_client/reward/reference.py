"""The public reference set: responses, good and careless, by which scores are put on one scale.

It comes with the project, is the same on every device, and its hash travels with a run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from edge_client.data.instructions import Example, kit_file
from messaging.protocol import encoder_mark

REFERENCE_FILE = "reference_responses.jsonl"
PREFERENCE_ROWS = 12  # of each side of each objective
INSTRUCTION_ROWS = 2  # of each category

Row = Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Reference:
    """The reference set.

    Attributes:
        examples: Each a prompt and a response.
        sha256: Of the file.
    """

    examples: list[Example]
    sha256: str


def load_reference() -> Reference:
    """Return the reference set of the kit."""
    content = kit_file(REFERENCE_FILE).read_bytes()
    examples = [Example.model_validate_json(line) for line in content.splitlines()]
    return Reference(examples=examples, sha256=hashlib.sha256(content).hexdigest())


def scoring(trunk_precision: str, encoder_sha256: str | None = None) -> str:
    """Return what a device's record says of how it scores: what is the same on all of a run.

    That is the trunk's precision, the beginning of an encoder's hash where there is one, and the
    reference set's.
    """
    encoder = "" if encoder_sha256 is None else f"+{encoder_mark(encoder_sha256)}"
    return f"{trunk_precision}{encoder}:{load_reference().sha256}"


def draw_reference(
    preferences: Mapping[str, Iterable[Row]], instructions: Iterable[Row]
) -> list[dict[str, str]]:
    """Return the rows of the reference set: how the kit's file was made of the kit's other files.

    Of each objective's training pairs, in the order of the SHA-256 of their instructions, the first
    12 give their chosen and the next 12 their rejected side; of each category's training
    instructions, in the same order, the first 2 give their output.

    Args:
        preferences: By objective: instruction, chosen, rejected, split.
        instructions: instruction, input, output, category, split.
    """
    drawn: list[dict[str, str]] = []
    for pairs in preferences.values():
        order = _shuffled(pairs)
        for side, rows in (
            ("chosen", order[:PREFERENCE_ROWS]),
            ("rejected", order[PREFERENCE_ROWS : 2 * PREFERENCE_ROWS]),
        ):
            drawn += [
                {"instruction": r["instruction"], "input": "", "output": r[side]} for r in rows
            ]
    taken: dict[str, int] = {}
    for row in _shuffled(instructions):
        taken[row["category"]] = taken.get(row["category"], 0) + 1
        if taken[row["category"]] <= INSTRUCTION_ROWS:
            drawn.append({key: row[key] for key in ("instruction", "input", "output")})
    return drawn


def as_lines(rows: Iterable[Row]) -> str:
    """Return rows as the text of a JSONL file."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _shuffled(rows: Iterable[Row]) -> list[Row]:
    """Return the training rows in the order of their instructions' hashes."""
    train = [row for row in rows if row["split"] == "train"]
    return sorted(train, key=lambda row: hashlib.sha256(row["instruction"].encode()).digest())
