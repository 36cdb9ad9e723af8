"""The bottleneck adapter, by hand."""

from __future__ import annotations

import math

import torch

from edge_client.peft.bottleneck import BottleneckAdapter


def test_an_adapter_begins_as_the_identity() -> None:
    hidden = torch.linspace(-3, 3, 24).reshape(2, 3, 4)
    assert torch.equal(BottleneckAdapter(4, 2)(hidden), hidden)


def test_an_adapter_adds_up_of_gelu_of_down() -> None:
    adapter = BottleneckAdapter(2, 1)
    with torch.no_grad():
        adapter.down.weight.copy_(torch.tensor([[1.0, 2.0]]))
        adapter.down.bias.fill_(0.5)
        adapter.up.weight.copy_(torch.tensor([[3.0], [-1.0]]))
        adapter.up.bias.copy_(torch.tensor([0.25, 0.0]))
    # down: 1*1 + 2*(-0.25) + 0.5 = 1, and gelu(1) is the normal distribution function at 1
    narrow = 0.5 * (1 + math.erf(1 / math.sqrt(2)))
    expected = torch.tensor([1 + 3 * narrow + 0.25, -0.25 - narrow])
    torch.testing.assert_close(adapter(torch.tensor([1.0, -0.25])), expected)


def test_an_adapter_holds_2dm_d_and_m_parameters() -> None:
    adapter = BottleneckAdapter(768, 10)
    assert sum(p.numel() for p in adapter.parameters()) == 2 * 768 * 10 + 768 + 10
