"""Loading the frozen base in fp32, with query, key and value apart so that LoRA can sit on each.

Shape letters: B batch, T tokens, D model width.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from device_profiles.families import FAMILIES
from quantization.errors import BaseModelError
from quantization.identity import BaseIdentity
from quantization.tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel

log = logging.getLogger(__name__)

_PARTS = ("query", "key", "value")


class SplitProjection(nn.Module):
    """GPT-2's joint projection as three square ones, the same weights in the same order."""

    def __init__(self, joint: Any) -> None:
        super().__init__()
        width = joint.weight.shape[0]
        self.nf = 3 * width  # what transformers reads off the joint projection
        for i, name in enumerate(_PARTS):
            part = nn.Linear(width, width, device="meta")
            columns = slice(i * width, (i + 1) * width)
            part.weight = nn.Parameter(joint.weight.data[:, columns].T.contiguous())
            part.bias = nn.Parameter(joint.bias.data[columns].clone())
            setattr(self, name, part)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return query, key and value side by side. Shape (B, T, D) -> (B, T, 3 D)."""
        return torch.cat([getattr(self, name)(hidden) for name in _PARTS], dim=-1)


@dataclass(frozen=True, kw_only=True)
class Base:
    """A frozen base in memory."""

    identity: BaseIdentity
    model: Any
    tokenizer: Tokenizer

    @property
    def end_token(self) -> int:
        """Token that ends a response."""
        return int(self.tokenizer.eos_token_id)


def set_threads(threads: int) -> None:
    """Pin how many processor threads this process computes with; the bits depend on it."""
    torch.set_num_threads(threads)


def load_base(identity: BaseIdentity) -> Base:
    """Return the base in fp32, every parameter frozen, dropout off.

    Raises:
        BaseModelError: If the weights do not fit the configuration or are damaged, or the
            tokenizer does not fit the weights.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    try:
        model, notes = AutoModelForCausalLM.from_pretrained(
            identity.folder,
            dtype=torch.float32,
            attn_implementation="sdpa",
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as err:
        raise BaseModelError(f"{identity.folder} cannot be loaded: {_line(err)}") from err
    if notes["missing_keys"]:
        raise BaseModelError(
            f"{identity.folder} lacks {len(notes['missing_keys'])} tensors of a "
            f"{FAMILIES[identity.shape.family].title}, "
            f"'{sorted(notes['missing_keys'])[0]}' among them"
        )
    tokenizer = load_tokenizer(identity)
    return Base(identity=identity, model=_frozen(model), tokenizer=tokenizer)


def unloaded_model(identity: BaseIdentity) -> Any:
    """Return a model as ``load_base`` does, with weights that nothing was read into.

    Raises:
        BaseModelError: If the library makes nothing of its configuration.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(identity.folder, local_files_only=True)
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation="sdpa"
        )
    except (OSError, ValueError, KeyError, RuntimeError) as err:
        raise BaseModelError(f"{identity.folder} cannot be loaded: {_line(err)}") from err
    return _frozen(model)


def _frozen(model: Any) -> Any:
    model.requires_grad_(False)
    model.eval()
    model.config.use_cache = False
    return model


def _line(err: Exception) -> str:
    return f"{str(err).strip()}\n".splitlines()[0][:200]


def split_attention(model: GPT2LMHeadModel) -> None:
    """Replace every joint attention projection by three (in place)."""
    for block in model.transformer.h:
        if not isinstance(block.attn.c_attn, SplitProjection):
            block.attn.c_attn = SplitProjection(block.attn.c_attn)
            block.attn.c_attn.requires_grad_(False)


def joined_state(model: GPT2LMHeadModel) -> dict[str, torch.Tensor]:
    """Return the state of a plain GPT-2 from a split one: the inverse of ``split_attention``.

    Modules that were put on the base must have been taken off or merged before.
    """
    state = dict(model.state_dict())
    for i, block in enumerate(model.transformer.h):
        joint = block.attn.c_attn
        if not isinstance(joint, SplitProjection):
            continue
        place = f"transformer.h.{i}.attn.c_attn"
        for name in _PARTS:
            del state[f"{place}.{name}.weight"], state[f"{place}.{name}.bias"]
        parts = [getattr(joint, name) for name in _PARTS]
        state[f"{place}.weight"] = torch.cat([p.weight.data.T for p in parts], dim=1)
        state[f"{place}.bias"] = torch.cat([p.bias.data for p in parts])
    return state
