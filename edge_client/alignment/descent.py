"""The optimiser of alignment: gradients are cut to a norm before a step, and nothing decays."""

from __future__ import annotations

from edge_client.descent import Descent, Moments
from edge_client.peft.packed_model import PackedModel

EPSILON = 1e-5  # of the published details of PPO; 1e-8 lets tiny gradients take full steps


def policy_descent(
    model: PackedModel, *, learning_rate: float, clip_norm: float, moments: Moments | None = None
) -> Descent:
    """Return an optimiser of all that trains on a model."""
    return Descent(
        [model.parameter()],
        model.trainable(),
        learning_rate=learning_rate,
        epsilon=EPSILON,
        clip_norm=clip_norm,
        moments=moments,
    )
