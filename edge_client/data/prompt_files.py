"""Prompts without responses: from the kit, a JSON or JSONL file, or a text file."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from device_profiles.seeds import stream
from edge_client.data.instructions import (
    KIT,
    NumberedRows,
    Split,
    Text,
    file_rows,
    keep_sound,
    kit_file,
    read_text,
    what_is_wrong,
)
from edge_client.data.preferences import Filled, prompt_key

_JSON = (".json", ".jsonl")


class Prompt(BaseModel):
    """What a model is asked; the split of its pair where the source names one."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    instruction: Filled
    input: Text = ""
    split: Split | None = None

    @property
    def key(self) -> str:
        """What makes two prompts the same."""
        return prompt_key(self.instruction, self.input)


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """What was read.

    Attributes:
        prompts: Each once, in an order that belongs to the seed.
        broken: (line or row, from 1; what is wrong) of each row left out.
    """

    prompts: list[Prompt]
    broken: list[tuple[int, str]] = field(default_factory=list)


def load_prompts(source: str, objective: str, seed: int) -> Prompts:
    """Return the prompts that ``source`` names, in an order that belongs to the seed.

    Args:
        source: ``kit`` (the prompts of the kit's pairs of that objective); a ``.json`` or
            ``.jsonl`` file of rows with ``instruction`` and perhaps ``input`` and ``split``; or
            any other text file, a prompt on each line.
        objective: ``helpfulness`` or ``harmlessness``.
        seed: Of the order, so that two devices do not judge the same first prompts.

    Raises:
        InputError: If the file is missing or malformed, or too many of its rows are broken.
    """
    path = kit_file(f"{objective}_preferences.jsonl") if source == KIT else Path(source)
    if path.suffix.lower() in _JSON:
        rows, unit = file_rows(path, source, "a text file with a prompt on each line, or 'kit'")
    else:
        rows, unit = _lines(path), "line"
    found, broken = keep_sound(rows, _checked, source=source, unit=unit)
    once = list({prompt.key: prompt for prompt in reversed(found)}.values())[::-1]
    order = stream(seed, "prefer", "order").permutation(len(once))
    return Prompts(prompts=[once[i] for i in order], broken=broken)


def _lines(path: Path) -> NumberedRows:
    text = read_text(path, "a JSON, JSONL or text file, or 'kit'")
    return [
        (number, {"instruction": line.strip()})
        for number, line in enumerate(text.split("\n"), 1)
        if line.strip()
    ]


def _checked(row: object) -> Prompt | str:
    try:
        return Prompt.model_validate(row)
    except ValidationError as err:
        return what_is_wrong(err)
