"""The methods: which modules a device trains, and which of them travel. One row a method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from device_profiles.config_files import choose
from device_profiles.modules import BaseShape, adapter_tensors
from messaging.layout import Layout, TensorSpec

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


def shared_layout(method: Method, base: BaseShape, adapter_size: int) -> Layout:
    """Return the allow-list of a run: the tensors that may travel, in order."""
    if "adapters" not in method.shared:
        return Layout(())
    return Layout(
        tuple(
            TensorSpec(name=t.name, shape=t.shape, scale_axis=t.bottleneck_axis)
            for t in adapter_tensors(base, adapter_size)
        )
    )
