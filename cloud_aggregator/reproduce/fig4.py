"""Fig. 4 as a plan: which runs the comparison takes, and which of them two experiments share.

Learning happens on a small base with LoRA ranks in proportion to its width; delay and energy are
computed at the shape and rank that the experiment names. The experiments are TOML files in
``cloud_aggregator/experiments``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from cloud_aggregator.experiment import Experiment, Positive, load_experiment
from cloud_aggregator.methods import METHODS
from device_profiles.config_files import Config, choose, read_toml
from device_profiles.errors import InputError
from device_profiles.modules import REFERENCE_WIDTH

EXPERIMENTS = ("paper-literal", "paper-consistent")
OURS = "pwff"
CONTROL = "local-only"
BASELINES = ("vanilla-fl", "fedada", "fedlora")
#: Drawn in the figure. The variants below stand in the tables only.
FIGURE = (OURS, *BASELINES, CONTROL)
VARIANTS = ("vanilla-fl-own", "fedlora-own", "fedlora-product")

Seed = Annotated[int, Field(ge=0, lt=2**31)]


class Common(Config):
    """What every reproduction is a function of.

    Attributes:
        seeds: Each draws a fleet, a partition, channels and initial modules for every method.
        model: The base that learns.
        data: ``kit``, ``alpaca`` or a file.
        quick: Too short to be evidence of anything; every output says so.
    """

    seeds: tuple[Seed, ...] = (0, 1, 2)
    model: str = "mini"
    data: str = "kit"
    quick: bool = False


class Settings(Common):
    """What is compared, and at what length.

    Attributes:
        rounds: Instead of the experiments' own.
        local_steps: Likewise.
        batch_size: Likewise.
        held_out_share: Of each client's examples, instead of the experiments' own.
        experiments: Names in ``EXPERIMENTS``.
        methods: Names in the methods table.
    """

    rounds: Positive | None = None
    local_steps: Positive | None = None
    batch_size: Positive | None = None
    held_out_share: Annotated[float, Field(gt=0, lt=1)] | None = None
    experiments: tuple[str, ...] = EXPERIMENTS
    methods: tuple[str, ...] = (*FIGURE, *VARIANTS)


#: What ``--quick`` sets where nothing else is said.
QUICK: dict[str, Any] = {
    "seeds": (0,), "rounds": 2, "local_steps": 4, "methods": FIGURE, "quick": True,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """One run, and the names of the experiments that it belongs to."""

    experiment: Experiment
    serves: tuple[str, ...]

    @property
    def name(self) -> str:
        """Of its folder: the same for the same outcome."""
        return self.experiment.run_name

    @property
    def words(self) -> str:
        """What a person calls it."""
        where, algorithm = " and ".join(self.serves), self.experiment.algorithm
        how = "" if algorithm == "ppo" else f" by {algorithm}"
        return f"{self.experiment.method}{how}, seed {self.experiment.seed}, {where}"


def plan(settings: Settings, width: int, how: dict[str, Any] | None = None) -> list[PlannedRun]:
    """Return every run once: the figure's methods seed by seed, then the variants.

    Args:
        settings: What is compared.
        width: Of the base that learns.
        how: Settings of an experiment that change nothing of its outcome (workers, transport).

    Raises:
        InputError: If an experiment, a method or a setting is not usable.
    """
    drawn = [m for m in settings.methods if m in FIGURE]
    others = [m for m in settings.methods if m not in FIGURE]
    return merged(
        (name, experiment_of(name, method, seed, settings=settings, width=width, how=how or {}))
        for methods in (drawn, others)
        for seed in settings.seeds
        for name in settings.experiments
        for method in methods
    )


def merged(found: Iterable[tuple[str, Experiment]]) -> list[PlannedRun]:
    """Return every run once, with the names of all that it serves."""
    runs: dict[str, PlannedRun] = {}
    for name, experiment in found:
        known = runs.get(experiment.run_name)
        serves = (*known.serves, name) if known else (name,)
        runs[experiment.run_name] = PlannedRun(experiment=experiment, serves=serves)
    return list(runs.values())


def experiment_of(
    name: str, method: str, seed: int, *, settings: Settings, width: int, how: dict[str, Any]
) -> Experiment:
    """Return one run's experiment; a method without LoRA has no rank, so that equal runs are one.

    Raises:
        InputError: If an experiment, a method or a setting is not usable.
    """
    path = experiment_file(name)
    priced = priced_rank(name)
    lora = "lora" in METHODS[choose("method", method, METHODS)].trained
    options: dict[str, Any] = {
        **how,
        "method": method,
        "seed": seed,
        "model": settings.model,
        "data": settings.data,
        "lora_rank": learning_rank(priced, width) if lora else None,
        "priced_lora_rank": priced if lora else None,
    }
    given = {
        "rounds": settings.rounds,
        "local_steps": settings.local_steps,
        "batch_size": settings.batch_size,
        "held_out_share": settings.held_out_share,
    }
    options |= {key: value for key, value in given.items() if value is not None}
    return load_experiment(path, options)


def experiment_file(name: str) -> Path:
    """Return the TOML file of an experiment.

    Raises:
        InputError: With the nearest known name.
    """
    known = choose("experiment", name, EXPERIMENTS)
    return Path(str(resources.files("cloud_aggregator") / "experiments" / f"{known}.toml"))


def priced_rank(name: str) -> int:
    """Return LoRA's rank at which an experiment's delay and energy are computed."""
    return int(read_toml(experiment_file(name))["priced_lora_rank"])


def learning_rank(priced: int, width: int) -> int:
    """Return LoRA's rank on a base of that width: in proportion to 768, rounded up."""
    return math.ceil(priced * width / REFERENCE_WIDTH)


def listed(option: str, text: str) -> list[str]:
    """Return the words of a list with commas.

    Raises:
        InputError: If it is empty or says a word twice.
    """
    words = [word.strip() for word in text.split(",")]
    if not all(words):
        raise InputError(f"{option} = '{text}' has an empty place; give words with commas between")
    return once(option, words)


def once(option: str, words: Sequence[Any]) -> list[Any]:
    """Return the words.

    Raises:
        InputError: If one is there twice.
    """
    for place, word in enumerate(words):
        if word in words[:place]:
            raise InputError(f"{option} has '{word}' twice; give each once")
    return [*words]


def seeds_of(text: str) -> list[int]:
    """Return the seeds of a list with commas.

    Raises:
        InputError: If one is no whole number or is there twice.
    """
    words = listed("--seeds", text)
    for word in words:
        if not (word.isascii() and word.isdigit()):
            raise InputError(
                f"--seeds = '{text}': '{word}' is no whole number from 0; "
                "give them with commas between, such as 0,1,2"
            )
    return once("--seeds", [int(word) for word in words])


def names_of(option: str, kind: str, text: str, known: Iterable[str]) -> list[str]:
    """Return the names of a list with commas, in the order of ``known``.

    Raises:
        InputError: If one is unknown (with the nearest known) or is there twice.
    """
    order = [*known]
    return sorted((choose(kind, word, order) for word in listed(option, text)), key=order.index)
