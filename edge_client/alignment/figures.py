"""What every step of alignment measures before it changes anything, and the figures it leaves.

Shape letters: B responses, N actions of all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from edge_client.alignment.advantages import Stream
from edge_client.alignment.kl import adapted, summed
from edge_client.alignment.policy import all_log_probabilities, values_of
from edge_client.alignment.rollouts import Rollout, mean_scores
from edge_client.alignment.settings import RolloutSettings
from edge_client.alignment.update import Improvement
from edge_client.peft.packed_model import PackedModel
from messaging.layout import Vector


@dataclass(frozen=True, kw_only=True)
class StepFigures:
    """What a step of alignment found and did; the responses are those before its updates.

    Attributes:
        responses: B.
        scores: Mean of each objective's re-centred scores, without penalties.
        weighted_score: Their sum by the client's weights.
        ended: Share of responses that ended by themselves.
        tokens: Mean length, without the end token.
        kl: From the reference, nats a response: mean of ``sum_t (log p_acting - log p_reference)``
            over responses that the policy drew.
        entropy: Nats an action: mean of ``-log p`` over the actions that it drew.
        kl_coefficient: Of this step; and
        next_kl_coefficient: of the next.
        value_losses: Mean clipped loss of each critic; empty without critics.
        improvement: What the updates were like.
    """

    responses: int
    scores: dict[str, float]
    weighted_score: float
    ended: float
    tokens: float
    kl: float
    entropy: float
    kl_coefficient: float
    next_kl_coefficient: float
    value_losses: dict[str, float]
    improvement: Improvement


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Log-probabilities of all actions: under the policy that acted, and under the reference.

    Attributes:
        old: On the model's device. Shape (N,).
        acting: The same numbers. Shape (N,).
        reference: Shape (N,).
        lengths: Actions of each response.
    """

    old: Tensor
    acting: Stream
    reference: Stream
    lengths: list[int]


def measure(
    model: PackedModel, rollouts: Sequence[Rollout], reference: Vector, settings: RolloutSettings
) -> Measured:
    """Return the log-probabilities that a step begins with; the model keeps its own values.

    Raises:
        InputError: If the reference is not of the active modules.
    """
    examples = [r.example for r in rollouts]
    how = settings.temperature, settings.most_tokens
    old = all_log_probabilities(model, examples, *how)
    with values_of(model, reference):
        before = all_log_probabilities(model, examples, *how)
    return Measured(
        old=old,
        acting=old.to("cpu", torch.float64).numpy(),
        reference=before.to("cpu", torch.float64).numpy(),
        lengths=[r.actions for r in rollouts],
    )


def step_figures(
    rollouts: Sequence[Rollout],
    found: Measured,
    weights: Mapping[str, float],
    kl_coefficient: float,
    improvement: Improvement,
    *,
    settings: RolloutSettings,
    value_losses: Mapping[str, float] | None = None,
) -> StepFigures:
    """Return the figures of a step, with the KL coefficient of the next."""
    kl = float(summed(found.acting, found.reference, found.lengths).mean())
    following = kl_coefficient
    if settings.kl_target is not None:
        following = adapted(
            kl_coefficient,
            kl,
            responses=len(rollouts),
            target=settings.kl_target,
            horizon=settings.kl_horizon,
        )
    scores = mean_scores(rollouts)
    return StepFigures(
        responses=len(rollouts),
        scores=scores,
        weighted_score=sum(weights[name] * scores[name] for name in weights),
        ended=float(np.mean([r.ended for r in rollouts])),
        tokens=float(np.mean([r.tokens for r in rollouts])),
        kl=kl,
        entropy=-float(found.acting.mean()),
        kl_coefficient=kl_coefficient,
        next_kl_coefficient=following,
        value_losses=dict(value_losses or {}),
        improvement=improvement,
    )
