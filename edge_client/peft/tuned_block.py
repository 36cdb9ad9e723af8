"""Which modules are on each block of a frozen GPT-2, as views of the buffers that hold them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from device_profiles.modules import ADAPTER_SITES, LoraSite, adapter_name
from edge_client.peft.functions import Adapter, Lora
from quantization.frozen_gpt2 import Block, FrozenGPT2

#: Tensors by name: values and gradients.
Views = Mapping[str, tuple[Tensor, Tensor]]

#: Where a LoRA module sits: the frozen projection, and which third of its outputs.
_PROJECTIONS: dict[str, tuple[str, int | None]] = {
    "attn.c_attn.query": ("qkv", 0),
    "attn.c_attn.key": ("qkv", 1),
    "attn.c_attn.value": ("qkv", 2),
    "attn.c_attn": ("qkv", None),
    "mlp.c_fc": ("mlp_in", None),
    "mlp.c_proj": ("mlp_out", None),
}


@dataclass(frozen=True, kw_only=True)
class TunedBlock:
    """A frozen block and the modules that are on it.

    Attributes:
        adapters: Site to weights and gradients; empty where there are none.
        lora: Projection (``qkv``, ``mlp_in``, ``mlp_out``) to the modules on it.
    """

    frozen: Block
    heads: int
    epsilon: float
    gelu: Literal["tanh", "none"]
    adapters: dict[str, tuple[Adapter, Adapter]] = field(default_factory=dict)
    lora: dict[str, list[Lora]] = field(default_factory=dict)

    @property
    def trains(self) -> bool:
        """Whether anything in this block is trainable."""
        return bool(self.adapters or self.lora)


def tuned_blocks(
    weights: FrozenGPT2, sites: Sequence[LoraSite], views: Views, adapted: bool
) -> list[TunedBlock]:
    """Return the blocks of a base with LoRA on ``sites`` and, where ``adapted``, all adapters."""
    lora = _lora_by_block(sites, views)
    return [
        TunedBlock(
            frozen=frozen,
            heads=weights.heads,
            epsilon=weights.epsilon,
            gelu=weights.gelu,
            adapters=_adapters_of(i, views) if adapted else {},
            lora=lora.get(i, {}),
        )
        for i, frozen in enumerate(weights.blocks)
    ]


def _adapters_of(block: int, views: Views) -> dict[str, tuple[Adapter, Adapter]]:
    adapters = {}
    for site in ADAPTER_SITES:
        name = adapter_name(block, site)
        parts = [
            views[f"{name}.{part}"] for part in ("down.weight", "down.bias", "up.weight", "up.bias")
        ]
        adapters[site] = (
            Adapter(*[values for values, _ in parts]),
            Adapter(*[gradient for _, gradient in parts]),
        )
    return adapters


def _lora_by_block(sites: Sequence[LoraSite], views: Views) -> dict[int, dict[str, list[Lora]]]:
    blocks: dict[int, dict[str, list[Lora]]] = defaultdict(lambda: defaultdict(list))
    for site in sites:
        _, _, number, kind = site.path.split(".", 3)
        place, third = _PROJECTIONS[kind]
        columns = slice(None)
        if third is not None:
            columns = slice(third * site.outputs, (third + 1) * site.outputs)
        a, a_gradient = views[f"{site.path}.lora_A.weight"]
        b, b_gradient = views[f"{site.path}.lora_B.weight"]
        module = Lora(
            a=a,
            b=b,
            a_gradient=a_gradient,
            b_gradient=b_gradient,
            columns=columns,
            site=site.path,
        )
        blocks[int(number)][place].append(module)
    return {number: dict(places) for number, places in blocks.items()}
