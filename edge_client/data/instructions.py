"""Instruction data: Alpaca rows from a file, the kit or the hub, each checked.

A row has ``instruction``, ``input`` (may be empty) and ``output``; ``category`` and ``split``
(``train`` or ``held_out``) where the source has them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from device_profiles.errors import InputError
from quantization.errors import HubUnavailableError, MissingExtraError

KIT = "kit"
ALPACA = "alpaca"
ALPACA_HUB_ID = "tatsu-lab/alpaca"
MAX_BROKEN_SHARE = 0.05
_TOLERATED_BROKEN_ROWS = 3  # in a file so small that the share means nothing

Text = Annotated[str, Field(max_length=200_000)]
Split = Literal["train", "held_out"]
NumberedRows = Iterable[tuple[int, object]]
Row = TypeVar("Row", bound=BaseModel)


class Example(BaseModel):
    """One instruction and its response."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    instruction: Annotated[Text, Field(min_length=1, pattern=r"\S")]
    input: Text = ""
    output: Annotated[Text, Field(min_length=1, pattern=r"\S")]
    category: Annotated[str, Field(max_length=200)] | None = None
    split: Split | None = None


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
        rows: NumberedRows = enumerate(hub_rows(ALPACA_HUB_ID, "--data"), 1)
        unit = "row"
    else:
        path = kit_file("instructions.jsonl") if source == KIT else Path(source)
        rows, unit = file_rows(path, source, "'kit' or 'alpaca'")
    examples, broken = keep_sound(rows, _checked, source=source, unit=unit)
    return Dataset(source=source, examples=examples, broken=broken)


def file_rows(path: Path, source: str, choices: str) -> tuple[NumberedRows, str]:
    """Return the numbered rows of a JSON or JSONL file, and what they are numbered in.

    Args:
        path: Of the file.
        source: What to call it in an error.
        choices: What may be named instead of a file, for an error.

    Returns:
        Rows with their number from 1, an error in place of a line that is no JSON; and ``row``
        for a JSON list or ``line`` for JSONL.

    Raises:
        InputError: If the file cannot be read, or is a list that is no JSON.
    """
    text = read_text(path, f"a JSON or JSONL file, {choices}")
    if text.lstrip().startswith("["):
        return enumerate(_json_list(text, source), 1), "row"
    return json_lines(text), "line"


def read_text(path: Path, wanted: str) -> str:
    """Return the text of a UTF-8 file, without its byte order mark.

    Raises:
        InputError: If it cannot be read; it ends by saying what is ``wanted``.
    """
    try:
        return path.expanduser().read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as err:
        raise InputError(f"data file {path} is not UTF-8 text (byte {err.start})") from err
    except (OSError, RuntimeError) as err:  # RuntimeError: the ~ of an unknown user
        reason = getattr(err, "strerror", None) or err
        raise InputError(f"data file {path}: {reason}; give {wanted}") from err


def _json_list(text: str, source: str) -> list[object]:
    try:
        rows: list[object] = json.loads(text)
    except (ValueError, RecursionError) as err:
        raise InputError(f"data file {source} is no valid JSON: {err}") from err
    return rows


def json_lines(text: str) -> Iterator[tuple[int, object]]:
    """Yield each line that is not empty, with its number: as an object, or as what is wrong."""
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as err:
                yield number, err


def hub_rows(hub_id: str, option: str, **settings: str) -> Iterable[object]:
    """Return the training rows of a data set on the hub.

    Args:
        hub_id: Its name there.
        option: Which would take a file instead, for an error.
        settings: More that ``datasets.load_dataset`` is to know.

    Raises:
        HubUnavailableError: If the hub does not answer.
        MissingExtraError: If its client is not installed.
    """
    try:
        from datasets import load_dataset
    except ImportError as err:
        raise MissingExtraError(
            f"{hub_id} is read by the package datasets, which is not installed: "
            f"`pip install 'pwff[hub]'`, or give a file with {option} FILE"
        ) from err
    try:
        rows: Iterable[object] = load_dataset(hub_id, split="train", **settings)
    except Exception as err:  # the hub's clients have no error class in common
        raise HubUnavailableError(
            f"{hub_id} could not be read from the hub ({type(err).__name__}); "
            f"connect to it, or give a file with {option} FILE, or use the kit"
        ) from err
    return rows


def keep_sound(
    rows: NumberedRows, check: Callable[[object], Row | str], *, source: str, unit: str
) -> tuple[list[Row], list[tuple[int, str]]]:
    """Return the sound rows, and the number of each other one with what is wrong.

    Args:
        rows: With their numbers.
        check: Turns a row (or an error in its place) into a record or into what is wrong.
        source: Where they are from, for an error.
        unit: What they are numbered in: ``row`` or ``line``.

    Raises:
        InputError: If there is no row, or more than ``MAX_BROKEN_SHARE`` of them are broken.
    """
    sound: list[Row] = []
    broken: list[tuple[int, str]] = []
    for number, row in rows:
        checked = f"no valid JSON: {row}" if isinstance(row, Exception) else check(row)
        if isinstance(checked, str):
            broken.append((number, checked))
        else:
            sound.append(checked)
    total = len(sound) + len(broken)
    if not total:
        raise InputError(f"data {source} holds no row; give at least one example a client")
    tolerated = max(_TOLERATED_BROKEN_ROWS, MAX_BROKEN_SHARE * total)
    if not sound or len(broken) > tolerated:
        number, reason = broken[0]
        raise InputError(
            f"data {source}: {len(broken)} of {total} rows are broken, more than "
            f"{MAX_BROKEN_SHARE:.0%} (first: {unit} {number}: {reason}); mend or remove them "
            "(a file is a JSON list of objects, or JSONL with one object a line)"
        )
    return sound, broken


def what_is_wrong(err: ValidationError) -> str:
    """Return the first field that a check found wrong, and how."""
    first = err.errors(include_url=False)[0]
    return ": ".join([*map(str, first["loc"]), first["msg"]])


def _checked(row: object) -> Example | str:
    """Return the row as an example, or what is wrong with it."""
    try:
        return Example.model_validate(row)
    except ValidationError as err:
        return what_is_wrong(err)
