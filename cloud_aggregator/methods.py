"""What a method shares, as the layouts that both ends hold. The table is in ``device_profiles``."""

from __future__ import annotations

from device_profiles.methods import (
    METHODS,
    Method,
    ModuleShape,
    find_method,
    held_tensors,
    shared_tensors,
)
from device_profiles.modules import initial_adapters, initial_lora, lora_sites
from messaging.layout import Layout, Tensors

__all__ = [
    "METHODS",
    "Method",
    "ModuleShape",
    "find_method",
    "initial_tensors",
    "own_layout",
    "shared_layout",
]


def shared_layout(method: Method, modules: ModuleShape) -> Layout:
    """Return the allow-list of a run: the tensors that may travel, in order."""
    shared = shared_tensors(method, modules)
    return Layout.of((t.name, t.shape, t.bottleneck_axis) for t in shared)


def own_layout(layout: Layout, lora_count: int) -> Layout:
    """Return what of a run's layout a device with so many LoRA modules sends: its first tensors."""
    return layout.first(held_tensors([spec.name for spec in layout.specs], lora_count))


def initial_tensors(method: Method, modules: ModuleShape, seed: int) -> Tensors:
    """Return the shared tensors that every device of a run starts from."""
    tensors: Tensors = {}
    if "adapters" in method.shared:
        tensors |= initial_adapters(modules.base, modules.adapter_size, seed)
    if "lora" in method.shared:
        sites = lora_sites(modules.base, modules.placement)
        tensors |= initial_lora(sites, modules.lora_rank, seed)
    return tensors
