"""What a judge leaves: its own record, and what it says of each run, as files.

``judge/`` holds the judge of a comparison, ``judge.json`` beside a run's ``run.json`` its word.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from cloud_aggregator.reproduce.fig4 import PlannedRun
from cloud_aggregator.reproduce.folder import folder_of
from cloud_aggregator.run_folder import write_atomically
from device_profiles.errors import InputError
from device_profiles.methods import Objective

_RECORD = "judge.json"

Found = TypeVar("Found", bound=BaseModel)


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class HeadWorth(_Part):
    """What one of the judge's heads is worth on pairs of the judge's half that it has not seen.

    ``longer_wins`` is the accuracy of the rule that the longer response is the better one.
    """

    learned_pairs: int
    pairs: int
    accuracy: float
    longer_wins: float
    calibration_error: float


class JudgeRecord(_Part):
    """``judge/judge.json``: the judge, as a script reads it.

    Attributes:
        sha256: Of its heads' file.
        base: SHA-256 of the trunk's weights.
        pairs: SHA-256 of the pairs that it learned from and is measured on.
        run_pairs: How many pairs of each objective the runs have.
        heads: What each is worth.
    """

    sha256: str
    base: str
    pairs: str
    run_pairs: dict[Objective, int]
    heads: dict[Objective, HeadWorth]


class JudgedClient(_Part):
    """What the judge says of one client's model.

    Attributes:
        helpfulness: Mean score, in deviations from the reference set's mean; and
        harmlessness: likewise.
        tokens: Mean length of its responses.
        ended: Share of them that ended by themselves.
    """

    id: str
    responses: int
    helpfulness: float
    harmlessness: float
    tokens: float
    ended: float


class JudgedMoment(_Part):
    """What it says after so many rounds of alignment: 0 is the end of stage 1."""

    aligned: int
    round: int
    clients: list[JudgedClient]


class JudgedRun(_Part):
    """``judge.json`` of a run; ``rounds`` are those that the run had."""

    schema_version: Literal[1] = 1
    judge: str
    rounds: int
    moments: list[JudgedMoment]


def read_judge(out: Path) -> JudgeRecord | None:
    """Return the judge of a comparison, if it has learned.

    Raises:
        InputError: If its record or its heads are damaged.
    """
    path = _record_path(out)
    if not path.exists():
        return None
    record = _read(path, JudgeRecord)
    heads = heads_path(out)
    if not heads.exists() or hashlib.sha256(heads.read_bytes()).hexdigest() != record.sha256:
        raise InputError(f"{heads} is missing or changed; remove {path.parent} to learn it again")
    return record


def judged_run(out: Path, run: PlannedRun) -> JudgedRun | None:
    """Return what the judge said of a run, if it has.

    Raises:
        InputError: If the file is damaged.
    """
    path = folder_of(out, run).path / _RECORD
    return _read(path, JudgedRun) if path.exists() else None


def write_judged(out: Path, run: PlannedRun, judged: JudgedRun) -> None:
    """Write what a judge said of a run."""
    _write(folder_of(out, run).path / _RECORD, judged)


def write_judge(out: Path, record: JudgeRecord, heads: bytes) -> None:
    """Write a judge: its heads first, so that a record always has them."""
    write_atomically(heads_path(out), heads)
    _write(_record_path(out), record)


def _record_path(out: Path) -> Path:
    return out / "judge" / _RECORD


def heads_path(out: Path) -> Path:
    """Return where a judge's heads are."""
    return out / "judge" / "heads.safetensors"


def _write(path: Path, record: BaseModel) -> None:
    write_atomically(path, record.model_dump_json(indent=1).encode() + b"\n")


def _read(path: Path, kind: type[Found]) -> Found:
    try:
        return kind.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as err:
        raise InputError(f"{path} is damaged; remove it to judge again") from err
