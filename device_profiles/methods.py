"""The methods: which modules a device trains, and which of them travel. One row a method.

A variant ``-own`` lets every device hold as many LoRA modules as its profile affords; the baselines
of arXiv 2404.13238v2 hold all of them everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from device_profiles.config_files import choose
from device_profiles.modules import (
    BaseShape,
    NamedShape,
    adapter_tensors,
    is_lora,
    lora_sites,
    lora_tensors,
)
from device_profiles.reward_heads import TrunkShape, reward_tensors

Kind = Literal["adapters", "lora"]
Stage = Literal["instruction", "reward", "alignment"]
Objective = Literal["helpfulness", "harmlessness"]

#: What of a reward model is learned and travels: its head, or the adapters on its trunk as well.
RewardShares = Literal["head", "adapters", "all"]

#: What reward models judge, in the order that is used everywhere.
OBJECTIVES: tuple[Objective, ...] = ("helpfulness", "harmlessness")


@dataclass(frozen=True, kw_only=True)
class Method:
    """One row of the table.

    Attributes:
        title: What a report calls it.
        trained: Kinds of module on the base.
        shared: Those of them that are uploaded and averaged.
        lora: How many LoRA modules a device holds: ``own`` (what its profile affords) or ``all``
            (every site of the placement).
        average: What is averaged of shared LoRA: ``tensors`` (each factor by itself, as the
            baselines do, though mean(B) mean(A) is not mean(B A)) or ``product``.
        objectives: Whose reward models it learns and is aligned by; none for a method that is
            instruction-tuned alone.
    """

    title: str
    trained: tuple[Kind, ...]
    shared: tuple[Kind, ...]
    lora: Literal["own", "all"] = "own"
    average: Literal["tensors", "product"] = "tensors"
    objectives: tuple[Objective, ...] = OBJECTIVES


_BOTH: tuple[Kind, ...] = ("adapters", "lora")

METHODS: dict[str, Method] = {
    "pwff": Method(
        title="PWFF (adapters averaged, LoRA personal)", trained=_BOTH, shared=("adapters",)
    ),
    "vanilla-fl": Method(
        title="Vanilla FL (adapters and LoRA averaged)", trained=_BOTH, shared=_BOTH, lora="all"
    ),
    "vanilla-fl-own": Method(
        title="Vanilla FL, LoRA as the device affords", trained=_BOTH, shared=_BOTH
    ),
    "fedada": Method(
        title="FedAda (adapters only, averaged)", trained=("adapters",), shared=("adapters",)
    ),
    "fedlora": Method(
        title="FedLoRA (LoRA only, averaged)", trained=("lora",), shared=("lora",), lora="all"
    ),
    "fedlora-own": Method(
        title="FedLoRA, LoRA as the device affords", trained=("lora",), shared=("lora",)
    ),
    "fedlora-product": Method(
        title="FedLoRA, products B A averaged",
        trained=("lora",),
        shared=("lora",),
        lora="all",
        average="product",
    ),
    "local-only": Method(
        title="Local only (nothing leaves the device)", trained=_BOTH, shared=(), objectives=()
    ),
    "sfl": Method(
        title="SFL (adapters averaged, helpfulness alone)",
        trained=_BOTH,
        shared=("adapters",),
        objectives=("helpfulness",),
    ),
    "pfl": Method(
        title="PFL (adapters and LoRA averaged, two rewards)",
        trained=_BOTH,
        shared=_BOTH,
        lora="all",
    ),
    "shepherd": Method(
        title="Shepherd (LoRA averaged, instruction-tuned alone)",
        trained=("lora",),
        shared=("lora",),
        lora="all",
        objectives=(),
    ),
    "shepherd-aligned": Method(
        title="Shepherd (LoRA averaged, aligned with helpfulness)",
        trained=("lora",),
        shared=("lora",),
        lora="all",
        objectives=("helpfulness",),
    ),
}


def find_method(name: str) -> Method:
    """Return the method of that name.

    Raises:
        InputError: With the nearest known name.
    """
    return METHODS[choose("method", name, METHODS)]


@dataclass(frozen=True, kw_only=True)
class ModuleShape:
    """The small modules of a run: their base, bottleneck size M, placement and rank R.

    ``reward_shares`` says what a reward model is made of, beside the frozen trunk; that is the
    base, or an encoder of ``encoder_width``.
    """

    base: BaseShape
    adapter_size: int
    placement: str
    lora_rank: int
    reward_shares: RewardShares = "head"
    encoder_width: int | None = None

    @property
    def trunk(self) -> TrunkShape:
        """What reward models read, and what of it is each one's own."""
        return TrunkShape(
            base=self.base,
            adapter_size=self.adapter_size if self.reward_shares == "adapters" else 0,
            whole=self.reward_shares == "all",
            encoder_width=self.encoder_width,
        )


def shared_tensors(method: Method, modules: ModuleShape) -> list[NamedShape]:
    """Return the tensors that travel: adapters block by block, then LoRA in the order of filling.

    A device with fewer LoRA modules holds the first of them (see ``held_tensors``).

    Raises:
        InputError: If adapter size or placement do not fit the base.
    """
    tensors: list[NamedShape] = []
    if "adapters" in method.shared:
        tensors += adapter_tensors(modules.base, modules.adapter_size)
    if "lora" in method.shared:
        tensors += lora_tensors(lora_sites(modules.base, modules.placement), modules.lora_rank)
    return tensors


def stage_tensors(stage: Stage, method: Method, modules: ModuleShape) -> list[NamedShape]:
    """Return the tensors that travel in a stage: of reward learning, reward models.

    LoRA never is among a reward model's: what of its trunk trains is adapters, or nothing.

    Raises:
        InputError: If adapter size or placement do not fit the base.
    """
    if stage != "reward":
        return shared_tensors(method, modules)
    return [t for name in method.objectives for t in reward_tensors(name, modules.trunk)]


def held_tensors(names: Sequence[str], lora_count: int) -> int:
    """Return how many of the shared tensors, from the first, a device holds.

    Args:
        names: All shared tensors of the run, in order.
        lora_count: LoRA modules on the device, each of two tensors.
    """
    lora = sum(is_lora(name) for name in names)
    return len(names) - lora + min(lora, 2 * lora_count)
