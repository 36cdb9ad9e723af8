"""Forward and backward passes of a tuned GPT-2's pieces, written out by hand.

Each ``*_forward`` has a ``*_backward`` that turns the gradient of its result into that of its
argument, and adds what belongs to a trainable tensor to that tensor's gradient in place. Nothing
here is recorded by autograd, and nothing frozen gets a gradient.
Shape letters: N tokens of a batch, one example after the other; D model width, M bottleneck size,
R rank, P response tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from edge_client.peft.dropout import Masks
from quantization.matrix import FrozenMatrix

LORA_SCALE = 2.0  # alpha / rank
_CHUNK_ENTRIES = 1 << 23  # of logits at once: 32 MiB in fp32

_CACHED_ENTRIES = 1 << 17  # of what is gone through several times
_GELU_SCALE = math.sqrt(2 / math.pi)
_GELU_CUBE = 0.044715

_aten = torch.ops.aten


@dataclass(frozen=True)
class Adapter:
    """Tensors of one adapter, or their gradients. Shapes (M, D), (M,), (D, M), (D,)."""

    down: Tensor
    down_bias: Tensor
    up: Tensor
    up_bias: Tensor


@dataclass(frozen=True, kw_only=True)
class Lora:
    """One LoRA module and its gradients.

    Attributes:
        a: Shape (R, inputs).
        b: Shape (outputs, R).
        columns: Those of the frozen projection's outputs that it adds to.
        site: Its path; what its dropout is drawn for.
    """

    a: Tensor
    b: Tensor
    a_gradient: Tensor
    b_gradient: Tensor
    columns: slice
    site: str = ""


# -- bottleneck adapter ----------------------------------------------------------------------------


def adapter_forward(hidden: Tensor, weights: Adapter, out: Tensor) -> tuple[Tensor, Tensor]:
    """Add ``up(gelu(down(hidden)))`` to ``out`` in place.

    Returns:
        ``down(hidden)`` and its GELU, (N, M) each.
    """
    narrow = torch.addmm(weights.down_bias, hidden, weights.down.t())
    active = _aten.gelu(narrow)
    out.addmm_(active, weights.up.t()).add_(weights.up_bias)
    return narrow, active


def adapter_backward(
    gradient: Tensor,
    hidden: Tensor,
    kept: tuple[Tensor, Tensor],
    weights: Adapter,
    gradients: Adapter,
) -> Tensor:
    """Return the gradient of ``hidden`` in ``hidden + up(gelu(down(hidden)))``. Shape (N, D)."""
    narrow, active = kept
    narrow_gradient = _aten.gelu_backward(gradient @ weights.up, narrow)  # (N, M)
    gradients.up.add_((active.t() @ gradient).t())  # twice as fast as addmm_ of the transposed
    gradients.up_bias.add_(gradient.sum(0))
    gradients.down.addmm_(narrow_gradient.t(), hidden)
    gradients.down_bias.add_(narrow_gradient.sum(0))
    return torch.addmm(gradient, narrow_gradient, weights.down)


# -- frozen projection with LoRA -------------------------------------------------------------------


def lora_forward(
    inputs: Tensor, modules: Sequence[Lora], out: Tensor, *, masks: Masks | None = None
) -> list[Tensor]:
    """Add what LoRA modules add to a projection's ``out`` in place; return ``inputs A^T``s."""
    kept = []
    scale = LORA_SCALE if masks is None else LORA_SCALE * masks.scale
    for i, module in enumerate(modules):
        seen = inputs if masks is None else inputs * masks.kept[i]
        low = seen @ module.a.t()  # (N, R)
        out[:, module.columns].addmm_(low, module.b.t(), alpha=scale)
        kept.append(low)
    return kept


def lora_backward(
    gradient: Tensor,
    inputs: Tensor,
    kept: Sequence[Tensor],
    modules: Sequence[Lora],
    out: Tensor | None,
    *,
    masks: Masks | None = None,
) -> None:
    """Add the modules' share of the gradient of ``inputs`` to ``out`` in place, if it is wanted."""
    scale = LORA_SCALE if masks is None else LORA_SCALE * masks.scale
    for i, (module, low) in enumerate(zip(modules, kept, strict=True)):
        part = gradient[:, module.columns]  # (N, outputs)
        low_gradient = part @ module.b  # (N, R), before the scale
        seen = inputs if masks is None else inputs * masks.kept[i]
        module.b_gradient.addmm_(part.t(), low, alpha=scale)
        module.a_gradient.addmm_(low_gradient.t(), seen, alpha=scale)
        if out is not None and masks is None:
            out.addmm_(low_gradient, module.a, alpha=scale)
        elif out is not None and masks is not None:
            out.addcmul_(low_gradient @ module.a, masks.kept[i].to(out.dtype), value=scale)


# -- activation ------------------------------------------------------------------------------------


