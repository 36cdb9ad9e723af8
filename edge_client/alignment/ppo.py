"""One step of PPO with a critic for each objective, on responses that the policy has drawn.

Every objective has a reward stream (its score on the last action), values and an advantage of its
own; the KL penalty has a stream too, without values. Advantages are whitened and weighted, the
penalty's is added as it is (``advantages.combine``): its scale against the others is the
coefficient's. Critics learn the returns of their own stream, without the penalty.
Shape letters: B responses, N actions of all of them, F features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from edge_client.alignment.advantages import Stream, check_weights, combine, gae, on_last
from edge_client.alignment.critic import Critic
from edge_client.alignment.figures import StepFigures, measure, step_figures
from edge_client.alignment.rollouts import Rollout, paid
from edge_client.alignment.settings import PpoSettings
from edge_client.alignment.update import improve
from edge_client.descent import Descent
from edge_client.peft.packed_model import PackedModel
from messaging.layout import Vector


def ppo_step(
    model: PackedModel,
    descent: Descent,
    critics: Mapping[str, Critic],
    rollouts: Sequence[Rollout],
    *,
    reference: Vector,
    weights: Mapping[str, float],
    kl_coefficient: float,
    settings: PpoSettings,
    seed: int,
    words: tuple[str | int, ...],
) -> StepFigures:
    """Improve policy and critics on one batch of responses.

    Args:
        model: The policy that drew them; it is trained in place.
        descent: Of its parameter, see ``policy_descent``.
        critics: One an objective; they are trained in place.
        rollouts: At least as many as minibatches.
        reference: State of stage 1 that the KL penalty holds the policy to. Shape (size,).
        weights: Of the critics' objectives, with the sum 1.
        kl_coefficient: Reward that a nat costs in this step.
        settings: Of PPO.
        seed: Of the run.
        words: Client, round and step; the same seed and words give the same bits.

    Raises:
        InputError: If weights, reference or minibatches do not fit, or training diverges.
    """
    check_weights(weights, list(critics))
    found = measure(model, rollouts, reference, settings)
    features = {name: torch.cat([r.features[name] for r in rollouts]) for name in critics}  # (N, F)
    penalty = -kl_coefficient * (found.acting - found.reference)

    def advantage(rewards: Stream, values: Stream) -> Stream:
        return gae(rewards, values, found.lengths, gamma=settings.gamma, lam=settings.lam)

    values = {name: critic.values(features[name]) for name, critic in critics.items()}
    advantages = {
        name: advantage(on_last(paid(rollouts, name, settings.no_end_penalty), found.lengths), v)
        for name, v in values.items()
    }
    returns = {name: advantages[name] + v for name, v in values.items()}
    losses: dict[str, list[float]] = {name: [] for name in critics}

    def teach(actions: Tensor) -> None:
        places = actions.cpu().numpy()
        for name, critic in critics.items():
            mine = features[name][actions.to(features[name].device)]
            old, wanted = values[name][places], returns[name][places]
            losses[name].append(critic.improve(mine, old, wanted, settings.value_clip))

    improvement = improve(
        model,
        descent,
        [r.example for r in rollouts],
        found.old,
        combine(advantages, weights, advantage(penalty, np.zeros_like(penalty))),
        settings=settings,
        seed=seed,
        words=words,
        beside=teach,
    )
    return step_figures(
        rollouts,
        found,
        weights,
        kl_coefficient,
        improvement,
        value_losses={name: float(np.mean(seen)) for name, seen in losses.items() if seen},
        settings=settings,
    )
