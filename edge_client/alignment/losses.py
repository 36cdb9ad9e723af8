"""Losses of alignment, with their derivatives by hand.

Each returns the loss of every entry and its derivative by the entry's first argument; the caller
takes the mean. Where two branches of a minimum or maximum meet, the derivative is that of the
branch that is not clipped.
Shape letters: P actions, E pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor


def clipped_policy(
    new: Tensor, old: Tensor, advantages: Tensor, clip: float
) -> tuple[Tensor, Tensor]:
    """Return ``-min(q A, clamp(q, 1 - clip, 1 + clip) A)`` with ``q = exp(new - old)``.

    Args:
        new: Log-probabilities, nats. Shape (P,).
        old: Those when the actions were taken. Shape (P,).
        advantages: Shape (P,).
        clip: How far the ratio may go before an advantage stops to count, above 0.

    Returns:
        Losses and their derivatives by ``new``, (P,) each.

    Source: Schulman et al., Proximal policy optimization algorithms, 2017, equation 7.
    """
    ratio = torch.exp(new - old)
    free = ratio * advantages
    held = ratio.clamp(1 - clip, 1 + clip) * advantages
    return -torch.minimum(free, held), torch.where(free <= held, -free, 0.0)


def clipped_value(new: Tensor, old: Tensor, returns: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """Return ``max((V - R)^2, (clamp(V, V_old - clip, V_old + clip) - R)^2) / 2``.

    Args:
        new: Values V. Shape (P,).
        old: Values when the actions were taken. Shape (P,).
        returns: What the values should have been, R. Shape (P,).
        clip: How far a value may go in one step, above 0.

    Returns:
        Losses and their derivatives by ``new``, (P,) each.
    """
    free = new - returns
    held = torch.clamp(new, old - clip, old + clip) - returns
    losses = torch.maximum(free.square(), held.square()) / 2
    return losses, torch.where(free.abs() >= held.abs(), free, 0.0)


def preference(margins: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``-w log sigmoid(margin)`` of each pair and its derivative by the margin.

    Args:
        margins: How much better the chosen side is held to be. Shape (E,).
        weights: Shape (E,).
    """
    losses = -weights * torch.nn.functional.logsigmoid(margins)
    return losses, -weights * torch.sigmoid(-margins)
