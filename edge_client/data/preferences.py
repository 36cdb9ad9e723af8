"""Preference data: pairs of responses of which one was chosen, from a file, the kit or the hub.

A set is of one objective. It is divided by prompt: all pairs of a prompt are on one client, and
on one side of the split.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from device_profiles import seeds
from device_profiles.config_files import choose
from device_profiles.errors import InputError
from device_profiles.methods import OBJECTIVES
from edge_client.data.instructions import (
    KIT,
    NumberedRows,
    Split,
    Text,
    file_rows,
    hub_rows,
    keep_sound,
    kit_file,
    what_is_wrong,
)
from edge_client.data.preference_layouts import own_row

HH_RLHF_HUB_ID = "Anthropic/hh-rlhf"
PKU_SAFERLHF_HUB_ID = "PKU-Alignment/PKU-SafeRLHF"

#: What else ``datasets.load_dataset`` is told, for each hub id and objective.
HUB: dict[str, dict[str, dict[str, str]]] = {
    HH_RLHF_HUB_ID: {
        "helpfulness": {"data_dir": "helpful-base"},
        "harmlessness": {"data_dir": "harmless-base"},
    },
    PKU_SAFERLHF_HUB_ID: {"helpfulness": {}, "harmlessness": {}},
}

Filled = Annotated[Text, Field(min_length=1, pattern=r"\S")]


class Pair(BaseModel):
    """One prompt and two different responses to it."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    instruction: Filled
    input: Text = ""
    chosen: Filled
    rejected: Filled
    split: Split | None = None

    @property
    def prompt(self) -> str:
        """What is asked, for comparing: without regard to case and spacing."""
        return prompt_key(self.instruction, self.input)


@dataclass(frozen=True, kw_only=True)
class PreferenceData:
    """What was read.

    Attributes:
        source: As the user wrote it.
        objective: For which the pairs were ranked.
        broken: (line of a JSONL file, else row, from 1; what is wrong) of each row left out.
    """

    source: str
    objective: str
    pairs: list[Pair]
    broken: list[tuple[int, str]] = field(default_factory=list)

    @property
    def sha256(self) -> str:
        """Hash of the pairs in their order."""
        digest = hashlib.sha256()
        for pair in self.pairs:
            digest.update(pair.model_dump_json().encode())
        return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class PairPart:
    """One client's pairs, as ascending indices into the data's pairs.

    Attributes:
        train: What its reward model learns from, at least 1.
        held_out: What it is measured on, at least 1, of other prompts.
    """

    train: tuple[int, ...]
    held_out: tuple[int, ...]


def prompt_key(instruction: str, context: str = "") -> str:
    """Return what makes two prompts the same: their words, without regard to case and spacing."""
    return "\n".join(" ".join(text.lower().split()) for text in (instruction, context))


def load_preferences(source: str, objective: str) -> PreferenceData:
    """Return the preference data that ``source`` names.

    Args:
        source: ``kit``, ``Anthropic/hh-rlhf``, ``PKU-Alignment/PKU-SafeRLHF`` (hub), or a JSON or
            JSONL file in the layout of one of them.
        objective: ``helpfulness`` or ``harmlessness``: which file of the kit, which part of the
            hub's data, which verdict of a row that has both.

    Raises:
        InputError: If the file is missing or malformed, or too many of its rows are broken.
        HubUnavailableError: If the hub does not answer.
    """
    choose("objective", objective, OBJECTIVES)
    if source in HUB:
        rows: NumberedRows = enumerate(
            hub_rows(source, f"--{objective}", **HUB[source][objective]), 1
        )
        unit = "row"
    else:
        path = kit_file(f"{objective}_preferences.jsonl") if source == KIT else Path(source)
        rows, unit = file_rows(path, source, f"'kit', {' or '.join(map(repr, HUB))}")
    pairs, broken = keep_sound(rows, lambda row: _checked(row, objective), source=source, unit=unit)
    return PreferenceData(source=source, objective=objective, pairs=pairs, broken=broken)


