"""The runs of the front: PWFF with the same fleet, data and seeds at each weight of helpfulness."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from cloud_aggregator.reproduce.fig4 import OURS, PlannedRun, merged
from cloud_aggregator.reproduce.fig5.plan import (
    QUICK as QUICK_REWARDS,
)
from cloud_aggregator.reproduce.fig5.plan import (
    RewardComparison,
    RewardSettings,
    experiment_of,
)
from cloud_aggregator.reproduce.folder import Kind
from device_profiles.methods import Objective

Weight = Annotated[float, Field(ge=0, le=1)]


class Settings(RewardSettings):
    """What is compared.

    Attributes:
        weights: Of helpfulness, of every client alike; harmlessness has the rest.
        experiment: Name of the experiment whose rank LoRA has.
    """

    weights: tuple[Weight, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    experiment: str = "paper-literal"


class Front(RewardComparison):
    """What ``pareto.toml`` holds."""

    reproduces: Literal["pareto"] = "pareto"
    settings: Settings


QUICK: dict[str, Any] = {**QUICK_REWARDS}
PARETO = Kind(name="pareto", remembered=Front, settings=Settings, quick=QUICK)


def plan(
    settings: Settings,
    width: int,
    files: Mapping[Objective, str],
    how: dict[str, Any] | None = None,
) -> list[PlannedRun]:
    """Return every run, seed by seed; arguments and errors as of Fig. 5's plan.

    The first two stages know no preference, so they are the same in every run of a seed; each run
    repeats them.
    """
    options: dict[str, Any] = {**{str(k): v for k, v in files.items()}, **(how or {})}
    return merged(
        (
            f"weight {weight:g}",
            experiment_of(
                settings.experiment,
                OURS,
                seed,
                settings=settings,
                width=width,
                options={**options, "preference": weight},
            ),
        )
        for seed in settings.seeds
        for weight in settings.weights
    )
