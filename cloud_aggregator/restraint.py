"""What a run asks its devices to hold back in instruction tuning, and whether it can ask that."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from device_profiles.config_files import Config
from device_profiles.errors import InputError
from device_profiles.methods import find_method
from messaging.protocol import Stage


class RestraintSettings(Config):
    """What keeps devices from fitting their few examples too closely; by default nothing.

    Attributes:
        proximal: Pull of a device's own copy of what it shares towards the global state (Ditto's
            lambda): it trains twice a round, and the copy is its personal model; 0 for none.
        lora_dropout: Share of the inputs of each LoRA module that a step leaves out.
        weight_decay: Of AdamW, decoupled.
        stopping_patience: Looks at examples set apart, without a lower loss, after which a device
            ends its round with what was best; 0 for never.
        validation_share: Of a device's training examples that are set apart for these looks.
        validation_every: Steps between two looks.
    """

    proximal: Annotated[float, Field(ge=0, le=1e6)] = 0.0
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    weight_decay: Annotated[float, Field(ge=0, le=100)] = 0.0
    stopping_patience: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    validation_share: Annotated[float, Field(gt=0, lt=1)] = 0.2
    validation_every: Annotated[int, Field(ge=1, le=1_000_000)] = 4


def check_restraint(
    restraint: RestraintSettings, method: str, stages: Sequence[Stage], source: str
) -> None:
    """Refuse restraints that the run has no use for.

    Raises:
        InputError: Naming the setting and the remedy.
    """
    if restraint != RestraintSettings() and "instruction" not in stages:
        raise InputError(
            f"{source}: {_first_given(restraint)} holds instruction tuning back, which is not "
            f"among the stages ({', '.join(stages)}); add it, or leave the setting out"
        )
    if not restraint.proximal:
        return
    if not find_method(method).shared:
        raise InputError(
            f"{source}: proximal = {restraint.proximal:g} pulls towards the global state, and the "
            f"method '{method}' shares nothing; choose another method, or leave proximal out"
        )
    if len(stages) > 1:
        raise InputError(
            f"{source}: proximal = {restraint.proximal:g} makes a personal copy, which no later "
            f"stage goes on from, and the stages are {', '.join(stages)}; run instruction alone, "
            "or leave proximal out"
        )


def _first_given(restraint: RestraintSettings) -> str:
    given = restraint.model_dump(exclude_defaults=True)
    name = next(iter(given))
    return f"{name} = {given[name]:g}"
