"""A sweep as a plan: one experiment at every combination of some settings' values, and every seed.

Everything is checked before the first run starts: keys, values, and that fleet, data and partition
of each run fit each other.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from cloud_aggregator.experiment import HOW, Experiment, check_same, load_experiment, stored
from cloud_aggregator.reproduce.fig4 import PlannedRun
from cloud_aggregator.reproduce.folder import folder_of, record_of, rounds_left
from cloud_aggregator.run_folder import write_atomically
from device_profiles.config_files import choose, read_toml
from device_profiles.errors import InputError

MOST_SEEDS = 100
_MARK = "sweep.toml"  # a sweep's folder is known by it


@dataclass(frozen=True, kw_only=True)
class Axis:
    """A setting, and the values that it takes in turn, as they were written."""

    key: str
    values: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class SweptRun(PlannedRun):
    """One run of a sweep; ``setting`` has its values, such as ``alpha=0.1,codec=int8``."""

    setting: str

    @property
    def name(self) -> str:
        """Of its folder: its values, and its seed."""
        values = re.sub(r"[^A-Za-z0-9._=,+-]", "-", self.setting)
        seed = f"seed={self.experiment.seed}"
        return f"{values},{seed}" if values else seed

    @property
    def words(self) -> str:
        """What a person calls it."""
        seed = f"seed {self.experiment.seed}"
        return f"{self.setting}, {seed}" if self.setting else seed


def read_axis(text: str) -> Axis:
    """Return the axis of ``KEY=V,V,...``; where a value has commas, ``;`` stands between values.

    Raises:
        InputError: If there is no key, or a value is empty or there twice.
    """
    key, sign, values = text.partition("=")
    key = key.strip().replace("-", "_")
    if not sign or not key:
        raise InputError(f"--sweep '{text}'; give KEY=V,V,..., such as alpha=0.1,1,10")
    words = [word.strip() for word in values.split(";" if ";" in values else ",")]
    if not all(words):
        raise InputError(f"--sweep '{text}' has an empty place; give values with commas between")
    for place, word in enumerate(words):
        if word in words[:place]:
            raise InputError(f"--sweep '{text}' has '{word}' twice; give each value once")
    _check_key(key, text)
    return Axis(key=key, values=tuple(words))


def _check_key(key: str, text: str) -> None:
    if key == "seed":
        raise InputError(f"--sweep '{text}': seeds are not an axis; give --seeds N")
    choose("key of an experiment to sweep", key, Experiment.model_fields)
    if key in HOW - {"rounds"}:
        raise InputError(
            f"--sweep '{text}': {key} changes how a run is done and not what comes of it; give it "
            "as an option of all runs"
        )


def plan_sweep(
    path: Path | None, options: Mapping[str, Any], axes: Sequence[Axis], seeds: int
) -> list[SweptRun]:
    """Return every run: seed by seed, and for each seed every combination, the last axis fastest.

    Args:
        path: The experiment's file; without it, the defaults.
        options: That all runs have, before the file's.
        axes: Of the grid; none for one setting at several seeds.
        seeds: How many, from the experiment's own on, 1 to 100.

    Raises:
        InputError: If a value is not usable, or two runs would be the same.
    """
    if not 1 <= seeds <= MOST_SEEDS:
        raise InputError(f"--seeds {seeds}; choose 1 to {MOST_SEEDS}")
    for place, axis in enumerate(axes):
        if axis.key in [before.key for before in axes[:place]]:
            raise InputError(f"--sweep has {axis.key} twice; give all its values once")
        if axis.key in options:
            raise InputError(f"{axis.key} is swept, and given as an option too; leave one out")
    first = load_experiment(path, dict(options)).seed
    runs = []
    for seed in range(first, first + seeds):
        for values in itertools.product(*(axis.values for axis in axes)):
            said = {axis.key: value for axis, value in zip(axes, values, strict=True)}
            setting = ",".join(f"{key}={value}" for key, value in said.items())
            experiment = load_experiment(path, {**options, **said, "seed": seed})
            runs.append(SweptRun(experiment=experiment, serves=(), setting=setting))
    _check_unlike(runs)
    return runs


def _check_unlike(runs: Sequence[SweptRun]) -> None:
    """Refuse two runs of one outcome (``alpha=1,1.0``), or of one folder."""
    seen: dict[str, SweptRun] = {}
    for run in runs:
        for mark in (json.dumps(stored(run.experiment), sort_keys=True), run.name):
            other = seen.setdefault(mark, run)
            if other is not run:
                raise InputError(
                    f"--sweep: '{other.words}' and '{run.words}' are the same run; leave one out"
                )


def settle_folder(out: Path, runs: Sequence[SweptRun], axes: Sequence[Axis], seeds: int) -> None:
    """Make ``out`` the folder of a sweep, once every run that is left to do could begin.

    Raises:
        InputError: If it holds something else, a run in it has other settings, or one to do is not
            usable.
    """
    if out.exists() and not (out.is_dir() and ((out / _MARK).exists() or not any(out.iterdir()))):
        raise InputError(f"--out {out} holds something else (no {_MARK}); name a new folder")
    to_do = []
    for run in runs:
        record = record_of(out, run)
        if record is not None:
            kept = read_toml(folder_of(out, run).path / "config.toml").get("experiment", {})
            check_same(kept, run.experiment)
        if rounds_left(run, record):
            to_do.append(run)
    check_plans(to_do)
    content = {
        "sweep": {axis.key: list(axis.values) for axis in axes},
        "seeds": seeds,
        "runs": [run.name for run in runs],
    }
    write_atomically(out / _MARK, tomli_w.dumps(content).encode())


def check_plans(runs: Sequence[SweptRun]) -> None:
    """Refuse a run whose fleet, data or partition do not fit each other, before any begins.

    Raises:
        InputError: Naming the run, and what is wrong with it.
    """
    from cloud_aggregator.emulation.plan import plan_run

    for run in runs:
        try:
            plan_run(run.experiment, folder_of(Path(), run))
        except InputError as err:
            raise InputError(f"{run.words}: {err}") from err