def gelu_forward(inputs: Tensor, approximate: str, *, slope: bool) -> tuple[Tensor, Tensor | None]:
    """Return GELU and, where it is wanted, its derivative; of any shape (N, inner).

    The tanh form is ``x s(v)`` with the logistic function s and v = 2 c (x + k x^3): torch's own
    kernel for it takes four times as long here. Rows go a few at a time, to stay in the cache.
    """
    if approximate == "none":
        return _aten.gelu(inputs), (
            _aten.gelu_backward(torch.ones_like(inputs), inputs) if slope else None
        )
    active = torch.empty_like(inputs)
    slopes = torch.empty_like(inputs) if slope else None
    rows = max(1, _CACHED_ENTRIES // inputs.shape[1])
    spare = torch.empty_like(inputs[:rows])
    for start in range(0, len(inputs), rows):
        part = slice(start, start + rows)
        x, share = inputs[part], active[part]
        v = torch.mul(x, x, out=spare[: len(x)])
        torch.addcmul(x, v, x, value=_GELU_CUBE, out=v).mul_(2 * _GELU_SCALE)
        if slopes is None:
            torch.sigmoid(v, out=v)
            torch.mul(x, v, out=share)
            continue
        # s + x s' v', where x v' = 3 (v - (4 c / 3) x)
        rest = torch.add(v, x, alpha=-4 / 3 * _GELU_SCALE, out=slopes[part])
        torch.sigmoid(v, out=v)
        torch.mul(x, v, out=share)
        _aten.sigmoid_backward(rest, v, grad_input=rest)
        torch.add(v, rest, alpha=3, out=rest)
    return active, slopes


# -- loss ------------------------------------------------------------------------------------------


def cross_entropy(
    hidden: Tensor, targets: Tensor, head: FrozenMatrix, weight: float
) -> tuple[Tensor, Tensor]:
    """Return the summed loss, nats, and ``weight`` times its gradient to ``hidden``.

    The logits are computed for some rows at a time and never kept.

    Args:
        hidden: Shape (P, D).
        targets: Shape (P,).
        head: Shape (V, D).
        weight: One over the tokens that the loss is the mean of, say.
    """
    gradient = torch.empty_like(hidden)
    losses = hidden.new_empty(len(hidden), 1)
    chunk = _rows_at_once(len(hidden), head)
    for start in range(0, len(hidden), chunk):
        rows = slice(start, start + chunk)
        share, sums = _rows_gradient(hidden[rows], targets[rows, None], head, losses[rows])
        torch.mul(share, weight / sums, out=gradient[rows])
    return losses.double().sum(), gradient


def log_probabilities(
    hidden: Tensor, targets: Tensor, head: FrozenMatrix, temperature: float
) -> Tensor:
    """Return the log-probability of each target, nats; the logits are divided by ``temperature``.

    Shapes (P, D), (P,) -> (P,).
    """
    found = hidden.new_empty(len(hidden))
    chunk = _rows_at_once(len(hidden), head)
    for start in range(0, len(hidden), chunk):
        rows = slice(start, start + chunk)
        logits = head.times(hidden[rows] / temperature)  # (rows, V)
        logits.sub_(logits.amax(1, keepdim=True))
        chosen = logits.gather(1, targets[rows, None])[:, 0]
        torch.sub(chosen, logits.exp_().sum(1).log(), out=found[rows])
    return found


def log_probability_gradient(
    hidden: Tensor,
    targets: Tensor,
    head: FrozenMatrix,
    slopes: Callable[[Tensor, slice], Tensor],
    temperature: float,
) -> Tensor:
    """Return the gradient to ``hidden`` of a loss that is a function of ``log_probabilities``.

    The logits are computed once, for some rows at a time, and never kept.

    Args:
        hidden: Shape (P, D).
        targets: Shape (P,).
        head: Shape (V, D).
        slopes: From the log-probabilities of some rows, and which rows these are, the derivative of
            the loss by each. Shape (rows,) -> (rows,).
        temperature: That the logits are divided by.
    """
    gradient = torch.empty_like(hidden)
    losses = hidden.new_empty(len(hidden), 1)
    chunk = _rows_at_once(len(hidden), head)
    for start in range(0, len(hidden), chunk):
        rows = slice(start, start + chunk)
        cooled = hidden[rows] / temperature
        share, sums = _rows_gradient(cooled, targets[rows, None], head, losses[rows])
        slope = slopes(-losses[rows, 0], rows)[:, None]
        torch.mul(share, slope / (-temperature * sums), out=gradient[rows])
    return gradient


def _rows_gradient(
    hidden: Tensor, targets: Tensor, head: FrozenMatrix, losses: Tensor
) -> tuple[Tensor, Tensor]:
    """Set the losses of some rows; return their gradients times a sum each, and these sums."""
    sums = torch.empty_like(losses)
    logits = head.times(hidden)  # (rows, V)
    cached = max(1, _CACHED_ENTRIES // head.outputs)
    pieces = [torch.split(whole, cached) for whole in (logits, targets, sums, losses)]
    for piece, target, total, loss in zip(*pieces, strict=True):
        piece.sub_(piece.amax(1, keepdim=True))
        chosen = piece.gather(1, target)
        torch.sum(piece.exp_(), 1, keepdim=True, out=total)
        torch.sub(total.log(), chosen, out=loss)
        # softmax minus one-hot, times the row's sum: dividing comes cheaper after the product
        piece.scatter_add_(1, target, -total)
    return head.times_transposed(logits), sums


def score(hidden: Tensor, targets: Tensor, head: FrozenMatrix) -> tuple[Tensor, Tensor]:
    """Return the summed loss, nats, and how many targets are the likeliest token.

    Shapes (P, D), (P,).
    """
    losses, hits = [], []
    chunk = _rows_at_once(len(hidden), head)
    for rows, target in zip(torch.split(hidden, chunk), torch.split(targets, chunk), strict=True):
        logits = head.times(rows)  # (rows, V)
        best, place = logits.max(1)
        hits.append((place == target).sum())
        chosen = logits.gather(1, target[:, None])[:, 0] - best
        total = logits.sub_(best[:, None]).exp_().sum(1)
        losses.append((total.log() - chosen).double().sum())
    return torch.stack(losses).sum(), torch.stack(hits).sum()


def _rows_at_once(rows: int, head: FrozenMatrix) -> int:
    """Return how many rows' logits to hold: as few parts as may be, of about the same size."""
    most = max(1, _CHUNK_ENTRIES // head.outputs)
    return -(-rows // -(-rows // most))
