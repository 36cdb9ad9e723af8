"""REINFORCE with a leave-one-out baseline: several responses to a prompt judge one another.

No critics. A response has one reward: its objectives' scores, each whitened over the batch and then
weighted as PPO weights advantages, less the KL penalty of the whole response. What it is better by
than the mean of the prompt's other responses is the advantage of each of its actions.
Deviation from Ahmadian et al., Back to basics, 2024: their loss is a mean over responses, this one
over actions, as PPO's here; the two differ by the mean length, a factor that Adam takes out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from device_profiles.errors import InputError
from edge_client.alignment.advantages import check_weights, combine, leave_one_out
from edge_client.alignment.figures import StepFigures, measure, step_figures
from edge_client.alignment.kl import summed
from edge_client.alignment.rollouts import Rollout, paid
from edge_client.alignment.settings import RlooSettings
from edge_client.alignment.update import improve
from edge_client.descent import Descent
from edge_client.peft.packed_model import PackedModel
from messaging.layout import Vector


def rloo_step(
    model: PackedModel,
    descent: Descent,
    rollouts: Sequence[Rollout],
    *,
    reference: Vector,
    weights: Mapping[str, float],
    kl_coefficient: float,
    settings: RlooSettings,
    seed: int,
    words: tuple[str | int, ...],
) -> StepFigures:
    """Improve the policy on one batch of responses.

    Args:
        model: The policy that drew them; it is trained in place.
        descent: Of its parameter, see ``policy_descent``.
        rollouts: The ``settings.samples`` responses to a prompt follow one another.
        reference: State of stage 1 that the KL penalty holds the policy to. Shape (size,).
        weights: Of the objectives that the rollouts have scores of, with the sum 1.
        kl_coefficient: Reward that a nat costs in this step.
        settings: Of RLOO.
        seed: Of the run.
        words: Client, round and step; the same seed and words give the same bits.

    Raises:
        InputError: If weights, reference, minibatches or groups do not fit, or training diverges.
    """
    check_weights(weights, list(rollouts[0].scores))
    _check_groups(rollouts, settings.samples)
    found = measure(model, rollouts, reference, settings)
    rewards = combine(
        {name: paid(rollouts, name, settings.no_end_penalty) for name in weights},
        weights,
        -kl_coefficient * summed(found.acting, found.reference, found.lengths),
    )
    improvement = improve(
        model,
        descent,
        [r.example for r in rollouts],
        found.old,
        np.repeat(leave_one_out(rewards, settings.samples), found.lengths),
        settings=settings,
        seed=seed,
        words=words,
    )
    return step_figures(rollouts, found, weights, kl_coefficient, improvement, settings=settings)


def _check_groups(rollouts: Sequence[Rollout], samples: int) -> None:
    prompts = [r.example.tokens[: r.example.response_start] for r in rollouts]
    for start in range(0, len(prompts), samples):
        group = prompts[start : start + samples]
        if len(group) < samples or any(not np.array_equal(group[0], p) for p in group):
            raise InputError(
                f"response {start}: samples = {samples} responses to its prompt must follow one "
                "another; draw so many for each prompt"
            )
