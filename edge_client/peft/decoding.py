"""One new token of every row at a time, with the keys and values of all before it kept.

The prompts go through the packed network once, and what they have in common is computed once. In
the cache every row ends at the same place: shorter prompts leave blank places on their left, at
which nothing looks. Nothing here is recorded for a backward pass.
Shape letters: R rows, N packed tokens, T places of the cache, H heads, D model width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from edge_client.data.packing import Packed, pack
from edge_client.data.prompts import Encoded
from edge_client.peft.attention import attention_forward, plan_attention
from edge_client.peft.functions import Lora
from edge_client.peft.packed_model import PackedModel
from edge_client.peft.packed_network import Kept, finish, norm_forward, project
from edge_client.peft.tuned_block import TunedBlock

#: Entries of a joined LoRA factor at most; of a larger one the zeros cost more than the calls save.
_JOINED_ENTRIES = 1 << 16

_Rows = npt.NDArray[np.int64]


class Decoder:
    """Rows that are being written, each a prompt and the tokens after it.

    Args:
        model: With what is active now; it must not change as long as this is used.
        prompts: At least 1, each of at least 1 token; equal ones are read once.
        steps: How often ``step`` is called at most.

    Attributes:
        logits: Of each prompt's next token. Shape (R, V).
    """

    def __init__(self, model: PackedModel, prompts: Sequence[_Rows], steps: int) -> None:
        self._weights = model.base.weights
        self._device = model.device
        self._blocks = [_with_joined_lora(block) for block in model.blocks]
        lengths = np.array([len(prompt) for prompt in prompts])
        rows, self._at = len(prompts), int(lengths.max())
        positions, heads = self._weights.positions, self._weights.heads
        size = positions.shape[1] // heads
        places = self._at + steps
        shape = (len(self._blocks), 2, rows, heads, places, size)  # 2: keys, values
        self._cache = torch.empty(shape, dtype=positions.dtype, device=self._device)
        self._blank = self._at - lengths
        self._shift = torch.from_numpy(self._blank.copy()).to(self._device)
        blank = torch.arange(places, device=self._device) < self._shift[:, None]  # (R, T)
        mask = torch.zeros(blank.shape, dtype=positions.dtype, device=self._device)
        mask.masked_fill_(blank, -math.inf)
        self._mask = mask[:, None].expand(-1, heads, -1).contiguous()  # (R, H, T)
        self.logits = self._read(prompts)

    def step(self, tokens: Tensor) -> Tensor:
        """Read one more token of every row; return the logits of the next. Shape (R,) -> (R, V)."""
        positions = self._weights.positions
        heads, at, rows = self._weights.heads, self._at, len(tokens)
        begin = int(self._blank.min())  # of the longest row that is left
        size = positions.shape[1] // heads
        hidden = self._weights.embedding.rows(tokens) + positions[at - self._shift]
        cache = self._cache[:, :, :rows]
        fresh = cache[:, :, :, :, at].unbind(0)  # (2, R, H, D/H) each
        seen = cache[:, :, :, :, begin : at + 1].flatten(2, 3)  # (blocks, 2, R*H, T, D/H)
        keys, values = seen[:, 0].transpose(2, 3).unbind(0), seen[:, 1].unbind(0)
        mask = self._mask[:rows, :, begin : at + 1].flatten(0, 1)[:, None]  # (R*H, 1, T)
        if not (self._blank > begin).any():
            mask = mask[:1, :, :1]  # rows of one length have nothing blank before them

        def attend(block: int, joint: Tensor) -> Tensor:
            parts = joint.view(rows, 3, heads, size)
            fresh[block].copy_(parts[:, 1:].transpose(0, 1))
            query = parts[:, 0].reshape(-1, 1, size)
            scores = torch.baddbmm(mask, query, keys[block], alpha=size**-0.5)
            return torch.bmm(torch.softmax(scores, -1), values[block]).view(rows, -1)

        self._at += 1
        return self._through(hidden, attend)

    def keep(self, stays: npt.NDArray[np.bool_]) -> _Rows:
        """Drop rows; return which row lies at each place now. Shape (R,) -> (those that stay,).

        The last rows that stay move to where earlier ones are dropped; all others lie still.
        """
        left = int(stays.sum())
        order = np.arange(left)
        holes, moved = np.flatnonzero(~stays[:left]), left + np.flatnonzero(stays[left:])
        for hole, row in zip(holes, moved, strict=True):
            filled = slice(self._blank[row], self._at)
            self._cache[:, :, hole, :, filled] = self._cache[:, :, row, :, filled]
        order[holes] = moved
        index = torch.from_numpy(order).to(self._device)
        self._blank = self._blank[order]
        self._shift, self._mask = self._shift[index], self._mask[index]
        return order

    def _read(self, prompts: Sequence[_Rows]) -> Tensor:
        """Fill the cache with the prompts; return the logits after them. Shape (R, V)."""
        unlike: dict[bytes, int] = {}
        which = [unlike.setdefault(p.tobytes(), len(unlike)) for p in prompts]
        asked = [prompts[which.index(i)] for i in range(len(unlike))]
        batch = pack(
            [Encoded(tokens=np.append(p, 0), response_start=len(p)) for p in asked], self._device
        )
        packed = np.zeros((len(asked), self._at), np.int64)  # any row will do where it is blank
        for row, prompt, last in zip(packed, asked, batch.places.tolist(), strict=True):
            row[self._at - len(prompt) :] = _rows_up_to(last, batch)
        index = torch.from_numpy(packed[which]).to(self._device)  # (R, T)
        positions, heads = self._weights.positions, self._weights.heads
        size = positions.shape[1] // heads
        groups = plan_attention(batch.spans, heads, size, positions.dtype, self._device)

        def attend(block: int, joint: Tensor) -> Tensor:
            parts = joint.view(len(joint), 3, heads, size)[:, 1:][index]  # (R, T, 2, H, D/H)
            self._cache[block, :, :, :, : self._at] = parts.permute(2, 0, 3, 1, 4)
            return attention_forward(joint, groups, heads)[0]

        hidden = self._weights.embedding.rows(batch.tokens) + positions[batch.positions]
        return self._through(hidden, attend, batch.places)[which]

    def _through(
        self, hidden: Tensor, attend: Callable[[int, Tensor], Tensor], places: Tensor | None = None
    ) -> Tensor:
        """Return the logits at some places. Shape (N, D) -> (P, V)."""
        for i, block in enumerate(self._blocks):
            kept = Kept()
            mixed = attend(i, project(block, hidden, kept))
            if places is not None and i == len(self._blocks) - 1:
                mixed, hidden = mixed[places], hidden[places]
            hidden = finish(block, hidden, mixed, kept, slope=False)
        normal = norm_forward(hidden, self._weights.ln_f, self._weights.epsilon)[0]
        return self._weights.embedding.times(normal)


def _rows_up_to(last: int, batch: Packed) -> _Rows:
    """Return the rows of the tokens up to the one in row ``last``, itself included."""
    span = next(span for span in batch.spans if span.start <= last < span.stop)
    return np.concatenate([span.shared, np.arange(span.start, last + 1)])


def _with_joined_lora(block: TunedBlock) -> TunedBlock:
    """Return a block with one LoRA module a projection in place of three, for forward passes."""
    joined = {}
    for place, modules in block.lora.items():
        outputs: int = getattr(block.frozen, place).matrix.outputs
        rank = sum(len(module.a) for module in modules)
        few = len(modules) > 1 and outputs * rank <= _JOINED_ENTRIES
        joined[place] = [_joined(modules, outputs)] if few else modules
    return replace(block, lora=joined)


def _joined(modules: Sequence[Lora], outputs: int) -> Lora:
    """Return modules of one projection as one: their factors below one another, zero elsewhere."""
    a = torch.cat([module.a for module in modules])  # (sum of ranks, inputs)
    b = a.new_zeros(outputs, len(a))
    start = 0
    for module in modules:
        stop = start + len(module.a)
        b[module.columns, start:stop] = module.b
        start = stop
    none = a.new_empty(0)
    return Lora(a=a, b=b, a_gradient=none, b_gradient=none, columns=slice(None))