def _checked(row: object, objective: str) -> Pair | str:
    """Return the row as a pair, or what is wrong with it."""
    found = own_row(row, objective)
    if isinstance(found, str):
        return found
    try:
        pair = Pair.model_validate(found)
    except ValidationError as err:
        return what_is_wrong(err)
    if pair.chosen.split() == pair.rejected.split():
        return "chosen and rejected are equal; one must be better"
    return pair


def partition_pairs(
    pairs: Sequence[Pair], *, clients: int, held_out_share: float = 0.2, seed: int, objective: str
) -> list[PairPart]:
    """Return one part for each client; every pair is in exactly one place, with its whole prompt.

    Prompts are dealt one by one in a random order, so that two clients differ by at most one
    prompt on either side. Where the pairs carry a ``split``, it is obeyed; where none does, a
    random share of all prompts is held out, at least one a client.

    Args:
        pairs: Of one objective.
        clients: How many, >= 1.
        held_out_share: Share of the prompts to hold out where no pair carries a ``split``, in
            (0, 1).
        seed: The same seed gives the same parts.
        objective: Two objectives are dealt independently of each other.

    Raises:
        InputError: If an argument is out of its range, the prompts are too few, only some pairs
            carry a split, or the pairs of one prompt carry two.
    """
    _check(clients, held_out_share)
    rng = seeds.stream(seed, "preferences", choose("objective", objective, OBJECTIVES))
    prompts: dict[str, list[int]] = {}
    for index, pair in enumerate(pairs):
        prompts.setdefault(pair.prompt, []).append(index)
    order = [list(prompts.values())[i] for i in rng.permutation(len(prompts))]
    if any(pair.split for pair in pairs):
        train, held_out = _marked(pairs, order, clients)
    else:
        if len(order) < 2 * clients:
            raise InputError(
                f"{clients} clients need at least {2 * clients} prompts with preference pairs, one "
                f"to learn from and one held out each, and the {objective} data has {len(order)}; "
                "use fewer clients or more data"
            )
        count = min(max(clients, round(held_out_share * len(order))), len(order) - clients)
        held_out, train = order[:count], order[count:]
    return [
        PairPart(train=_flat(train[i::clients]), held_out=_flat(held_out[i::clients]))
        for i in range(clients)
    ]


def _flat(prompts: Iterable[Sequence[int]]) -> tuple[int, ...]:
    return tuple(sorted(index for prompt in prompts for index in prompt))


def _marked(
    pairs: Sequence[Pair], order: list[list[int]], clients: int
) -> tuple[list[list[int]], list[list[int]]]:
    """Return the prompts marked ``train`` and those marked ``held_out``, in their order."""
    unmarked = sum(pair.split is None for pair in pairs)
    if unmarked:
        raise InputError(
            f"{unmarked} of {len(pairs)} preference pairs carry no split and the others do; "
            "mark every pair 'train' or 'held_out', or none"
        )
    sides: dict[str | None, list[list[int]]] = {"train": [], "held_out": []}
    for prompt in order:
        names = {pairs[index].split for index in prompt}
        if len(names) > 1:
            raise InputError(
                f"pairs of the prompt {pairs[prompt[0]].instruction!r:.60} are marked train and "
                "held_out; a prompt is on one side: mark them alike"
            )
        sides[names.pop()].append(prompt)
    for name, side in sides.items():
        if len(side) < clients:
            raise InputError(
                f"{clients} clients need at least {clients} prompts with preference pairs marked "
                f"{name}, and the data has {len(side)}; use fewer clients or more data"
            )
    return sides["train"], sides["held_out"]


def _check(clients: int, held_out_share: float) -> None:
    for name, value, inside, bound in (
        ("clients", clients, clients >= 1, "at least 1"),
        ("held_out_share", held_out_share, 0 < held_out_share < 1, "between 0 and 1 (0.2, say)"),
    ):
        if not inside:
            raise InputError(f"{name} = {value} is out of range; it must be {bound}")
