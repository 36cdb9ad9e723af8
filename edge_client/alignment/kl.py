"""How far a policy has gone from another, in nats, estimated on actions drawn from the first.

Shape letters: B responses, N actions of all of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from edge_client.alignment.advantages import Stream

_LARGEST_ERROR = 0.2


def summed(acting: Stream, reference: Stream, lengths: Sequence[int]) -> Stream:
    """Return ``sum_t (log p - log q)`` of each response. Shape (B,).

    Its mean over responses drawn from p is an unbiased estimate of KL(p || q) of whole responses;
    a single one may be negative.

    Args:
        acting: Log-probabilities under p, from which the responses were drawn. Shape (N,).
        reference: Under q. Shape (N,).
        lengths: Actions of each response, at least 1.
    """
    starts = np.cumsum([0, *lengths[:-1]])
    return np.asarray(np.add.reduceat(acting - reference, starts))


def approximate(old: Tensor, new: Tensor) -> Tensor:
    """Return ``q - 1 - log q`` with ``q = exp(new - old)`` of each action. Shape (N,).

    Its mean over actions drawn from the old policy is an unbiased estimate of KL(old || new) an
    action; it is never negative and varies less than ``old - new``.

    Source: Schulman, Approximating KL divergence, 2020.
    """
    log_ratio = new - old
    return torch.expm1(log_ratio) - log_ratio


def adapted(coefficient: float, kl: float, *, responses: int, target: float, horizon: int) -> float:
    """Return the coefficient of the KL penalty for the next step.

    It is multiplied by ``1 + e n / horizon`` with ``e = clamp(kl / target - 1, -0.2, 0.2)``.

    Args:
        coefficient: Of this step, reward a nat.
        kl: Mean over this step's responses, nats.
        responses: Of this step, n.
        target: Nats, above 0.
        horizon: Responses after which an error of 1 would double it.

    Source: Ziegler et al., Fine-tuning language models from human preferences, 2019, section 2.2,
    with the step in responses as their program has it.
    """
    error = min(max(kl / target - 1, -_LARGEST_ERROR), _LARGEST_ERROR)
    return coefficient * (1 + error * responses / horizon)
