"""Passes written out by hand, against torch's autograd in double precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy as torch_cross_entropy
from torch.nn.functional import gelu

from edge_client.peft import functions
from edge_client.peft.functions import (
    Adapter,
    Lora,
    adapter_backward,
    adapter_forward,
    cross_entropy,
    gelu_forward,
    lora_backward,
    lora_forward,
    score,
)
from quantization.backends.dense import Fp32Matrix

ROWS, WIDTH, BOTTLENECK, RANK = 5, 6, 3, 2


@pytest.fixture(autouse=True)
def _seeded() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def doubles(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


class _Adapted(torch.autograd.Function):
    """``hidden`` plus what its adapter adds."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, *weights: Tensor) -> Tensor:
        out = hidden.clone()
        narrow, active = adapter_forward(hidden, Adapter(*weights), out)
        ctx.save_for_backward(hidden, narrow, active, *weights)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        hidden, narrow, active, *weights = ctx.saved_tensors
        gradients = [torch.zeros_like(w) for w in weights]
        inward = adapter_backward(
            gradient, hidden, (narrow, active), Adapter(*weights), Adapter(*gradients)
        )
        return (inward, *gradients)


def test_gradients_of_an_adapter_are_its_finite_differences() -> None:
    tensors = [
        doubles(ROWS, WIDTH),
        doubles(BOTTLENECK, WIDTH),
        doubles(BOTTLENECK),
        doubles(WIDTH, BOTTLENECK),
        doubles(WIDTH),
    ]
    assert torch.autograd.gradcheck(_Adapted.apply, tensors)


class _Projected(torch.autograd.Function):
    """Nothing plus what two LoRA modules, on the outer two thirds of the outputs, add."""

    @staticmethod
    def modules(factors: tuple[Tensor, ...], gradients: list[Tensor]) -> list[Lora]:
        columns = [slice(0, WIDTH), slice(2 * WIDTH, 3 * WIDTH)]
        return [
            Lora(
                a=factors[i],
                b=factors[i + 1],
                a_gradient=gradients[i],
                b_gradient=gradients[i + 1],
                columns=columns[i // 2],
            )
            for i in (0, 2)
        ]

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, *factors: Tensor) -> Tensor:
        out = inputs.new_zeros(ROWS, 3 * WIDTH)
        kept = lora_forward(inputs, _Projected.modules(factors, list(factors)), out)
        ctx.save_for_backward(inputs, *factors, *kept)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        inputs, *rest = ctx.saved_tensors
        factors, kept = tuple(rest[:4]), rest[4:]
        gradients = [torch.zeros_like(f) for f in factors]
        inward = torch.zeros_like(inputs)
        modules = _Projected.modules(factors, gradients)
        lora_backward(gradient.contiguous(), inputs, kept, modules, inward)
        return (inward, *gradients)


def lora_tensors() -> list[Tensor]:
    factors = [doubles(*shape) for shape in 2 * [(RANK, 4), (WIDTH, RANK)]]
    return [doubles(ROWS, 4), *factors]


def test_gradients_of_lora_on_parts_of_a_projection_are_their_finite_differences() -> None:
    assert torch.autograd.gradcheck(_Projected.apply, lora_tensors())


def test_lora_adds_twice_b_a_to_its_own_columns_and_leaves_the_others() -> None:
    inputs, first_a, first_b, last_a, last_b = lora_tensors()
    out = _Projected.apply(inputs, first_a, first_b, last_a, last_b)
    first, middle, last = out.chunk(3, 1)
    # the tolerance is rounding in double
    torch.testing.assert_close(first, 2 * inputs @ (first_b @ first_a).T)
    torch.testing.assert_close(last, 2 * inputs @ (last_b @ last_a).T)
    assert (middle == 0).all()


def test_lora_gradients_need_no_gradient_of_the_input() -> None:
    inputs, *factors = (t.detach() for t in lora_tensors())
    gradient = torch.randn(ROWS, 3 * WIDTH, dtype=torch.float64)
    found = []
    for wanted in (torch.zeros_like(inputs), None):
        gradients = [torch.zeros_like(f) for f in factors]
        modules = _Projected.modules(tuple(factors), gradients)
        kept = lora_forward(inputs, modules, gradient.clone())
        lora_backward(gradient, inputs, kept, modules, wanted)
        found.append(gradients)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("cached", [1, 20, 1 << 17])  # rows one by one, a few, all at once
@pytest.mark.parametrize("form", ["tanh", "none"])
def test_gelu_and_its_slope_are_those_of_torch(
    form: str, cached: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(functions, "_CACHED_ENTRIES", cached)
    inputs = torch.linspace(-12, 12, 7 * 9, dtype=torch.float64).reshape(7, 9).requires_grad_(True)
    expected = gelu(inputs, approximate=form)
    (slope,) = torch.autograd.grad(expected.sum(), inputs)
    active, found = gelu_forward(inputs.detach(), form, slope=True)
    assert found is not None
    # rounding in double, of numbers up to 12
    torch.testing.assert_close(active, expected.detach(), rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(found, slope, rtol=1e-12, atol=1e-13)
    alone, nothing = gelu_forward(inputs.detach(), form, slope=False)
    assert nothing is None
    torch.testing.assert_close(alone, expected.detach(), rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize(("chunk", "cached"), [(1 << 23, 1 << 17), (24, 11), (11, 1), (1, 1)])
@pytest.mark.parametrize("spread", [1.0, 300.0])  # logits of thousands must not overflow
def test_loss_and_gradient_are_those_of_the_whole_logits(
    chunk: int, cached: int, spread: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(functions, "_CHUNK_ENTRIES", chunk)
    monkeypatch.setattr(functions, "_CACHED_ENTRIES", cached)
    words = 11
    hidden = (spread * torch.randn(7, WIDTH, dtype=torch.float64)).requires_grad_(True)
    head = torch.randn(words, WIDTH, dtype=torch.float64)
    targets = torch.tensor([0, 3, 3, 10, 7, 1, 2])
    expected = torch_cross_entropy(hidden @ head.T, targets, reduction="sum")
    (gradient,) = torch.autograd.grad(0.25 * expected, hidden)
    loss, found = cross_entropy(hidden.detach(), targets, Fp32Matrix(head), 0.25)
    # rounding in double
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found, gradient, rtol=1e-11, atol=1e-12)
    nats, hits = score(hidden.detach(), targets, Fp32Matrix(head))
    torch.testing.assert_close(nats, expected.detach(), rtol=1e-12, atol=1e-12)
    assert int(hits) == int(((hidden @ head.T).argmax(1) == targets).sum())


class _Watched(Fp32Matrix):
    """A head that notes of how many rows logits are asked for."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight)
        self.asked: list[int] = []

    def times(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        self.asked.append(len(x))
        return super().times(x, bias)


@pytest.mark.parametrize(("rows", "parts"), [(4, [4]), (7, [4, 3]), (9, [3, 3, 3]), (1, [1])])
def test_logits_of_a_few_rows_exist_at_once_in_parts_of_about_one_size(
    rows: int, parts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(functions, "_CHUNK_ENTRIES", 4 * 11 + 5)  # four rows of 11 words
    head = _Watched(torch.randn(11, WIDTH))
    hidden, targets = torch.randn(rows, WIDTH), torch.zeros(rows, dtype=torch.long)
    cross_entropy(hidden, targets, head, 1.0)
    score(hidden, targets, head)
    assert head.asked == 2 * parts
