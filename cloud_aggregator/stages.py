"""The stages of a run: what each shares and how it ends, and when alignment has gone wrong.

A run's rounds are numbered through all its stages, so a round's number names one state everywhere.
Units: nats for losses and divergence; rewards are re-centred scores (deviations of the reference
set's scores).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from cloud_aggregator.records import GlobalRound, RoundRecord
from cloud_aggregator.restraint import RestraintSettings
from cloud_aggregator.rounds import Convergence
from device_profiles.errors import InputError
from messaging.layout import Layout
from messaging.protocol import AlignmentSettings, Stage

#: Why ``collapse`` takes a round back, for people.
TAKEN_BACK = {
    "kl-limit": "the policy went further from stage 1 than kl_limit allows",
    "reward-collapse": "the reward fell below its beginning by more than reward_drop",
}


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """One stage of a run.

    Attributes:
        layout: The tensors that travel in it: the allow-list.
        epsilon: Nats (of alignment: of weighted reward) by which a round must improve to count.
        patience: Rounds without improvement after which the stage has converged; 0 for never.
        margin: Of the Bradley-Terry loss, by which a chosen response should score higher.
        alignment: How devices align their models; only in that stage.
        reward_drop: Fall of the weighted reward below the stage's beginning at which a round is
            taken back.
        restraint: What holds instruction tuning back; in other stages nothing.
    """

    stage: Stage
    layout: Layout
    rounds: int
    local_steps: int
    batch_size: int
    learning_rate: float
    epsilon: float
    patience: int
    margin: float = 0.0
    alignment: AlignmentSettings | None = None
    reward_drop: float = math.inf
    restraint: RestraintSettings = field(default_factory=RestraintSettings)


def measure(stage: Stage, figures: GlobalRound) -> float | None:
    """Return what a stage makes smaller: a held-out loss, or the weighted reward below zero."""
    if stage == "instruction":
        return figures.eval_loss
    if stage == "reward":
        return figures.reward_loss
    return None if figures.weighted_reward is None else -figures.weighted_reward


def stage_end(plan: StagePlan, rounds: Sequence[RoundRecord]) -> str:
    """Return why a stage is over after these rounds of it; empty while it goes on."""
    convergence = Convergence(epsilon=plan.epsilon, patience=plan.patience)
    for record in rounds:
        if record.taken_back:
            return record.taken_back
        if convergence.observed(measure(plan.stage, record.global_)):
            return "converged"
    return "rounds" if len(rounds) >= plan.rounds else ""


def check_room(settings: AlignmentSettings, max_length: int, source: str) -> None:
    """Refuse responses that leave no room for a prompt: two stages earlier than devices would.

    Args:
        settings: Of alignment.
        max_length: Of prompt and response, tokens.
        source: Of both, for what an error says.

    Raises:
        InputError: Naming both lengths.
    """
    if settings.max_new_tokens > max_length - 2:  # a token of the prompt, and the end token
        raise InputError(
            f"{source}: max_new_tokens = {settings.max_new_tokens} leaves no room for a prompt in "
            f"max_length = {max_length}; give at most {max_length - 2}"
        )


def collapse(plan: StagePlan, change: float | None, figures: GlobalRound) -> str:
    """Return why a round of alignment is taken back; empty if it is sound.

    Args:
        plan: Of the stage.
        change: Of the clients' weighted reward since the stage began; none where unknown.
        figures: Of the round.
    """
    limit = plan.alignment.kl_limit if plan.alignment else math.inf
    if any(nats is not None and nats > limit for nats in (figures.kl, figures.drift)):
        return "kl-limit"
    if change is not None and change < -plan.reward_drop:
        return "reward-collapse"
    return ""
