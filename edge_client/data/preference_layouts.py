"""Layouts of preference data: a row of each becomes a row of the project's own.

A layout is recognised by the fields of a row. Own: ``instruction``, ``input`` (may be missing),
``chosen``, ``rejected``. HH-RLHF: two whole transcripts that share all but the last answer.
PKU-SafeRLHF: a prompt, two responses and, per objective, which of them is better.
Sources: Bai et al. 2022 (arXiv 2204.05862); Ji et al. 2024 (arXiv 2406.15513).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Fields = Mapping[str, Any]

_HUMAN = "\n\nHuman:"
_ASSISTANT = "\n\nAssistant:"
_BETTER = {"helpfulness": "better_response_id", "harmlessness": "safer_response_id"}


def own_row(row: object, objective: str) -> dict[str, Any] | str:
    """Return a row with ``instruction``, ``chosen`` and ``rejected``, or what is wrong with it.

    Args:
        row: As it was read; its values are not checked further than the layout needs.
        objective: For which the pair is to be ranked.
    """
    if not isinstance(row, Mapping):
        return f"a {type(row).__name__} in place of an object with fields"
    for fields, convert in _LAYOUTS:
        if all(field in row for field in fields):
            return convert(row, objective)
    return (
        f"the fields {', '.join(map(str, row)) or '(none)'} are of no known layout; known are "
        + "; ".join(", ".join(fields) for fields, _ in _LAYOUTS)
    )


def _own(row: Fields, objective: str) -> dict[str, Any] | str:
    ranked = row.get("objective")
    if ranked is not None and ranked != objective:
        return f"objective: the pair was ranked for {ranked}, and {objective} is asked for"
    return dict(row)


def _hh_rlhf(row: Fields, objective: str) -> dict[str, Any] | str:
    """Take the last answers apart from the dialogue before them.

    A dialogue of one turn becomes its question alone; of a longer one the whole transcript up to
    the last answer is the instruction.
    """
    del objective  # whoever made the file chose by it
    parts: list[tuple[str, str]] = []
    for side in ("chosen", "rejected"):
        text = row[side]
        if not isinstance(text, str) or _HUMAN not in f"\n\n{text.lstrip()}":
            return f"{side}: no transcript with a turn 'Human:', and the row has no instruction"
        before, turn, answer = text.rpartition(_ASSISTANT)
        if not turn or _HUMAN in answer:
            return f"{side}: the transcript does not end with an answer of 'Assistant:'"
        parts.append((before.strip(), answer.strip()))
    (dialogue, chosen), (other, rejected) = parts
    if dialogue != other:
        return "chosen and rejected differ before the last answer"
    alone = _ASSISTANT not in dialogue and f"\n\n{dialogue}".count(_HUMAN) == 1
    instruction = dialogue.removeprefix("Human:").strip() if alone else dialogue
    return {"instruction": instruction, "chosen": chosen, "rejected": rejected}


def _pku_saferlhf(row: Fields, objective: str) -> dict[str, Any] | str:
    field = _BETTER[objective]
    better = row.get(field)
    if type(better) is not int or better not in (0, 1):
        return f"{field}: {better!r:.40} is neither 0 nor 1"
    return {
        "instruction": row["prompt"],
        "chosen": row[f"response_{better}"],
        "rejected": row[f"response_{1 - better}"],
    }


# Tried in this order: the first whose fields a row has.
_LAYOUTS: list[tuple[tuple[str, ...], Callable[[Fields, str], dict[str, Any] | str]]] = [
    (("instruction", "chosen", "rejected"), _own),
    (("prompt", "response_0", "response_1"), _pku_saferlhf),
    (("chosen", "rejected"), _hh_rlhf),
]
