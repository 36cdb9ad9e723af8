"""Learning a head and the adapters on its trunk from pairs: Bradley-Terry, through the frozen base.

The passes through the trunk are those of instruction tuning, by hand; autograd goes from its last
hidden states over the features and the head to the loss. A pair's two sides go through together,
next to each other: they share the rows of their prompt. The features change with every step, so
nothing that the trunk says is kept.
Shape letters: N pairs, P places, D width of the trunk, F features.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor

from device_profiles.errors import InputError
from device_profiles.reward_heads import PASS_TOKENS, trunk_prefix
from device_profiles.seeds import stream
from edge_client.data.batches import training_order
from edge_client.data.packing import pack
from edge_client.data.prompts import Encoded
from edge_client.descent import Descent, Moments
from edge_client.peft.packed_model import PackedModel
from edge_client.progress import Interruption
from edge_client.reward.features import state_features
from edge_client.reward.head import Head, adapters_of, of_objective
from edge_client.reward.training import (
    LEARNING_RATE,
    UNSEEN,
    WEIGHT_DECAY,
    HeadTraining,
    bradley_terry,
    check_loss,
    check_numbers,
)
from messaging.layout import Tensors

_CLIP_NORM = 1.0  # as of instruction tuning

#: The chosen side, and the rejected one.
Sides = tuple[Encoded, Encoded]


def train_adapted(
    model: PackedModel,
    tensors: Tensors,
    pairs: Sequence[Sides],
    *,
    objective: str,
    steps: int,
    batch_size: int,
    learning_rate: float = LEARNING_RATE,
    weight_decay: float = WEIGHT_DECAY,
    margin: float = 0.0,
    seed: int,
    words: tuple[str | int, ...],
    moments: Moments | None = None,
    interruption: Interruption | None = None,
) -> HeadTraining:
    """Take ``steps`` of AdamW on one reward model: its head, and the adapters on its trunk.

    The batches are a function of ``seed`` and ``words`` alone. Weight decay takes the adapters back
    towards the bare trunk.

    Args:
        model: The trunk, with room for the adapters; they are trained in place.
        tensors: Of the run's reward models, by name; they are copied.
        pairs: At least 1.
        objective: Whose reward model learns.
        steps: At least 1.
        batch_size: At least 1; with fewer pairs, all of them.
        learning_rate: Above 0, without schedule.
        weight_decay: Decoupled: a step multiplies by 1 - learning_rate * weight_decay; >= 0.
        margin: By which a chosen response should score higher, >= 0.
        seed: Of the run.
        words: Client, objective and round.
        moments: Of earlier rounds; none to begin.
        interruption: Looked at before every step: a round that is broken off is trained again, to
            the same bits.

    Raises:
        InputError: If there is no pair, a number is out of its range, or training diverges.
        StoppedError: If the device is to leave in the middle of it.
    """
    check_numbers(
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        margin=margin,
    )
    if not pairs:
        raise InputError(
            f"no pair to learn a reward model of {objective} from; give at least 1 pair"
        )
    model.put(adapters_of(tensors, objective))
    head = Head(of_objective(tensors, objective)).to(model.device)
    own = dict(zip(of_objective(tensors, objective), head.parameters(), strict=True))
    seen = {name: part for name, part in own.items() if not name.endswith(UNSEEN)}
    for parameter in seen.values():
        parameter.requires_grad_(True)
    prefix = trunk_prefix(objective)
    descent = Descent(
        [*seen.values(), model.parameter()],
        seen | {prefix + name: values for name, values in model.trainable().items()},
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        clip_norm=_CLIP_NORM,
        moments=moments,
    )
    size = min(batch_size, len(pairs))
    losses: list[float] = []
    tokens = 0
    for batch in training_order(len(pairs), steps, size, stream(seed, "pairs", *words)):
        if interruption is not None:
            interruption.check()
        chosen = [pairs[i] for i in batch]
        losses.append(batch_gradient(model, head, chosen, margin=margin))
        check_loss(losses, learning_rate)
        descent.step()
        tokens += sum(len(side.tokens) for pair in chosen for side in pair)
    return HeadTraining(
        tensors=head.take() | {prefix + name: values for name, values in model.take().items()},
        moments=descent.moments(),
        loss=sum(losses) / len(losses),
        pairs=size * len(losses),
        tokens=tokens,
    )


def batch_gradient(
    model: PackedModel, head: Head, pairs: Sequence[Sides], *, margin: float = 0.0
) -> float:
    """Return the mean loss of at least 1 pair, nats; leave its gradient on model and head.

    Args:
        model: The trunk with adapters.
        head: Of which what trains requires a gradient.
        pairs: A batch; parts of it go through the trunk one after the other.
        margin: By which a chosen response should score higher.
    """
    for parameter in head.parameters():
        parameter.grad = None
    loss = 0.0
    for i, part in enumerate(_parts(pairs)):
        examples = [side for pair in part for side in pair]
        batch = pack(examples, model.device)
        trace = model.forward(batch)
        hidden = trace.hidden.detach().requires_grad_(True)  # (P, D)
        lengths = [len(e.tokens) - e.response_start for e in examples]
        both = head(last_features(hidden, lengths)).view(-1, 2)  # (N, chosen and rejected)
        share = bradley_terry(both[:, 0], both[:, 1], margin) * (len(part) / len(pairs))
        share.backward()  # type: ignore[no-untyped-call]
        model.backward(trace, cast("Tensor", hidden.grad), add=i > 0)
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
