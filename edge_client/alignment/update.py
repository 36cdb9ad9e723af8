"""Clipped updates of the policy, minibatch by minibatch, on responses that it drew.

Shape letters: B responses, N actions of all of them, P actions of a minibatch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from device_profiles.errors import InputError
from device_profiles.seeds import stream
from edge_client.alignment.advantages import Stream
from edge_client.alignment.kl import approximate
from edge_client.alignment.losses import clipped_policy
from edge_client.alignment.policy import policy_gradient
from edge_client.alignment.settings import PpoSettings, RlooSettings
from edge_client.data.packing import micro_batches, pack
from edge_client.data.prompts import Encoded
from edge_client.descent import Descent
from edge_client.peft.packed_model import PackedModel


@dataclass(frozen=True, kw_only=True)
class Improvement:
    """What the updates of one step were like: means over the actions that they looked at.

    Attributes:
        updates: Taken.
        stopped: Whether the policy had gone too far before all were taken.
        policy_loss: Clipped objective.
        clip_fraction: Share of actions whose advantage had stopped to count.
        policy_kl: From the policy that drew the responses, nats an action, at the last look.
    """

    updates: int
    stopped: bool
    policy_loss: float
    clip_fraction: float
    policy_kl: float


def improve(
    model: PackedModel,
    descent: Descent,
    examples: Sequence[Encoded],
    old: Tensor,
    advantages: Stream,
    *,
    settings: PpoSettings | RlooSettings,
    seed: int,
    words: tuple[str | int, ...],
    beside: Callable[[Tensor], None] | None = None,
) -> Improvement:
    """Take epochs of updates; stop where the policy has gone too far from the one that acted.

    Args:
        model: The policy; it is trained in place.
        descent: Of its parameter.
        examples: Prompts and actions, at least as many as minibatches.
        old: Log-probabilities of the actions under the policy that acted, nats. Shape (N,).
        advantages: Shape (N,).
        settings: Epochs, minibatches, limits.
        seed: Of the run.
        words: Client, round and step: responses are split into minibatches by these and the seed.
        beside: Called after each update with the minibatch's actions, (P,) of N: critics learn.

    Raises:
        InputError: If there are more minibatches than responses, or training diverges.
    """
    if settings.minibatches > len(examples):
        raise InputError(
            f"minibatches = {settings.minibatches} of {len(examples)} responses; "
            f"choose at most {len(examples)}, or more rollouts"
        )
    lengths = [len(e.tokens) - e.response_start for e in examples]
    actions = torch.split(torch.arange(len(old), device=old.device), lengths)
    wanted = torch.from_numpy(advantages).to(old)
    shuffle = stream(seed, "minibatches", *words)
    looks: list[_Look] = []
    for _ in range(settings.epochs):
        for chosen in np.array_split(shuffle.permutation(len(examples)), settings.minibatches):
            mine = torch.cat([actions[i] for i in chosen])
            looks.append(_Look(old[mine], wanted[mine], settings.clip))
            looks[-1].leave_gradient(model, [examples[i] for i in chosen], settings)
            if not looks[-1].kl < float("inf"):
                raise InputError(
                    f"learning_rate = {descent.learning_rate:g}: the policy is {looks[-1].kl:g} "
                    f"nats an action from where the step began after {len(looks) - 1} updates; "
                    "choose a lower one"
                )
            if looks[-1].kl > settings.most_kl:
                return _summary(looks, stopped=True)
            descent.step()
            if beside is not None:
                beside(mine)
    return _summary(looks, stopped=False)


class _Look:
    """One minibatch: its clipped loss, gradient and distance, parts of it at a time."""

    def __init__(self, old: Tensor, advantages: Tensor, clip: float) -> None:
        self._old, self._advantages, self._clip = old, advantages, clip
        self.count = len(old)
        self.loss = self.clipped = self.kl = 0.0

    def leave_gradient(
        self,
        model: PackedModel,
        examples: Sequence[Encoded],
        settings: PpoSettings | RlooSettings,
    ) -> None:
        start = 0
        for part in micro_batches(examples, settings.most_tokens):
            batch = pack(part, model.device)
            policy_gradient(
                model,
                batch,
                self._weigh_from(start),
                settings.temperature,
                add=start > 0,
                checkpoint=settings.checkpoint,
            )
            start += len(batch.targets)

    def _weigh_from(self, start: int) -> Callable[[Tensor, slice], Tensor]:
        def weigh(new: Tensor, rows: slice) -> Tensor:
            mine = slice(start + rows.start, start + rows.start + len(new))
            old, advantages = self._old[mine], self._advantages[mine]
            losses, slopes = clipped_policy(new, old, advantages, self._clip)
            self.loss += float(losses.double().sum()) / self.count
            still = (slopes == 0) & (advantages != 0)
            self.clipped += float(still.double().sum()) / self.count
            self.kl += float(approximate(old, new).double().sum()) / self.count
            return slopes / self.count

        return weigh


def _summary(looks: Sequence[_Look], *, stopped: bool) -> Improvement:
    actions = sum(look.count for look in looks)
    return Improvement(
        updates=len(looks) - stopped,
        stopped=stopped,
        policy_loss=sum(look.loss * look.count for look in looks) / actions,
        clip_fraction=sum(look.clipped * look.count for look in looks) / actions,
        policy_kl=looks[-1].kl,
    )
