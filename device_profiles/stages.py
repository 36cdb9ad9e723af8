"""The stages of a run, and which of them a method has a use for."""

from __future__ import annotations

from typing import Final

from device_profiles.errors import InputError
from device_profiles.methods import Method, Stage

STAGES: Final[tuple[Stage, ...]] = ("instruction", "reward", "alignment")
_CHOICE = f"choose from {', '.join(STAGES)}, separated by commas, in this order"


def parse_stages(text: str, method: Method) -> list[Stage]:
    """Return the stages that a comma-separated list names, in their order.

    Raises:
        InputError: If a name is unknown, twice or out of order, or the method has no use for it.
    """
    names = [word.strip() for word in text.split(",")]
    for name in names:
        if name not in STAGES:
            raise InputError(f"unknown stage '{name}' in stages = '{text}'; {_CHOICE}")
    chosen = [stage for stage in STAGES if stage in names]
    if chosen != names:
        raise InputError(f"stages = '{text}' are not in their order, or name one twice; {_CHOICE}")
    if not method.objectives and chosen[-1] != "instruction":
        raise InputError(
            f"stages = '{text}' with a method that is instruction-tuned alone ({method.title}); "
            "leave reward and alignment out, or choose another method"
        )
    if "alignment" in chosen and "reward" not in chosen:
        raise InputError(
            f"stages = '{text}': alignment scores responses by the reward models of its run; put "
            "reward before it"
        )
    return chosen
