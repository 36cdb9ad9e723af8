"""Fig. 5 as a plan: the methods that align a model, at the two ranks, on one half of the pairs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from cloud_aggregator.experiment import Experiment, Positive, load_experiment
from cloud_aggregator.methods import METHODS
from cloud_aggregator.reproduce.fig4 import (
    EXPERIMENTS,
    OURS,
    Common,
    PlannedRun,
    experiment_file,
    learning_rank,
    listed,
    merged,
    priced_rank,
)
from cloud_aggregator.reproduce.folder import Kind, Remembered
from device_profiles.config_files import choose
from device_profiles.errors import InputError
from device_profiles.methods import Objective
from device_profiles.stages import STAGES
from messaging.protocol import Algorithm

#: In the order of tables and figure.
METHODS_OF_FIG5 = (OURS, "sfl", "pfl", "shepherd", "shepherd-aligned")
#: PWFF aligned by another algorithm, after the same first stages: not of the paper, done where
#: they are named.
ABLATIONS: dict[str, Algorithm] = {"pwff-rloo": "rloo", "pwff-dpo": "dpo"}
#: Updates of PPO in a step of responses (four epochs of four parts), and so DPO's for each of them.
PPO_UPDATES = 16

#: One number a stage: instruction, reward, alignment.
PerStage = tuple[Positive, Positive, Positive]


class RewardSettings(Common):
    """What the runs of all three stages have in common.

    Attributes:
        rounds: Of each stage.
        local_steps: A client and round, of each stage.
        batch_size: Of instruction tuning, instead of the experiments' own.
        rollouts: Responses a step of alignment.
        max_new_tokens: Of a response, the end token included.
        clients: Instead of the experiments' own.
        held_out_share: Likewise.
        held_out_prompts: That a client answers at most when it is judged.
        helpfulness: Preference pairs: ``kit``, a file or a hub id.
        harmlessness: Likewise.
    """

    rounds: PerStage = (6, 4, 6)
    local_steps: PerStage = (20, 40, 2)
    batch_size: Positive | None = None
    rollouts: Positive = 16
    max_new_tokens: Positive = 48
    clients: Positive | None = None
    held_out_share: Annotated[float, Field(gt=0, lt=1)] | None = None
    held_out_prompts: Positive = 16
    helpfulness: str = "kit"
    harmlessness: str = "kit"

    @property
    def sources(self) -> dict[Objective, str]:
        """Where the pairs of each objective come from."""
        return {"helpfulness": self.helpfulness, "harmlessness": self.harmlessness}


class Settings(RewardSettings):
    """What is compared.

    Attributes:
        experiments: Names in ``EXPERIMENTS``.
        methods: Names in ``METHODS_OF_FIG5`` and ``ABLATIONS``.
    """

    experiments: tuple[str, ...] = EXPERIMENTS
    methods: tuple[str, ...] = METHODS_OF_FIG5


class RewardComparison(Remembered):
    """What a folder holds; ``files`` are the runs' half of the pairs, as they were written."""

    settings: RewardSettings
    files: dict[Objective, str] = Field(default_factory=dict)


class Comparison(RewardComparison):
    """What ``fig5.toml`` holds."""

    reproduces: Literal["fig5"] = "fig5"
    settings: Settings


#: What ``--quick`` sets where nothing else is said.
QUICK: dict[str, Any] = {
    "seeds": (0,), "rounds": (1, 1, 1), "local_steps": (2, 10, 1), "rollouts": 4,
    "max_new_tokens": 16, "held_out_prompts": 4, "quick": True,
}  # fmt: skip
FIG5 = Kind(name="fig5", remembered=Comparison, settings=Settings, quick=QUICK)


def plan(
    settings: Settings,
    width: int,
    files: Mapping[Objective, str],
    how: dict[str, Any] | None = None,
) -> list[PlannedRun]:
    """Return every run once, seed by seed.

    Args:
        settings: What is compared.
        width: Of the base that learns.
        files: Preference pairs that the runs learn from.
        how: Settings of an experiment that change nothing of its outcome (workers, transport).

    Raises:
        InputError: If an experiment, a method or a setting is not usable.
    """
    options: dict[str, Any] = {**{str(k): v for k, v in files.items()}, **(how or {})}
    return merged(
        (
            name,
            experiment_of(name, method, seed, settings=settings, width=width, options=options),
        )
        for seed in settings.seeds
        for name in settings.experiments
        for method in settings.methods
    )


def experiment_of(
    name: str,
    method: str,
    seed: int,
    *,
    settings: RewardSettings,
    width: int,
    options: Mapping[str, Any],
) -> Experiment:
    """Return one run's experiment: of all stages that the method has a use for.

    Args:
        name: Of the experiment.
        method: Row of the methods table, or an ablation.
        seed: Of the run.
        settings: Of the reproduction.
        width: Of the base that learns.
        options: What else is set.

    Raises:
        InputError: If an experiment, a method or a setting is not usable.
    """
    priced = priced_rank(name)
    algorithm = ABLATIONS.get(method)
    row = OURS if algorithm else choose("method", method, METHODS)
    stages = STAGES if METHODS[row].objectives else STAGES[:1]
    steps = [*settings.local_steps[: len(stages)]]
    if algorithm == "dpo":
        steps[-1] *= PPO_UPDATES
    given: dict[str, Any] = {
        "method": row,
        "algorithm": algorithm,
        "seed": seed,
        "model": settings.model,
        "data": settings.data,
        "stages": ",".join(stages),
        "rounds": [*settings.rounds[: len(stages)]],
        "local_steps": steps,
        "lora_rank": learning_rank(priced, width),
        "priced_lora_rank": priced,
        "rollouts": settings.rollouts,
        "max_new_tokens": settings.max_new_tokens,
        "held_out_prompts": settings.held_out_prompts,
        "batch_size": settings.batch_size,
        "clients": settings.clients,
        "held_out_share": settings.held_out_share,
        **options,
    }
    known = {key: value for key, value in given.items() if value is not None}
    return load_experiment(experiment_file(name), known)


def method_of(experiment: Experiment) -> str:
    """Return what the comparison calls the method of one of its runs."""
    for name, algorithm in ABLATIONS.items():
        if experiment.algorithm == algorithm:
            return name
    return experiment.method


def per_stage(option: str, text: str) -> list[int]:
    """Return the three numbers of a list with commas.

    Raises:
        InputError: If they are not three whole numbers.
    """
    words = [word for part in text.split(",") for word in listed(option, part)]
    if len(words) != len(STAGES) or not all(w.isascii() and w.isdigit() for w in words):
        raise InputError(
            f"{option} = '{text}'; give one whole number for each of {', '.join(STAGES)}, with "
            "commas between, such as 6,4,6"
        )
    return [int(word) for word in words]
