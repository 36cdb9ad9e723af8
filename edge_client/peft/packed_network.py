"""A frozen GPT-2 with adapters and LoRA on packed tokens: both passes of a block, by hand.

Shape letters: N tokens of a batch, D model width, P rows that are wanted of the last block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from edge_client.peft.attention import Group, attention_backward, attention_forward
from edge_client.peft.dropout import LoraDropout, Masks
from edge_client.peft.functions import (
    adapter_backward,
    adapter_forward,
    gelu_forward,
    lora_backward,
    lora_forward,
)
from edge_client.peft.tuned_block import TunedBlock
from quantization.frozen_gpt2 import Norm

#: What a projection is given comes from a norm, and is cheaper normalised again than kept.
_NORMS = {"qkv": "ln_1", "mlp_in": "ln_2"}

_aten = torch.ops.aten


@dataclass
class Kept:
    """What a block's backward pass needs of its forward pass."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    attention: list[Tensor] = field(default_factory=list)
    lora: dict[str, list[Tensor]] = field(default_factory=dict)
    masks: dict[str, Masks] = field(default_factory=dict)


def block_forward(
    block: TunedBlock,
    inputs: Tensor,
    groups: Sequence[Group],
    places: Tensor | None,
    *,
    keep: bool = True,
    drop: LoraDropout | None = None,
) -> tuple[Tensor, Kept]:
    """Return a block's output at ``places`` (everywhere for none), and what backward needs.

    Shape (N, D) -> (P, D).
    """
    kept = Kept()
    joint = project(block, inputs, kept, drop)
    mixed, kept.attention = attention_forward(joint, groups, block.heads)
    hidden = inputs
    if places is not None:  # nothing else of the last block is looked at
        mixed, hidden = mixed[places], inputs[places]
    hidden = finish(block, hidden, mixed, kept, slope=keep, drop=drop)
    if keep:
        kept.tensors["joint"] = joint
    return hidden, kept


def project(
    block: TunedBlock, inputs: Tensor, kept: Kept, drop: LoraDropout | None = None
) -> Tensor:
    """Return query, key and value side by side: a block up to its attention.

    Shape (N, D) -> (N, 3 D).
    """
    frozen = block.frozen
    normal = _norm(inputs, frozen.ln_1, block.epsilon, "ln_1", kept.tensors)
    joint = frozen.qkv.matrix.times(normal, frozen.qkv.bias)
    _add_lora(block, "qkv", normal, joint, kept, drop=drop)
    return joint


def finish(
    block: TunedBlock,
    inputs: Tensor,
    mixed: Tensor,
    kept: Kept,
    *,
    slope: bool,
    drop: LoraDropout | None = None,
) -> Tensor:
    """Return a block's output: all that follows its attention.

    Args:
        block: The same.
        inputs: Of the block. Shape (P, D).
        mixed: What attention gave, its heads side by side. Shape (P, D).
        kept: Added to.
        slope: Whether to keep the slope of the activation, for a backward pass.
        drop: Dropout on what LoRA is given; none leaves nothing out.

    Returns:
        Shape (P, D).
    """
    frozen, hold = block.frozen, kept.tensors
    attended = frozen.attention_out.matrix.times(mixed, frozen.attention_out.bias)
    hidden = inputs + attended
    _add_adapter(block, "attention", attended, hidden, hold)
    normal = _norm(hidden, frozen.ln_2, block.epsilon, "ln_2", hold)
    inner = frozen.mlp_in.matrix.times(normal, frozen.mlp_in.bias)
    _add_lora(block, "mlp_in", normal, inner, kept, drop=drop)
    active, slopes = gelu_forward(inner, block.gelu, slope=slope)
    changed = frozen.mlp_out.matrix.times(active, frozen.mlp_out.bias)
    _add_lora(block, "mlp_out", active, changed, kept, drop=drop)
    if slopes is not None:
        hold["slope"] = slopes
    hidden = hidden + changed
    _add_adapter(block, "mlp", changed, hidden, hold)
    if block.adapters:
        before, hidden = hidden, hidden.clone()
        _add_adapter(block, "block", before, hidden, hold)
    return hidden


