"""The folder of a comparison: its settings in ``fig4.toml`` (or so), its runs below ``runs/``.

A folder remembers what it compares, so that going on needs nothing but its name.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import tomli_w

from cloud_aggregator.experiment import Positive
from cloud_aggregator.records import RunRecord
from cloud_aggregator.reproduce.fig4 import QUICK, Common, PlannedRun, Settings
from cloud_aggregator.run_folder import RunFolder, read_record, write_atomically
from device_profiles.config_files import Config, check, load
from device_profiles.errors import InputError
from quantization.identity import identify


class Remembered(Config):
    """What a folder holds about itself; ``width`` is that of the base that learns."""

    reproduces: str
    width: Positive
    settings: Common


class Comparison(Remembered):
    """What ``fig4.toml`` holds."""

    reproduces: Literal["fig4"] = "fig4"
    settings: Settings


Kept = TypeVar("Kept", bound=Remembered)


@dataclass(frozen=True, kw_only=True)
class Kind(Generic[Kept]):
    """One of the reproductions.

    Attributes:
        name: Of the command, and of the file that a folder is known by.
        remembered: What that file holds.
        settings: What may be given.
        quick: What ``--quick`` sets where nothing else is said.
    """

    name: str
    remembered: type[Kept]
    settings: type[Common]
    quick: dict[str, Any]


FIG4 = Kind(name="fig4", remembered=Comparison, settings=Settings, quick=QUICK)


def settle(
    out: Path, given: dict[str, Any], *, quick: bool = False, render_only: bool = False
) -> Comparison:
    """Return what is compared in ``out`` as Fig. 4; see ``take_up``."""
    return take_up(FIG4, out, given, quick=quick, render_only=render_only)


def take_up(
    kind: Kind[Kept],
    out: Path,
    given: dict[str, Any],
    *,
    quick: bool = False,
    render_only: bool = False,
) -> Kept:
    """Return what is compared in ``out``: what is given, else what the folder says, else defaults.

    Args:
        kind: What is reproduced.
        out: A folder of a comparison, or one that is empty or not there yet.
        given: Settings by name.
        quick: Take the quick ones by default.
        render_only: Refuse a folder that holds no comparison yet.

    Raises:
        InputError: If the folder holds something else, or a setting is not usable.
        BaseModelError: If the base is not usable.
    """
    kept = _kept(kind, out)
    if kept is None and render_only:
        raise InputError(f"{out} holds no comparison to render; leave --render-only out to run one")
    if kept is not None and quick and not kept.settings.quick:
        raise InputError(
            f"{out} holds a full comparison, which --quick would write over; name another --out"
        )
    before = kept.settings.model_dump() if kept else kind.quick if quick else {}
    settings = check(kind.settings, {**before, **given}, "options")
    if kept is not None and kept.settings.model == settings.model:
        return kept.model_copy(update={"settings": settings})
    width = identify(settings.model).shape.width
    if kept is not None:
        return kept.model_copy(update={"settings": settings, "width": width})
    return kind.remembered(reproduces=kind.name, width=width, settings=settings)


def keep(out: Path, comparison: Remembered) -> None:
    """Write ``fig4.toml``, or what the folder of another reproduction is known by.

    Raises:
        DiskFullError: If there is no room.
        InputError: If the folder cannot be written.
    """
    text = tomli_w.dumps(comparison.model_dump(mode="json", exclude_none=True))
    write_atomically(out / f"{comparison.reproduces}.toml", text.encode())


def folder_of(out: Path, run: PlannedRun) -> RunFolder:
    """Return the folder of a run of the comparison in ``out``."""
    return RunFolder(out / "runs" / run.name)


def record_of(out: Path, run: PlannedRun) -> RunRecord | None:
    """Return a run's record as far as it is there.

    Raises:
        InputError: If it is damaged.
    """
    folder = folder_of(out, run)
    return read_record(folder.path) if folder.record_path.exists() else None


def rounds_left(run: PlannedRun, record: RunRecord | None) -> int:
    """Return how many rounds of a run are still to do; none where one was taken back at its end."""
    done = len(record.rounds) if record else 0
    if record and record.status == "done" and record.rounds and record.rounds[-1].taken_back:
        return 0
    return max(0, run.experiment.total_rounds - done)


def _kept(kind: Kind[Kept], out: Path) -> Kept | None:
    mark = f"{kind.name}.toml"
    if not out.exists():
        return None
    if not out.is_dir():
        raise InputError(f"--out {out} is no folder; name a new one")
    if (out / mark).exists():
        return load(kind.remembered, out / mark)
    if any(out.iterdir()):
        raise InputError(f"--out {out} holds something else (it has no {mark}); name a new folder")
    return None
