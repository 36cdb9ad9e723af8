"""A frozen base with its small modules on: 36 adapters after three sites a block, LoRA by peft.

One tuned model serves many clients, one at a time: a client is its tensors, and ``put`` swaps them.
LoRA sits on every site that any client of this process uses; a client with fewer switches the rest
off, which then cost nothing and change nothing.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from device_profiles.errors import InputError
from device_profiles.families import FAMILIES
from device_profiles.modules import (
    ADAPTER_SITES,
    LoraSite,
    adapter_name,
    adapter_tensors,
    first_lora_sites,
)
from device_profiles.modules import lora_rank as check_lora_rank
from edge_client.peft.bottleneck import BottleneckAdapter
from edge_client.peft.dropout import LoraDropout
from messaging.layout import Tensors
from quantization.base_model import Base, split_attention

_PEFT_NAME = "default"


class TunedModel:
    """A base, its adapters and its LoRA modules.

    Args:
        base: Frozen; it is changed in place (hooks, and projections wrapped by peft).
        adapter_size: Bottleneck size M; 0 for none.
        placement: Row of ``device_profiles.modules.PLACEMENTS``.
        lora_count: The most LoRA modules that any client has here; 0 for none.
        lora_rank: Rank R.

    Raises:
        InputError: If size, rank, count or placement do not fit the base.
    """

    def __init__(
        self, base: Base, *, adapter_size: int, placement: str, lora_count: int, lora_rank: int
    ) -> None:
        self.base = base
        self.model = base.model
        shape = base.identity.shape
        self._sites = first_lora_sites(shape, placement, lora_count)
        self._adapter_names = (
            [t.name for t in adapter_tensors(shape, adapter_size)] if adapter_size else []
        )
        if self._sites:
            check_lora_rank(shape, lora_rank)
        self._adapters = _add_adapters(base, adapter_size) if adapter_size else {}
        if any(".c_attn." in site.path for site in self._sites):
            split_attention(self.model)
        if self._sites:
            _add_lora(self.model, self._sites, lora_rank)
        self._lora = {site.path: self.model.get_submodule(site.path) for site in self._sites}
        #: Dropout on what LoRA modules are given; none leaves nothing out.
        self.drop: LoraDropout | None = None
        for path, module in self._lora.items():
            dropouts: Any = module.lora_dropout
            dropouts[_PEFT_NAME] = _SiteDropout(self, path)
        self.model.eval()  # dropout stays off; gradients do not need training mode
        self._active: dict[str, nn.Parameter] = {}
        self.activate(lora_count)

    def activate(self, lora_count: int) -> None:
        """Switch the first ``lora_count`` LoRA modules on and the others off.

        Raises:
            InputError: If there are fewer on this model.
        """
        if not 0 <= lora_count <= len(self._sites):
            raise InputError(
                f"LoRA count {lora_count} on a model that was given {len(self._sites)}; "
                "build it with the largest count of its clients"
            )
        self._active = {}
        for name in self._adapter_names:
            adapter, _, part = name.rpartition(".")
            path, _, layer = adapter.rpartition(".")
            self._active[name] = getattr(getattr(self._adapters[path], layer), part)
        for i, site in enumerate(self._sites):
            module: Any = self._lora[site.path]
            module.enable_adapters(i < lora_count)
            if i < lora_count:
                for factor in ("lora_A", "lora_B"):
                    parameter = getattr(module, factor)[_PEFT_NAME].weight
                    self._active[f"{site.path}.{factor}.weight"] = parameter
        for parameter in self._active.values():  # peft freezes whatever it did not add
            parameter.requires_grad_(True)

    def trainable(self) -> dict[str, nn.Parameter]:
        """Return the parameters that train, by the names under which they are kept."""
        return dict(self._active)

    def put(self, tensors: Tensors) -> None:
        """Copy tensors into the modules.

        Raises:
            KeyError: If a name is not one of the active modules'.
        """
        with torch.no_grad():
            for name, values in tensors.items():
                self._active[name].copy_(torch.from_numpy(np.ascontiguousarray(values)))

    def take(self) -> Tensors:
        """Return copies of all active tensors."""
        return {
            n: p.detach().to(torch.float32).cpu().numpy().copy() for n, p in self._active.items()
        }

    def hidden(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the last hidden states; rows are padded on the right. Shape (B, T) -> (B, T, D).

        With causal attention, what is right of a token cannot reach it, so no mask is needed.
        """
        states: torch.Tensor = self.model.base_model(input_ids=tokens).last_hidden_state
        return states

    def logits_at(self, tokens: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """Return next-token logits at the chosen places only. Shapes (B, T), (B, T) -> (N, V)."""
        chosen = self.hidden(tokens)[places]  # (N, D)
        logits: torch.Tensor = self.model.get_output_embeddings()(chosen)
        return logits


class _SiteDropout(nn.Module):
    """peft's dropout of one module, with the masks that the model's ``drop`` says."""

    def __init__(self, owner: TunedModel, site: str) -> None:
        super().__init__()
        self._owner, self._site = owner, site

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        drop = self._owner.drop
        if drop is None:
            return inputs
        return inputs * drop.kept(self._site, inputs.shape, inputs.device) * drop.scale


def _add_adapters(base: Base, size: int) -> dict[str, BottleneckAdapter]:
    """Register adapters on the model, and a hook at each site that applies one."""
    adapters: dict[str, BottleneckAdapter] = {}
    width, family = base.identity.shape.width, FAMILIES[base.identity.shape.family]
    for i, block in enumerate(base.model.get_submodule(family.blocks)):
        places = {"attention": getattr(block, family.attention), "mlp": block.mlp, "block": block}
        for site in ADAPTER_SITES:
            adapter = BottleneckAdapter(width, size)
            block.add_module(f"adapter_{site}", adapter)
            places[site].register_forward_hook(_after(adapter))
            adapters[adapter_name(i, site)] = adapter
    return adapters


def _after(adapter: BottleneckAdapter) -> Any:
    def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        # attention and (before transformers 5) the block return tuples, hidden states first
        if isinstance(output, tuple):
            return (adapter(output[0]), *output[1:])
        return adapter(output)

    return hook


def _add_lora(model: Any, sites: list[LoraSite], rank: int) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        lora_dropout=0.0,
        bias="none",
        target_modules=[site.path for site in sites],
        fan_in_fan_out=not isinstance(model.get_submodule(sites[0].path), nn.Linear),
    )
    inject_adapter_in_model(config, model, adapter_name=_PEFT_NAME)
