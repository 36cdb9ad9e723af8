"""A frozen base with its small modules on, for training steps on packed tokens.

It computes what ``TunedModel`` computes, without padding, autograd or the library's model: the
trainable tensors are one buffer, and a step writes their gradients into another. One packed model
serves many clients, one at a time: a client is the beginning of the buffer.
Shape letters: N tokens of a batch, P response tokens, D model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from device_profiles.errors import InputError
from device_profiles.modules import (
    adapter_tensors,
    first_lora_sites,
    lora_tensors,
)
from device_profiles.modules import lora_rank as check_lora_rank
from edge_client.data.packing import Packed
from edge_client.peft.attention import Group, plan_attention
from edge_client.peft.dropout import LoraDropout
from edge_client.peft.flat_state import FlatState, named
from edge_client.peft.functions import cross_entropy, score
from edge_client.peft.packed_network import (
    Kept,
    block_backward,
    block_forward,
    norm_backward,
    norm_forward,
)
from edge_client.peft.tuned_block import TunedBlock, Views, tuned_blocks
from messaging.layout import Tensors, Vector
from quantization.frozen_gpt2 import FrozenBase


@dataclass(frozen=True, kw_only=True)
class Trace:
    """A forward pass.

    Attributes:
        hidden: Last hidden states at the batch's places, normalised. Shape (P, D).
        last: The same before the last norm.
        scale: What that norm found: means and inverse deviations.
        kept: What each block keeps; or
        inputs: what each block was given.
        drop: Dropout on what LoRA was given.
    """

    hidden: Tensor
    batch: Packed
    groups: list[Group]
    last: Tensor
    scale: tuple[Tensor, Tensor]
    kept: list[Kept]
    inputs: list[Tensor]
    drop: LoraDropout | None = None


class PackedModel:
    """A base, its adapters and its LoRA modules.

    Args:
        base: Frozen; it is shared, not changed.
        adapter_size: Bottleneck size M; 0 for none.
        placement: Row of ``device_profiles.modules.PLACEMENTS``.
        lora_count: The most LoRA modules that any client has here; 0 for none.
        lora_rank: Rank R.

    Raises:
        InputError: If size, rank, count or placement do not fit the base.
    """

    def __init__(
        self,
        base: FrozenBase,
        *,
        adapter_size: int,
        placement: str,
        lora_count: int,
        lora_rank: int,
    ) -> None:
        self.base = base
        shape = base.identity.shape
        self._sites = first_lora_sites(shape, placement, lora_count)
        adapters = adapter_tensors(shape, adapter_size) if adapter_size else []
        if self._sites:
            check_lora_rank(shape, lora_rank)
        tensors = [*adapters, *lora_tensors(self._sites, lora_rank)]
        positions = base.weights.positions
        self._adapters = len(adapters)
        self._state = FlatState(tensors, positions.dtype, positions.device)
        self._views: Views = {}
        self._blocks: list[TunedBlock] = []
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
        count = self._adapters + 2 * lora_count
        size = self._state.size(count)
        self._views = self._state.views(count)
        self._values, self._gradient = self._state.values[:size], self._state.gradient[:size]
        adapted = self._adapters > 0
        self._blocks = tuned_blocks(
            self.base.weights, self._sites[:lora_count], self._views, adapted
        )

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self._values.device

    @property
    def blocks(self) -> Sequence[TunedBlock]:
        """The base's blocks with the modules that are active now."""
        return self._blocks

    # -- the trainable tensors ---------------------------------------------------------------------

    def trainable(self) -> dict[str, Tensor]:
        """Return the tensors that train, by the names under which they are kept (views)."""
        return {name: values for name, (values, _) in self._views.items()}

    def gradients(self) -> dict[str, Tensor]:
        """Return their gradients by name (views)."""
        return {name: gradient for name, (_, gradient) in self._views.items()}

    def parameter(self) -> nn.Parameter:
        """Return all that trains as one parameter, its ``grad`` the buffer that a step fills."""
        parameter = nn.Parameter(self._values)
        parameter.grad = self._gradient
        return parameter

    def put(self, tensors: Tensors) -> None:
        """Copy tensors into the modules.

        Raises:
            KeyError: If a name is not one of the active modules'.
        """
        for name, values in tensors.items():
            self._views[name][0].copy_(torch.from_numpy(np.ascontiguousarray(values)))

    def take(self) -> Tensors:
        """Return copies of all active tensors."""
        return named(self.take_flat(), self.trainable())

    def put_flat(self, vector: Vector, start: int = 0) -> None:
        """Copy a run of entries into the buffer, from entry ``start``.

        Raises:
            InputError: If it does not fit the active modules.
        """
        if start < 0 or start + len(vector) > len(self._values):
            raise InputError(
                f"{len(vector)} entries from entry {start} do not fit the {len(self._values)} "
                "of the active modules; give a state of the same modules"
            )
        self._values[start : start + len(vector)] = torch.from_numpy(np.ascontiguousarray(vector))

    def take_flat(self) -> Vector:
        """Return a copy of all active entries: the adapters, then LoRA. Shape (size,)."""
        vector: Vector = self._values.to("cpu", torch.float32, copy=True).numpy()
        return vector

    # -- passes ------------------------------------------------------------------------------------

    @torch.no_grad()
    def forward(
        self, batch: Packed, *, checkpoint: bool = False, drop: LoraDropout | None = None
    ) -> Trace:
        """Return the last hidden states at the batch's places, with what ``backward`` needs.

        Args:
            batch: On this model's device.
            checkpoint: Keep a block's input only, and compute the block again on the way back.
            drop: Dropout on what LoRA is given; rows that examples share have one mask.
        """
        return self._forward(batch, "inputs" if checkpoint else "all", drop)

    @torch.no_grad()
    def backward(self, trace: Trace, gradient: Tensor, *, add: bool = False) -> None:
        """Leave the gradient of everything that trains; a trace serves once.

        Args:
            trace: Of the forward pass.
            gradient: Of the hidden states that it returned. Shape (P, D).
            add: Add to the gradient that is there instead of replacing it.
        """
        if not add:
            self._gradient.zero_()
        lowest = self._lowest()
        if lowest == len(self._blocks):
            return
        norm = self.base.weights.ln_f
        outward = norm_backward(gradient, trace.last, *trace.scale, norm)
        for i in range(len(self._blocks) - 1, lowest - 1, -1):
            block, places = self._blocks[i], self._places(i, trace.batch)
            if trace.kept:
                kept = trace.kept.pop()
            else:
                again = block_forward(
                    block, trace.inputs.pop(), trace.groups, places, drop=trace.drop
                )
                kept = again[1]
            outward = block_backward(block, outward, kept, trace.groups, places, lowest=i == lowest)

    @torch.inference_mode()
    def loss_gradient(
        self,
        batch: Packed,
        *,
        weight: float,
        add: bool = False,
        checkpoint: bool = False,
        drop: LoraDropout | None = None,
    ) -> Tensor:
        """Return the summed loss of a batch, nats, and leave ``weight`` times its gradient.

        Args:
            batch: On this model's device.
            weight: One over the response tokens that the loss is the mean of.
            add: Add to the gradient that is there instead of replacing it.
            checkpoint: Keep a block's input only, and compute the block again on the way back.
            drop: Dropout on what LoRA is given.
        """
        trace = self.forward(batch, checkpoint=checkpoint, drop=drop)
        embedding = self.base.weights.embedding
        loss, gradient = cross_entropy(trace.hidden, batch.targets, embedding, weight)
        self.backward(trace, gradient, add=add)
        return loss

    @torch.no_grad()
    def hidden(self, batch: Packed) -> Tensor:
        """Return the last hidden states at the batch's places. Shape (P, D)."""
        return self._forward(batch, "nothing").hidden

    def logits(self, batch: Packed) -> Tensor:
        """Return next-token logits at the batch's places. Shape (P, V)."""
        return self.base.weights.embedding.times(self.hidden(batch))

    @torch.inference_mode()
    def score(self, batch: Packed) -> tuple[Tensor, Tensor]:
        """Return the summed loss of a batch, nats, and how many targets it predicts (argmax)."""
        return score(self.hidden(batch), batch.targets, self.base.weights.embedding)

    def _forward(
        self,
        batch: Packed,
        keep: Literal["all", "inputs", "nothing"],
        drop: LoraDropout | None = None,
    ) -> Trace:
        weights = self.base.weights
        size = weights.positions.shape[1] // weights.heads
        dtype = weights.positions.dtype
        groups = plan_attention(batch.spans, weights.heads, size, dtype, self.device)
        hidden = weights.embedding.rows(batch.tokens) + weights.positions[batch.positions]
        kept, inputs = [], []
        lowest = self._lowest()
        for i, block in enumerate(self._blocks):
            if keep == "inputs" and i >= lowest:
                inputs.append(hidden)
            places, all_of_it = self._places(i, batch), keep == "all" and i >= lowest
            hidden, held = block_forward(block, hidden, groups, places, keep=all_of_it, drop=drop)
            if all_of_it:
                kept.append(held)
        normal, *scale = norm_forward(hidden, weights.ln_f, weights.epsilon)
        return Trace(
            hidden=normal,
            batch=batch,
            groups=groups,
            last=hidden,
            scale=(scale[0], scale[1]),
            kept=kept,
            inputs=inputs,
            drop=drop,
        )

    def _lowest(self) -> int:
        """Return the lowest block in which anything trains; the number of blocks for none."""
        return next((i for i, block in enumerate(self._blocks) if block.trains), len(self._blocks))

    def _places(self, block: int, batch: Packed) -> Tensor | None:
        return batch.places if block == len(self._blocks) - 1 else None
