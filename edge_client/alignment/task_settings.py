"""What a task says of alignment, as each algorithm takes it."""

from __future__ import annotations

from collections.abc import Sequence

from device_profiles.methods import Objective
from edge_client.alignment.settings import PpoSettings, RlooSettings
from messaging.protocol import AlignmentSettings, Preference, Task

SAMPLES = 4  # of a prompt, in RLOO
PPO = PpoSettings()


def alignment_settings(task: Task) -> AlignmentSettings:
    """Return what a task says of alignment, or what goes without saying."""
    return task.alignment or AlignmentSettings()


def ppo_settings(task: Task, responses: int) -> PpoSettings:
    """Return PPO's settings for a batch of so many responses."""
    settings = alignment_settings(task)
    return PpoSettings(
        rollouts=settings.rollouts,
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        kl_coefficient=settings.kl_coefficient,
        kl_target=settings.kl_target or None,
        learning_rate=task.learning_rate,
        minibatches=min(PPO.minibatches, responses),
    )


def rloo_settings(task: Task) -> RlooSettings:
    """Return RLOO's settings."""
    settings = alignment_settings(task)
    return RlooSettings(
        rollouts=settings.rollouts,
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        kl_coefficient=settings.kl_coefficient,
        kl_target=settings.kl_target or None,
        learning_rate=task.learning_rate,
        samples=SAMPLES,
    )


def weights(objectives: Sequence[Objective], preference: Preference) -> dict[str, float]:
    """Return the weight of each objective; one alone has all of it."""
    if len(objectives) == 1:
        return {objectives[0]: 1.0}
    return {name: float(getattr(preference, name)) for name in objectives}
