"""Causal attention on packed rows, and its backward pass, a few large products at a time.

Examples of about the same length go through together, padded to the longest of them for this one
operation: a call costs as much as some thousand scores. Only an example's own rows ask; rows that
it shares with an earlier example are looked at, not computed again.
Torch's fused kernels keep less than the weights that are kept here, but at these lengths their
backward pass takes more than twice as long.
Shape letters: N rows of a batch, D model width, H heads, E examples of a group, S own rows of the
longest of them, T rows that the longest of them looks at.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from edge_client.data.packing import Span

_CALL_COST = 1 << 20  # what one more group costs, in multiplications of scores
_SCORE_COST = 16  # of softmax and mask, likewise

_Rows = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Group:
    """Examples that go through attention together.

    The joint projection is seen as N*3*H pieces of D/H entries, the gradient to it as E*H*S pieces
    for the queries, E*H*T for the keys and as many for the values.

    Attributes:
        start: First row of the first example's own.
        stop: Row behind the last.
        shape: E, S and T.
        queries: Pieces of the joint projection. Shape (E*H*S,).
        keys_values: Likewise. Shape (2*E*H*T,).
        mask: Zero where a row may look, minus infinity elsewhere. Shape (E*H, S, T).
        outputs: For each own row and head, its piece of E*H*S. Shape ((stop - start)*H,).
        wanted: For each piece of E*H*S, its piece of a gradient of N*H pieces. Shape (E*H*S,).
        blank: Pieces of E*H*S that are padding.
        joint: For each piece of the own rows' joint projection, its piece of the gradient.
        shared_from: Pieces of the gradient that belong to rows of an earlier example.
        shared_to: Where in the joint projection they are added.
    """

    start: int
    stop: int
    shape: tuple[int, int, int]
    queries: Tensor
    keys_values: Tensor
    mask: Tensor
    outputs: Tensor
    wanted: Tensor
    blank: Tensor
    joint: Tensor
    shared_from: Tensor
    shared_to: Tensor


def plan_attention(
    spans: Sequence[Span], heads: int, size: int, dtype: torch.dtype, device: torch.device
) -> list[Group]:
    """Return the groups of a batch; ``size`` is D/H."""
    groups: list[list[Span]] = []
    for span in spans:
        if groups and _waste([*groups[-1], span]) * heads * (size + _SCORE_COST) <= _CALL_COST:
            groups[-1].append(span)
        else:
            groups.append([span])
    return [_group(members, heads, dtype, device) for members in groups]


def attention_forward(
    joint: Tensor, groups: Sequence[Group], heads: int
) -> tuple[Tensor, list[Tensor]]:
    """Return causal attention within each example, (N, D), and its weights, (E*H, S, T) a group.

    Args:
        joint: Query, key and value side by side. Shape (N, 3 D).
        groups: Of the batch.
        heads: Number of heads H.
    """
    size = joint.shape[1] // (3 * heads)
    mixed = joint.new_empty(len(joint), heads * size)
    kept = []
    for group in groups:
        query, key, value = _gather(joint, group, heads)
        scores = torch.baddbmm(group.mask, query, key.transpose(1, 2), alpha=size**-0.5)
        weights = torch.softmax(scores, -1)
        out = torch.bmm(weights, value).view(-1, size)
        torch.index_select(
            out, 0, group.outputs, out=mixed[group.start : group.stop].view(-1, size)
        )
        kept.append(weights)
    return mixed, kept


def attention_backward(
    gradient: Tensor, joint: Tensor, groups: Sequence[Group], kept: Sequence[Tensor], heads: int
) -> Tensor:
    """Return the gradient of ``joint``. Shape (N, D) -> (N, 3 D)."""
    size = joint.shape[1] // (3 * heads)
    out = torch.empty_like(joint)
    for group, weights in zip(groups, kept, strict=True):
        examples, own, length = group.shape
        query, key, value = _gather(joint, group, heads)
        outward = gradient.view(-1, size).index_select(0, group.wanted)
        outward.index_fill_(0, group.blank, 0.0)
        outward = outward.view(-1, own, size)  # (E*H, S, D/H)
        pieces = joint.new_empty(examples * heads * (own + 2 * length), size)
        to_query, to_key, to_value = torch.split(
            pieces, [examples * heads * rows for rows in (own, length, length)]
        )
        torch.bmm(weights.transpose(1, 2), outward, out=to_value.view(-1, length, size))
        scores = torch.ops.aten._softmax_backward_data(
            torch.bmm(outward, value.transpose(1, 2)), weights, -1, weights.dtype
        )
        scores *= size**-0.5
        torch.bmm(scores, key, out=to_query.view(-1, own, size))
        torch.bmm(scores.transpose(1, 2), query, out=to_key.view(-1, length, size))
        rows = out[group.start : group.stop].view(-1, size)
        torch.index_select(pieces, 0, group.joint, out=rows)
        if len(group.shared_to):
            out.view(-1, size).index_add_(
                0, group.shared_to, pieces.index_select(0, group.shared_from)
            )
    return out


def _waste(members: Sequence[Span]) -> int:
    """Return how many scores of a group are padding."""
    own = [span.stop - span.start for span in members]
    length = [_length(span) for span in members]
    return len(members) * max(own) * max(length) - sum(
        o * t for o, t in zip(own, length, strict=True)
    )


def _length(span: Span) -> int:
    return span.stop - span.start + len(span.shared)


def _gather(joint: Tensor, group: Group, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries (E*H, S, D/H), keys and values (E*H, T, D/H)."""
    _, own, length = group.shape
    size = joint.shape[1] // (3 * heads)
    pieces = joint.view(-1, size)
    query = pieces.index_select(0, group.queries).view(-1, own, size)
    key, value = pieces.index_select(0, group.keys_values).view(2, -1, length, size)
    return query, key, value


