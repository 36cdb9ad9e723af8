"""Instruction data: Alpaca rows from a file, the kit or the hub, each checked.

A row has ``instruction``, ``input`` (may be empty) and ``output``; ``category`` and ``split``
(``train`` or ``held_out``) where the source has them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from device_profiles.errors import InputError
from quantization.errors import HubUnavailableError, MissingExtraError

KIT = "kit"
ALPACA = "alpaca"
ALPACA_HUB_ID = "tatsu-lab/alpaca"
MAX_BROKEN_SHARE = 0.05
_TOLERATED_BROKEN_ROWS = 3  # in a file so small that the share means nothing

Text = Annotated[str, Field(max_length=200_000)]


class Example(BaseModel):
    """One instruction and its response."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    instruction: Annotated[Text, Field(min_length=1, pattern=r"\S")]
    input: Text = ""
    output: Annotated[Text, Field(min_length=1, pattern=r"\S")]
    category: Annotated[str, Field(max_length=200)] | None = None
    split: Literal["train", "held_out"] | None = None


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """What was read.

    Attributes:
        source: As the user wrote it.
        sha256: Of the examples in their order.
        broken: (line of a JSONL file, else row, from 1; what is wrong) of each row left out.
    """

    source: str
    examples: list[Example]
    broken: list[tuple[int, str]] = field(default_factory=list)

    @property
    def sha256(self) -> str:
        """Hash of the examples in their order."""
        digest = hashlib.sha256()
        for example in self.examples:
            digest.update(example.model_dump_json().encode())
        return digest.hexdigest()


def kit_file(name: str) -> Path:
    """Return the path of a file of the kit."""
    return Path(str(resources.files("edge_client") / "kit" / name))


def load_instructions(source: str) -> Dataset:
    """Return the instruction data that ``source`` names: ``kit``, ``alpaca`` (hub) or a file.

    Raises:
        InputError: If the file is missing or malformed, or too many of its rows are broken.
        HubUnavailableError: If the hub does not answer.
    """
    if source == ALPACA:
        return _check_rows(enumerate(_hub_rows(), 1), source, "row")
    text = _read(kit_file("instructions.jsonl") if source == KIT else Path(source))
    if text.lstrip().startswith("["):
        return _check_rows(enumerate(_json_list(text, source), 1), source, "row")
    return _check_rows(_json_lines(text), source, "line")


def _read(path: Path) -> str:
    try:
        return path.expanduser().read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as err:
        raise InputError(f"data file {path} is not UTF-8 text (byte {err.start})") from err
    except (OSError, RuntimeError) as err:  # RuntimeError: the ~ of an unknown user
        reason = getattr(err, "strerror", None) or err
        raise InputError(
            f"data file {path}: {reason}; give a JSON or JSONL file, 'kit' or 'alpaca'"
        ) from err


def _json_list(text: str, source: str) -> list[object]:
    try:
        rows: list[object] = json.loads(text)
    except (ValueError, RecursionError) as err:
        raise InputError(f"data file {source} is no valid JSON: {err}") from err
    return rows


def _json_lines(text: str) -> Iterator[tuple[int, object]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as err:
                yield number, err


def _hub_rows() -> Iterable[object]:
    try:
        from datasets import load_dataset
    except ImportError as err:
        raise MissingExtraError(
            f"{ALPACA_HUB_ID} is read by the package datasets, which is not installed: "
            "`pip install 'pwff[hub]'`, or give a file with --data FILE"
        ) from err
    try:
        rows: Iterable[object] = load_dataset(ALPACA_HUB_ID, split="train")
    except Exception as err:  # the hub's clients have no error class in common
        raise HubUnavailableError(
            f"{ALPACA_HUB_ID} could not be read from the hub ({type(err).__name__}); "
            "connect to it, or give a file with --data FILE, or use the kit"
        ) from err
    return rows


def _check_rows(rows: Iterable[tuple[int, object]], source: str, unit: str) -> Dataset:
    """Keep the sound rows, numbered in ``unit`` (row or line), and list the others."""
    examples: list[Example] = []
    broken: list[tuple[int, str]] = []
    for number, row in rows:
        checked = _checked(row)
        if isinstance(checked, Example):
            examples.append(checked)
        else:
            broken.append((number, checked))
    total = len(examples) + len(broken)
    if not total:
        raise InputError(f"data {source} holds no row; give at least one example a client")
    tolerated = max(_TOLERATED_BROKEN_ROWS, MAX_BROKEN_SHARE * total)
    if not examples or len(broken) > tolerated:
        number, reason = broken[0]
        raise InputError(
            f"data {source}: {len(broken)} of {total} rows are broken, more than "
            f"{MAX_BROKEN_SHARE:.0%} (first: {unit} {number}: {reason}); mend or remove them "
            "(a file is a JSON list of objects, or JSONL with one object a line)"
        )
    return Dataset(source=source, examples=examples, broken=broken)


def _checked(row: object) -> Example | str:
    """Return the row as an example, or what is wrong with it."""
    if isinstance(row, Exception):
        return f"no valid JSON: {row}"
    try:
        return Example.model_validate(row)
    except ValidationError as err:
        first = err.errors(include_url=False)[0]
        return ": ".join([*map(str, first["loc"]), first["msg"]])
