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
from device_profiles.reward_heads import HIDDEN, head_tensors, initial_heads
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
    "shared_layout",
    "stage_layout",
]


def shared_layout(method: Method, modules: ModuleShape) -> Layout:
    """Return the allow-list of a run: the tensors that may travel, in order."""
    shared = shared_tensors(method, modules)
    return Layout.of((t.name, t.shape, t.bottleneck_axis) for t in shared)


def stage_layout(stage: Stage, method: Method, modules: ModuleShape) -> Layout:
    """Return the allow-list of a stage: of reward learning, the heads of the reward models."""
    if stage != "reward":
        return shared_layout(method, modules)
    heads = [
        t for name in method.objectives for t in head_tensors(name, modules.base.width, HIDDEN)
    ]
    return Layout.of((t.name, t.shape, t.bottleneck_axis) for t in heads)


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
        return initial_heads(method.objectives, modules.base.width, HIDDEN, seed)
    return initial_tensors(method, modules, seed)
