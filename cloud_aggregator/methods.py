"""What a method shares, as the layouts that both ends hold. The table is in ``device_profiles``."""

from __future__ import annotations

from device_profiles.methods import (
    METHODS,
    Method,
    ModuleShape,
    find_method,
    held_tensors,
    stage_tensors,
)
from device_profiles.modules import initial_adapters, initial_lora, lora_sites
from device_profiles.reward_heads import initial_rewards
from messaging.layout import Layout, Tensors
from messaging.protocol import Stage

__all__ = [
    "METHODS",
    "Method",
    "ModuleShape",
    "find_method",
    "initial_state",
    "initial_tensors",
    "own_layout",
    "stage_layout",
]


def stage_layout(stage: Stage, method: Method, modules: ModuleShape) -> Layout:
    """Return the allow-list of a stage: the tensors that may travel, in order."""
    return Layout.of(stage_tensors(stage, method, modules))


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


def initial_state(stage: Stage, method: Method, modules: ModuleShape, seed: int) -> Tensors:
    """Return the shared tensors that every device begins a stage with, if nothing came before."""
    if stage == "reward":
        return initial_rewards(method.objectives, modules.trunk, seed)
    return initial_tensors(method, modules, seed)
