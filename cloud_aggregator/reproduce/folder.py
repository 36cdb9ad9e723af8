"""The folder of a comparison: its settings in ``fig4.toml``, its runs below ``runs/``.

A folder remembers what it compares, so that going on needs nothing but its name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import tomli_w

from cloud_aggregator.experiment import Positive
from cloud_aggregator.records import RunRecord
from cloud_aggregator.reproduce.fig4 import QUICK, PlannedRun, Settings
from cloud_aggregator.run_folder import RunFolder, read_record, write_atomically
from device_profiles.config_files import Config, check, load
from device_profiles.errors import InputError
from quantization.identity import identify

_MARK = "fig4.toml"


class Comparison(Config):
    """What ``fig4.toml`` holds; ``width`` is that of the base that learns."""

    reproduces: Literal["fig4"] = "fig4"
    width: Positive
    settings: Settings


def settle(
    out: Path, given: dict[str, Any], *, quick: bool = False, render_only: bool = False
) -> Comparison:
    """Return what is compared in ``out``: what is given, else what the folder says, else defaults.

    Args:
        out: A folder of a comparison, or one that is empty or not there yet.
        given: Settings by name.
        quick: Take the quick ones by default.
        render_only: Refuse a folder that holds no comparison yet.

    Raises:
        InputError: If the folder holds something else, or a setting is not usable.
        BaseModelError: If the base is not usable.
    """
    kept = _kept(out)
    if kept is None and render_only:
        raise InputError(f"{out} holds no comparison to render; leave --render-only out to run one")
    if kept is not None and quick and not kept.settings.quick:
        raise InputError(
            f"{out} holds a full comparison, which --quick would write over; name another --out"
        )
    before = kept.settings.model_dump() if kept else QUICK if quick else {}
    settings = check(Settings, {**before, **given}, "options")
    if kept is not None and kept.settings.model == settings.model:
        return Comparison(width=kept.width, settings=settings)
    return Comparison(width=identify(settings.model).shape.width, settings=settings)


def keep(out: Path, comparison: Comparison) -> None:
    """Write ``fig4.toml``.

    Raises:
        DiskFullError: If there is no room.
        InputError: If the folder cannot be written.
    """
    text = tomli_w.dumps(comparison.model_dump(mode="json", exclude_none=True))
    write_atomically(out / _MARK, text.encode())


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
    """Return how many rounds of a run are still to do."""
    done = len(record.rounds) if record else 0
    return max(0, run.experiment.rounds - done)


def _kept(out: Path) -> Comparison | None:
    if not out.exists():
        return None
    if not out.is_dir():
        raise InputError(f"--out {out} is no folder; name a new one")
    if (out / _MARK).exists():
        return load(Comparison, out / _MARK)
    if any(out.iterdir()):
        raise InputError(f"--out {out} holds something else (it has no {_MARK}); name a new folder")
    return None
