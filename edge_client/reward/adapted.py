"""Learning a head and what of its trunk is its own from pairs: Bradley-Terry, through the trunk.

Of a trunk with adapters the passes are those of instruction tuning, by hand; autograd goes from the
last hidden states over the features and the head to the loss. A pair's two sides go through
together, next to each other: they share the rows of their prompt. The features change with every
step, so nothing that the trunk says is kept.
Shape letters: N pairs, P places, D width of the trunk, F features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from device_profiles.errors import InputError
from device_profiles.reward_heads import PASS_TOKENS, trunk_prefix
from edge_client.data.packing import pack
from edge_client.data.prompts import Encoded
from edge_client.descent import Descent, Moments
from edge_client.peft.packed_model import PackedModel
from edge_client.progress import Interruption
from edge_client.reward.features import state_features
from edge_client.reward.head import Head, of_objective, trunk_tensors_of
from edge_client.reward.training import (
    UNSEEN,
    HeadTraining,
    PairSteps,
    bradley_terry,
    check_loss,
)
from messaging.layout import Tensors

_CLIP_NORM = 1.0  # as of instruction tuning

#: From the gradient by hidden states, and whether to add it to what is there.
Backward = Callable[[Tensor, bool], None]
#: The chosen side, and the rejected one.
Sides = tuple[Encoded, Encoded]


class LearningTrunk(Protocol):
    """What of a trunk learns with a head, one objective at a time.

    Attributes:
        device: Where it computes.
    """

    device: torch.device

    def put(self, tensors: Tensors) -> None:
        """Begin with an objective's own tensors, by their names on a base; they are copied."""

    def parameters(self) -> list[nn.Parameter]:
        """Return what trains."""

    def trainable(self) -> Mapping[str, Tensor]:
        """Return views of what lies in the parameters one after the other, by name."""

    def take(self) -> Tensors:
        """Return copies of all of it by name."""

    def forward(self, examples: Sequence[Encoded]) -> tuple[Tensor, Backward]:
        """Return the hidden states of the response's places, and the way back from them.

        Shape (P, D), example after example, without a graph. The way back takes the gradient by
        them, and whether to add to the gradients that are there instead of replacing them.
        """


class AdaptedTrunk:
    """A frozen base with adapters on it that learn.

    Args:
        model: With room for them.
    """

    def __init__(self, model: PackedModel) -> None:
        self.model, self.device = model, model.device

    def put(self, tensors: Tensors) -> None:
        """See ``LearningTrunk``."""
        self.model.put(tensors)

    def parameters(self) -> list[nn.Parameter]:
        """See ``LearningTrunk``."""
        return [self.model.parameter()]

    def trainable(self) -> Mapping[str, Tensor]:
        """See ``LearningTrunk``."""
        return self.model.trainable()

    def take(self) -> Tensors:
        """See ``LearningTrunk``."""
        return self.model.take()

    def forward(self, examples: Sequence[Encoded]) -> tuple[Tensor, Backward]:
        """See ``LearningTrunk``."""
        trace = self.model.forward(pack(examples, self.device))
        return trace.hidden.detach(), lambda g, add: self.model.backward(trace, g, add=add)


def train_with_trunk(
    trunk: LearningTrunk,
    tensors: Tensors,
    pairs: Sequence[Sides],
    how: PairSteps,
    *,
    objective: str,
    moments: Moments | None = None,
    interruption: Interruption | None = None,
) -> HeadTraining:
    """Take steps on one reward model: its head, and what of its trunk is its own.

    Weight decay takes adapters and changes of weights back towards the bare trunk.

    Args:
        trunk: Whose own part is trained in place.
        tensors: Of the run's reward models, by name; they are copied.
        pairs: At least 1.
        how: The steps.
        objective: Whose reward model learns.
        moments: Of earlier rounds; none to begin.
        interruption: Looked at before every step: a round that is broken off is trained again, to
            the same bits.

    Raises:
        InputError: If there is no pair, or training diverges.
        StoppedError: If the device is to leave in the middle of it.
    """
    if not pairs:
        raise InputError(
            f"no pair to learn a reward model of {objective} from; give at least 1 pair"
        )
    trunk.put(trunk_tensors_of(tensors, objective))
    head = Head(of_objective(tensors, objective)).to(trunk.device)
    own = dict(zip(of_objective(tensors, objective), head.parameters(), strict=True))
    seen = {name: part for name, part in own.items() if not name.endswith(UNSEEN)}
    for parameter in seen.values():
        parameter.requires_grad_(True)
    prefix = trunk_prefix(objective)
    descent = Descent(
        [*seen.values(), *trunk.parameters()],
        seen | {prefix + name: values for name, values in trunk.trainable().items()},
        learning_rate=how.learning_rate,
        weight_decay=how.weight_decay,
        clip_norm=_CLIP_NORM,
        moments=moments,
    )
    losses: list[float] = []
    tokens = 0
    for batch in how.batches(len(pairs)):
        if interruption is not None:
            interruption.check()
        chosen = [pairs[i] for i in batch]
        losses.append(batch_gradient(trunk, head, chosen, margin=how.margin))
        check_loss(losses, how.learning_rate)
        descent.step()
        tokens += sum(len(side.tokens) for pair in chosen for side in pair)
    return HeadTraining(
        tensors=head.take() | {prefix + name: values for name, values in trunk.take().items()},
        moments=descent.moments(),
        loss=sum(losses) / len(losses),
        pairs=how.size(len(pairs)) * len(losses),
        tokens=tokens,
    )


def batch_gradient(
    trunk: LearningTrunk, head: Head, pairs: Sequence[Sides], *, margin: float = 0.0
) -> float:
    """Return the mean loss of at least 1 pair, nats; leave its gradient on trunk and head.

    Args:
        trunk: As it learns.
        head: Of which what trains requires a gradient.
        pairs: A batch; parts of it go through the trunk one after the other.
        margin: By which a chosen response should score higher.
    """
    for parameter in head.parameters():
        parameter.grad = None
    loss = 0.0
    for i, part in enumerate(_parts(pairs)):
        examples = [side for pair in part for side in pair]
        states, back = trunk.forward(examples)
        hidden = states.requires_grad_(True)  # (P, D)
        lengths = [len(e.tokens) - e.response_start for e in examples]
        both = head(last_features(hidden, lengths)).view(-1, 2)  # (N, chosen and rejected)
        share = bradley_terry(both[:, 0], both[:, 1], margin) * (len(part) / len(pairs))
        share.backward()  # type: ignore[no-untyped-call]
        back(cast("Tensor", hidden.grad), i > 0)
        loss += share.item()
    return loss


def last_features(hidden: Tensor, lengths: Sequence[int]) -> Tensor:
    """Return the features of the last place of each example. Shape (P, D) -> (N, F)."""
    return torch.stack([state_features(own)[-1] for own in torch.split(hidden, list(lengths))])


def _parts(pairs: Sequence[Sides]) -> Iterator[Sequence[Sides]]:
    """Yield runs of at least 1 pair and at most ``PASS_TOKENS`` tokens."""
    begin, held = 0, 0
    for i, pair in enumerate(pairs):
        size = sum(len(side.tokens) for side in pair)
        if i > begin and held + size > PASS_TOKENS:
            yield pairs[begin:i]
            begin, held = i, 0
        held += size
    yield pairs[begin:]