def _group(members: Sequence[Span], heads: int, dtype: torch.dtype, device: torch.device) -> Group:
    count = len(members)
    owns = np.array([span.stop - span.start for span in members])
    lengths = np.array([_length(span) for span in members])
    own, length = int(owns.max()), int(lengths.max())
    shape = (count, heads, own)
    # the row of each query and of each key, a real one where it is padding
    asking = np.array([s.start for s in members])[:, None] + np.minimum(
        np.arange(own), owns[:, None] - 1
    )  # (E, S)
    looked_at = np.zeros((count, length), np.int64)
    for rows, span in zip(looked_at, members, strict=True):
        rows[: _length(span)] = [*span.shared, *range(span.start, span.stop)]
    head = np.arange(heads)[:, None]
    queries = 3 * heads * asking[:, None] + head  # (E, H, S)
    keys = (3 * looked_at[:, None] + 1) * heads + head  # (E, H, T)
    last = np.minimum(np.arange(own), owns[:, None] - 1) + (lengths - owns)[:, None]  # (E, S)
    hidden = np.arange(length) > last[:, :, None]  # (E, S, T)
    mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(torch.from_numpy(hidden), -math.inf)
    # pieces of the results, and to which row, part and head each belongs
    asked = np.arange(math.prod(shape)).reshape(shape)  # (E, H, S)
    seen = asked.size + np.arange(2 * count * heads * length).reshape(2, count, heads, length)
    real = np.broadcast_to((np.arange(own) < owns[:, None])[:, None], shape)
    joint, shared_from, shared_to = [], [], []
    for i, span in enumerate(members):
        before = len(span.shared)
        mine = slice(before, before + int(owns[i]))
        parts = [asked[i, :, : int(owns[i])], *seen[:, i, :, mine]]
        joint.append(np.stack(parts).transpose(2, 0, 1).reshape(-1))  # row, part, head
        shared_from.append(seen[:, i, :, :before].transpose(2, 0, 1).reshape(-1))
        places = 3 * heads * np.asarray(span.shared, np.int64)[:, None, None]
        parts_and_heads = heads * np.array([1, 2])[:, None] + np.arange(heads)
        shared_to.append((places + parts_and_heads).reshape(-1))

    def index(rows: _Rows) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(rows.reshape(-1))).to(device)

    return Group(
        start=members[0].start,
        stop=members[-1].stop,
        shape=(count, own, length),
        queries=index(queries),
        keys_values=index(np.stack([keys, keys + heads])),
        mask=mask[:, None].expand(-1, heads, -1, -1).reshape(-1, own, length).to(device),
        outputs=index(np.concatenate([asked[i, :, :n].T.reshape(-1) for i, n in enumerate(owns)])),
        wanted=index(heads * asking[:, None] + head),
        blank=index(asked[~real]),
        joint=index(np.concatenate(joint)),
        shared_from=index(np.concatenate(shared_from)),
        shared_to=index(np.concatenate(shared_to)),
    )
