"""The methods: which modules a device trains, and which of them travel. One row a method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from device_profiles.config_files import choose
from device_profiles.modules import BaseShape, NamedShape, adapter_tensors

Modules = Literal["adapters", "lora"]


@dataclass(frozen=True, kw_only=True)
class Method:
    """One row of the table.

    Attributes:
        title: What a report calls it.
        trained: Kinds of module on the base.
        shared: Those of them that are uploaded and averaged.
    """

    title: str
    trained: tuple[Modules, ...]
    shared: tuple[Literal["adapters"], ...]


METHODS: dict[str, Method] = {
    "pwff": Method(
        title="PWFF (adapters averaged, LoRA personal)",
        trained=("adapters", "lora"),
        shared=("adapters",),
    ),
    "fedada": Method(
        title="FedAda (adapters only, averaged)", trained=("adapters",), shared=("adapters",)
    ),
    "local-only": Method(
        title="Local only (nothing leaves the device)", trained=("adapters", "lora"), shared=()
    ),
}


def find_method(name: str) -> Method:
    """Return the method of that name.

    Raises:
        InputError: With the nearest known name.
    """
    return METHODS[choose("method", name, METHODS)]


def shared_tensors(method: Method, base: BaseShape, adapter_size: int) -> list[NamedShape]:
    """Return the tensors that travel, in order."""
    return adapter_tensors(base, adapter_size) if "adapters" in method.shared else []
