"""Log-probabilities of responses under a packed model, and gradients of what is made of them.

A response is a sequence of actions: its tokens and, where it ended by itself, the end token. The
logits are divided by the temperature that the response was drawn at, in the old, the new and the
reference log-probabilities alike: it is that policy which acts.
Shape letters: P actions of a batch (its places), D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from device_profiles.errors import InputError
from edge_client.data.packing import Packed, micro_batches, pack
from edge_client.data.prompts import Encoded
from edge_client.peft import functions
from edge_client.peft.packed_model import PackedModel
from messaging.layout import Vector

Weigh = Callable[[Tensor, slice], Tensor]


@torch.no_grad()
def log_probabilities(model: PackedModel, batch: Packed, temperature: float) -> Tensor:
    """Return the log-probability of each action, nats. Shape (P,).

    Args:
        model: The policy.
        batch: On its device.
        temperature: Above 0.
    """
    head = model.base.weights.embedding
    return functions.log_probabilities(model.hidden(batch), batch.targets, head, temperature)


def all_log_probabilities(
    model: PackedModel,
    examples: Sequence[Encoded],
    temperature: float,
    most_tokens: int | None = None,
) -> Tensor:
    """Return the log-probability of each action of at least 1 example, in their order. Shape (P,).

    Args:
        model: The policy.
        examples: Prompts and actions.
        temperature: Above 0.
        most_tokens: That go through the model at once, see ``micro_batches``; None for all.
    """
    parts = [pack(part, model.device) for part in micro_batches(examples, most_tokens)]
    return torch.cat([log_probabilities(model, part, temperature) for part in parts])


@torch.no_grad()
def policy_gradient(
    model: PackedModel,
    batch: Packed,
    weigh: Weigh,
    temperature: float,
    *,
    add: bool = False,
    checkpoint: bool = False,
) -> None:
    """Leave the gradient of a loss that is a sum over actions, in one pass each way.

    Args:
        model: The policy.
        batch: On its device.
        weigh: From the log-probabilities of some actions, and which these are, the derivative of
            the loss by each. Shape (rows,) -> (rows,).
        temperature: Above 0.
        add: Add to the gradient that is there instead of replacing it.
        checkpoint: Keep less of the forward pass and compute it twice, with the same gradient.
    """
    trace = model.forward(batch, checkpoint=checkpoint)
    head = model.base.weights.embedding
    gradient = functions.log_probability_gradient(
        trace.hidden, batch.targets, head, weigh, temperature
    )
    model.backward(trace, gradient, add=add)


@torch.no_grad()
def sequence_gradient(
    model: PackedModel,
    batch: Packed,
    weigh: Callable[[Tensor], Tensor],
    temperature: float,
    *,
    add: bool = False,
    checkpoint: bool = False,
) -> None:
    """Leave the gradient of any loss of a batch's log-probabilities; the logits are computed twice.

    Args:
        model: The policy.
        batch: On its device.
        weigh: From the log-probabilities of all actions, the derivative of the loss by each.
            Shape (P,) -> (P,).
        temperature: Above 0.
        add: See ``policy_gradient``.
        checkpoint: Likewise.
    """
    trace = model.forward(batch, checkpoint=checkpoint)
    head = model.base.weights.embedding
    slopes = weigh(functions.log_probabilities(trace.hidden, batch.targets, head, temperature))
    gradient = functions.log_probability_gradient(
        trace.hidden, batch.targets, head, lambda _, rows: slopes[rows], temperature
    )
    model.backward(trace, gradient, add=add)


@contextmanager
def values_of(model: PackedModel, vector: Vector) -> Iterator[None]:
    """Put another state on a model for a while: the reference costs a vector, not a second model.

    Args:
        model: With all modules of the state active. Its own values come back, whatever happens.
        vector: All active entries, see ``PackedModel.take_flat``.

    Raises:
        InputError: If the vector is not of the active modules.
    """
    own = model.take_flat()
    if len(vector) != len(own):
        raise InputError(
            f"a reference of {len(vector)} entries for a model whose active modules have "
            f"{len(own)}; give the state of the same modules"
        )
    model.put_flat(vector)
    try:
        yield
    finally:
        model.put_flat(own)
