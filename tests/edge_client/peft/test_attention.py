"""Attention on packed rows, against torch's on each example by itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from edge_client.data.packing import Packed, pack
from edge_client.data.prompts import Encoded
from edge_client.peft import attention
from edge_client.peft.attention import attention_backward, attention_forward, plan_attention

HEADS, SIZE = 3, 4
WIDTH = HEADS * SIZE
CPU = torch.device("cpu")

# shared: [1, 2] and [1, 2, 3, 4]; the last has one row of its own; lengths differ much
TOKENS = [
    [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 0],
    [1, 2, 9, 9, 0],
    [8, 8, 0],
    [1, 2, 3, 4, 9, 7, 0],
    [1, 2, 9, 9, 5, 0],
]


def batch(share: bool) -> Packed:
    examples = [Encoded(tokens=np.array(t), response_start=1) for t in TOKENS]
    return pack(examples, share=share)


def one_by_one(joint: Tensor, packed: Packed) -> Tensor:
    """Return attention of each example by itself, at its own rows."""
    parts = []
    for span in packed.spans:
        rows = [*span.shared.tolist(), *range(span.start, span.stop)]
        query, key, value = (
            part.reshape(len(rows), HEADS, SIZE).transpose(0, 1)
            for part in joint[rows].split(WIDTH, dim=1)
        )
        out = scaled_dot_product_attention(query[None], key[None], value[None], is_causal=True)
        parts.append(out[0].transpose(0, 1).reshape(len(rows), WIDTH)[len(span.shared) :])
    return torch.cat(parts)


@pytest.mark.parametrize(("call_cost", "groups"), [(0, 5), (4000, 3), (1 << 30, 1)])
@pytest.mark.parametrize("share", [True, False])
def test_attention_and_its_gradient_are_those_of_each_example_by_itself(
    share: bool, call_cost: int, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_CALL_COST", call_cost)
    packed = batch(share)
    plan = plan_attention(packed.spans, HEADS, SIZE, torch.float64, CPU)
    assert (len(plan) == groups) or call_cost == 4000
    generator = torch.Generator().manual_seed(3)
    shape = (len(packed.tokens), 3 * WIDTH)
    joint = torch.randn(shape, dtype=torch.float64, generator=generator, requires_grad=True)
    expected = one_by_one(joint, packed)
    outward = torch.randn(expected.shape, dtype=torch.float64, generator=generator)
    (gradient,) = torch.autograd.grad(expected, joint, outward)
    mixed, kept = attention_forward(joint.detach(), plan, HEADS)
    # rounding in double
    torch.testing.assert_close(mixed, expected.detach(), rtol=0, atol=1e-13)
    found = attention_backward(outward, joint.detach(), plan, kept, HEADS)
    torch.testing.assert_close(found, gradient, rtol=0, atol=1e-12)


def test_examples_of_one_length_go_through_together_and_a_far_longer_one_apart() -> None:
    lengths = [40, 40, 41, 400]
    tokens = [np.arange(n) + 1000 * i for i, n in enumerate(lengths)]
    packed = pack([Encoded(tokens=t, response_start=1) for t in tokens])
    plan = plan_attention(packed.spans, 12, 64, torch.float32, CPU)
    assert [group.shape for group in plan] == [(3, 40, 40), (1, 399, 399)]
    assert [(group.start, group.stop) for group in plan] == [(0, 118), (118, 517)]
