"""Local work on one client's data: a few optimiser steps, or a look at its held-out part.

Exactly the adapters and LoRA modules train. Losses are nats per response token, the end token
included. Shape letters: N response tokens of a batch, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from device_profiles.errors import InputError
from device_profiles.seeds import stream
from edge_client.data.batches import Batch, make_batch, training_order
from edge_client.data.prompts import Encoded
from edge_client.peft.tuned_model import TunedModel
from edge_client.state import ClientState
from messaging.layout import Tensors

_BETAS = (0.9, 0.999)
_EPSILON = 1e-8
_CLIP_NORM = 1.0
_EVALUATION_BATCH = 16
_DIVERGED = 1e6  # nats; the protocol carries no more, and none that is not finite


@dataclass(frozen=True, kw_only=True)
class Training:
    """What a round of local training gave.

    Attributes:
        tensors: Every trainable tensor after the last step.
        first_moments: Adam's, by tensor name.
        second_moments: Likewise.
        steps: Optimiser steps taken so far, earlier rounds included.
        loss: Mean over the steps, nats per response token.
        rows: Examples that went through the model.
        tokens: Their tokens, padding included.
    """

    tensors: Tensors
    first_moments: Tensors
    second_moments: Tensors
    steps: int
    loss: float
    rows: int
    tokens: int


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Held-out results: mean nats and share predicted (argmax), over ``tokens`` response tokens."""

    loss: float
    accuracy: float
    tokens: int


def train(
    model: TunedModel,
    state: ClientState,
    examples: Sequence[Encoded],
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    words: tuple[str | int, ...],
) -> Training:
    """Take ``steps`` of AdamW from what is on the model, with the moments of ``state``.

    The batches are a function of ``seed`` and ``words`` alone.

    Args:
        model: With the client's tensors on it; they are trained in place.
        state: Adam's moments and steps so far.
        examples: At least 1.
        steps: At least 1.
        batch_size: At least 1; a client with fewer examples takes them all.
        learning_rate: Without schedule.
        seed: Of the run.
        words: Client and round.

    Raises:
        InputError: If training diverges.
    """
    parameters = model.trainable()
    optimiser = torch.optim.AdamW(
        parameters.values(),
        lr=learning_rate,
        betas=_BETAS,
        eps=_EPSILON,
        weight_decay=0.0,
        fused=True,
    )
    for name, parameter in parameters.items():
        if name in state.first_moments:
            optimiser.state[parameter] = {
                "step": torch.tensor(float(state.steps)),
                "exp_avg": torch.from_numpy(state.first_moments[name].copy()),
                "exp_avg_sq": torch.from_numpy(state.second_moments[name].copy()),
            }
    order = training_order(
        len(examples), steps, min(batch_size, len(examples)), stream(seed, "batches", *words)
    )
    losses, rows, tokens = [], 0, 0
    for indices in order:
        batch = make_batch([examples[i] for i in indices], model.base.end_token)
        loss = _loss(model, batch)
        losses.append(loss.item())
        if not losses[-1] < _DIVERGED:
            raise InputError(
                f"learning_rate = {learning_rate:g}: the loss is {losses[-1]:g} at step "
                f"{len(losses)}; choose a lower one"
            )
        optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(parameters.values(), _CLIP_NORM)
        optimiser.step()
        rows += len(indices)
        tokens += batch.tokens.numel()
    moments = {n: optimiser.state[p] for n, p in parameters.items() if p in optimiser.state}
    return Training(
        tensors=model.take(),
        first_moments={n: s["exp_avg"].numpy() for n, s in moments.items()},
        second_moments={n: s["exp_avg_sq"].numpy() for n, s in moments.items()},
        steps=state.steps + len(losses),
        loss=sum(losses) / len(losses),
        rows=rows,
        tokens=tokens,
    )


def _loss(model: TunedModel, batch: Batch) -> torch.Tensor:
    logits = model.logits_at(batch.tokens, batch.places)  # (N, V)
    return torch.nn.functional.cross_entropy(logits.float(), batch.targets)


def evaluate(model: TunedModel, examples: Sequence[Encoded]) -> Evaluation:
    """Return loss and accuracy on the responses of at least 1 example (teacher forcing).

    Raises:
        InputError: If training has diverged.
    """
    by_length = sorted(examples, key=lambda e: len(e.tokens))
    loss, right, count = 0.0, 0, 0
    with torch.inference_mode():
        for start in range(0, len(by_length), _EVALUATION_BATCH):
            batch = make_batch(by_length[start : start + _EVALUATION_BATCH], model.base.end_token)
            logits = model.logits_at(batch.tokens, batch.places).float()
            loss += float(torch.nn.functional.cross_entropy(logits, batch.targets, reduction="sum"))
            right += int((logits.argmax(-1) == batch.targets).sum())
            count += len(batch.targets)
    if not loss / count < _DIVERGED:
        raise InputError(
            f"the held-out loss is {loss / count:g}: training diverged; choose a lower "
            "learning_rate"
        )
    return Evaluation(loss=loss / count, accuracy=right / count, tokens=count)