def block_backward(
    block: TunedBlock,
    gradient: Tensor,
    kept: Kept,
    groups: Sequence[Group],
    places: Tensor | None,
    *,
    lowest: bool,
) -> Tensor:
    """Return the gradient of a block's input, and add to those of its modules.

    Args:
        block: The same.
        gradient: Of the block's output. Shape (P, D).
        kept: What its forward pass kept.
        groups: The same.
        places: The same.
        lowest: Whether nothing below this block trains; then what is returned is not complete.

    Returns:
        Shape (N, D).
    """
    frozen, hold = block.frozen, kept.tensors
    gradient = _adapter_backward(block, "block", gradient, hold)
    inward = _adapter_backward(block, "mlp", gradient, hold)
    active = frozen.mlp_out.matrix.times_transposed(inward)
    _lora_backward(block, "mlp_out", inward, active, kept)
    inner = active.mul_(hold["slope"])
    normal = frozen.mlp_in.matrix.times_transposed(inner)
    _lora_backward(block, "mlp_in", inner, normal, kept)
    gradient = gradient + _norm_backward(normal, frozen.ln_2, "ln_2", hold)
    inward = _adapter_backward(block, "attention", gradient, hold)
    if lowest and "qkv" not in block.lora:
        return gradient
    mixed = frozen.attention_out.matrix.times_transposed(inward)
    if places is not None:
        mixed = _spread(mixed, places, hold["ln_1.inputs"])
        gradient = _spread(gradient, places, hold["ln_1.inputs"])
    joint = attention_backward(mixed, hold["joint"], groups, kept.attention, block.heads)
    if lowest:
        _lora_backward(block, "qkv", joint, None, kept)
        return gradient
    normal = frozen.qkv.matrix.times_transposed(joint)
    _lora_backward(block, "qkv", joint, normal, kept)
    return gradient + _norm_backward(normal, frozen.ln_1, "ln_1", hold)


def norm_forward(inputs: Tensor, norm: Norm, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the normalised rows, their means and the inverses of their deviations."""
    out: tuple[Tensor, Tensor, Tensor] = _aten.native_layer_norm(
        inputs, inputs.shape[-1:], norm.weight, norm.bias, epsilon
    )
    return out


def norm_backward(
    gradient: Tensor, inputs: Tensor, mean: Tensor, inverse: Tensor, norm: Norm
) -> Tensor:
    """Return the gradient of the rows that were normalised."""
    out: Tensor = _aten.native_layer_norm_backward(
        gradient,
        inputs,
        inputs.shape[-1:],
        mean,
        inverse,
        norm.weight,
        norm.bias,
        [True, False, False],
    )[0]
    return out


def _norm(inputs: Tensor, norm: Norm, epsilon: float, name: str, hold: dict[str, Tensor]) -> Tensor:
    out, mean, inverse = norm_forward(inputs, norm, epsilon)
    hold[f"{name}.inputs"], hold[f"{name}.mean"], hold[f"{name}.inverse"] = inputs, mean, inverse
    return out


def _norm_backward(gradient: Tensor, norm: Norm, name: str, hold: dict[str, Tensor]) -> Tensor:
    inputs, mean, inverse = (hold[f"{name}.{part}"] for part in ("inputs", "mean", "inverse"))
    return norm_backward(gradient, inputs, mean, inverse, norm)


def _add_lora(
    block: TunedBlock,
    place: str,
    inputs: Tensor,
    out: Tensor,
    kept: Kept,
    *,
    drop: LoraDropout | None,
) -> None:
    if modules := block.lora.get(place):
        if place not in _NORMS:
            kept.tensors[place] = inputs
        if drop is not None:
            drawn = [drop.kept(module.site, inputs.shape, inputs.device) for module in modules]
            kept.masks[place] = Masks(kept=drawn, scale=drop.scale)
        kept.lora[place] = lora_forward(inputs, modules, out, masks=kept.masks.get(place))


def _lora_backward(
    block: TunedBlock, place: str, gradient: Tensor, out: Tensor | None, kept: Kept
) -> None:
    if modules := block.lora.get(place):
        if name := _NORMS.get(place):
            norm: Norm = getattr(block.frozen, name)
            inputs = norm_forward(kept.tensors[f"{name}.inputs"], norm, block.epsilon)[0]
        else:
            inputs = kept.tensors[place]
        masks = kept.masks.get(place)
        lora_backward(gradient, inputs, kept.lora[place], modules, out, masks=masks)


def _add_adapter(
    block: TunedBlock, site: str, hidden: Tensor, out: Tensor, hold: dict[str, Tensor]
) -> None:
    if block.adapters:
        hold[site] = hidden
        hold[f"{site}.narrow"], hold[f"{site}.active"] = adapter_forward(
            hidden, block.adapters[site][0], out
        )


def _adapter_backward(
    block: TunedBlock, site: str, gradient: Tensor, hold: dict[str, Tensor]
) -> Tensor:
    if not block.adapters:
        return gradient
    kept = hold[f"{site}.narrow"], hold[f"{site}.active"]
    return adapter_backward(gradient, hold[site], kept, *block.adapters[site])


def _spread(rows: Tensor, places: Tensor, like: Tensor) -> Tensor:
    """Return zeros with rows added at their places. Shape (P, D) -> (N, D)."""
    return torch.zeros_like(like).index_add_(0, places, rows)
