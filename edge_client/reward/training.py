"""Learning a head from pairs: Bradley-Terry, on features that are computed once.

The trunk does not train, so a round is some milliseconds of a small network.
Shape letters: N pairs, F features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from device_profiles.errors import InputError
from device_profiles.seeds import stream
from edge_client.data.batches import training_order
from edge_client.descent import Descent, Moments
from edge_client.reward.head import Head
from messaging.layout import Tensors

LEARNING_RATE = 3e-4
WEIGHT_DECAY = 10.0
_DIVERGED = 1e6  # nats, as of instruction tuning
UNSEEN = ".outer.bias"  # it cancels in a difference, so it gets no gradient and stays


@dataclass(frozen=True, kw_only=True)
class PairSteps:
    """Steps of AdamW on pairs. Their batches are a function of ``seed`` and ``words`` alone.

    Attributes:
        steps: At least 1.
        batch_size: At least 1; with fewer pairs, all of them.
        learning_rate: Above 0, without schedule.
        weight_decay: Decoupled: a step multiplies by 1 - learning_rate * weight_decay; >= 0.
        margin: By which a chosen response should score higher, >= 0.
        seed: Of the run.
        words: Client, objective and round.

    Raises:
        InputError: If a number is out of its range.
    """

    steps: int
    batch_size: int
    learning_rate: float = LEARNING_RATE
    weight_decay: float = WEIGHT_DECAY
    margin: float = 0.0
    seed: int
    words: tuple[str | int, ...]

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("batch_size", 1), ("weight_decay", 0), ("margin", 0)):
            value = getattr(self, name)
            if not value >= least:
                raise InputError(
                    f"{name} = {value:g} of reward learning; it must be at least {least}"
                )
        if not self.learning_rate > 0:
            raise InputError(
                f"learning_rate = {self.learning_rate:g} of reward learning; it must be above 0"
            )

    def batches(self, pairs: int) -> list[list[int]]:
        """Return the pairs of each step, of so many that there are."""
        rng = stream(self.seed, "pairs", *self.words)
        return list(training_order(pairs, self.steps, self.size(pairs), rng))

    def size(self, pairs: int) -> int:
        """Return how many pairs a step has, of so many that there are."""
        return min(self.batch_size, pairs)


@dataclass(frozen=True, kw_only=True)
class HeadTraining:
    """What some steps gave.

    Attributes:
        tensors: Every tensor of the head, and of the adapters on its trunk where those train.
        moments: To go on with.
        loss: Mean over the steps, nats a pair.
        pairs: That went through the head.
        tokens: Of both sides that went through the trunk and back: 0 where it stays as it is.
    """

    tensors: Tensors
    moments: Moments
    loss: float
    pairs: int
    tokens: int = 0


def bradley_terry(chosen: Tensor, rejected: Tensor, margin: float = 0.0) -> Tensor:
    """Return the mean of -log sigmoid(r_chosen - r_rejected - margin), nats.

    Shapes (N,), (N,) -> ().

    Source: Bradley and Terry 1952; the margin as in Touvron et al. 2023 (Llama 2), section 3.2.2.
    """
    return torch.nn.functional.softplus(rejected - chosen + margin).mean()


def train_head(
    tensors: Tensors,
    chosen: Tensor,
    rejected: Tensor,
    how: PairSteps,
    moments: Moments | None = None,
) -> HeadTraining:
    """Take steps on one objective's head.

    Args:
        tensors: Of the head; they are copied.
        chosen: Features of the responses that were preferred, of at least 1 pair. Shape (N, F).
        rejected: Features of the others. Shape (N, F).
        how: The steps.
        moments: Of earlier rounds; none to begin.

    Raises:
        InputError: If there is no pair, the features do not fit the head or one another, or
            training diverges.
    """
    head = Head(tensors)
    _check(head, chosen, rejected)
    head.to(chosen.device)
    trained = {
        name: parameter
        for name, parameter in zip(tensors, head.parameters(), strict=True)
        if not name.endswith(UNSEEN)
    }
    for parameter in trained.values():
        parameter.requires_grad_(True)
    descent = Descent(
        list(trained.values()),
        trained,
        learning_rate=how.learning_rate,
        weight_decay=how.weight_decay,
        moments=moments,
    )
    size = how.size(len(chosen))
    losses = []
    for batch in how.batches(len(chosen)):
        both = head(torch.cat([chosen[batch], rejected[batch]]))  # (2 * size,)
        loss = bradley_terry(both[:size], both[size:], how.margin)
        for parameter in trained.values():
            parameter.grad = None
        loss.backward()  # type: ignore[no-untyped-call]
        descent.step()
        losses.append(loss.item())
        check_loss(losses, how.learning_rate)
    return HeadTraining(
        tensors=head.take(),
        moments=descent.moments(),
        loss=sum(losses) / len(losses),
        pairs=size * len(losses),
    )


def _check(head: Head, chosen: Tensor, rejected: Tensor) -> None:
    if chosen.shape != rejected.shape or chosen.ndim != 2 or not len(chosen):
        raise InputError(
            f"features of chosen responses {tuple(chosen.shape)} and of rejected ones "
            f"{tuple(rejected.shape)}; give one row for each side of at least 1 pair"
        )
    if chosen.shape[1] != head.features:
        raise InputError(
            f"{chosen.shape[1]} features and a reward head that reads {head.features}; "
            "give those of the trunk that the head was made for"
        )


def check_loss(losses: Sequence[float], learning_rate: float) -> None:
    """Refuse to go on after a step whose loss is beyond all reason.

    Raises:
        InputError: Then.
    """
    if not losses[-1] < _DIVERGED:
        raise InputError(
            f"learning_rate = {learning_rate:g}: the reward head's loss is {losses[-1]:g} at "
            f"step {len(losses)}; choose a lower one"
        )
