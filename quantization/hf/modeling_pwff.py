"""GPT-2 with a bottleneck adapter after attention, feed-forward network and block.

Needs transformers >= 4.57 and torch, and nothing else: a copy of this file lies in every exported
folder whose model has adapters. Load it with

    AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)

Shape letters: B batch, T tokens, D model width, M adapter size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP, GPT2Attention, GPT2Block


class PwffGPT2Config(GPT2Config):  # type: ignore[misc]
    """A GPT-2's configuration and ``adapter_size``, the adapters' bottleneck size M."""

    model_type = "pwff_gpt2"


class Adapter(nn.Module):
    """``x + up(gelu(down(x)))``: 2*D*M + D + M parameters."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.down = nn.Linear(config.n_embd, config.adapter_size)
        self.up = nn.Linear(config.adapter_size, config.n_embd)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the adapted hidden states. Shape (B, T, D) -> (B, T, D)."""
        adapted: torch.Tensor = hidden + self.up(nn.functional.gelu(self.down(hidden)))
        return adapted


def _adapted(adapter: Adapter, output: Any) -> Any:
    """Adapt a layer's hidden states, which are the first of a tuple in some versions."""
    if isinstance(output, tuple):
        return (adapter(output[0]), *output[1:])
    return adapter(output)


class AdaptedAttention(GPT2Attention):  # type: ignore[misc]
    """Attention and its adapter."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx=layer_idx)
        self.adapter = Adapter(config)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what a GPT-2's attention returns, adapted."""
        return _adapted(self.adapter, super().forward(*args, **kwargs))


class AdaptedMLP(GPT2MLP):  # type: ignore[misc]
    """The feed-forward network and its adapter."""

    def __init__(self, config: Any) -> None:
        super().__init__(config.n_inner or 4 * config.n_embd, config)
        self.adapter = Adapter(config)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what a GPT-2's feed-forward network returns, adapted."""
        return _adapted(self.adapter, super().forward(*args, **kwargs))


class AdaptedBlock(GPT2Block):  # type: ignore[misc]
    """A block of both and its own adapter."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx=layer_idx)
        self.attn = AdaptedAttention(config, layer_idx)
        self.mlp = AdaptedMLP(config)
        self.adapter = Adapter(config)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what a GPT-2's block returns, adapted."""
        return _adapted(self.adapter, super().forward(*args, **kwargs))


class PwffGPT2LMHeadModel(GPT2LMHeadModel):  # type: ignore[misc]
    """A GPT-2 that predicts the next token, with three adapters a block."""

    config_class = PwffGPT2Config
    _no_split_modules = ("AdaptedBlock",)

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        blocks = [AdaptedBlock(config, i) for i in range(config.n_layer)]
        self.transformer.h = nn.ModuleList(blocks)
        self.post_init()
