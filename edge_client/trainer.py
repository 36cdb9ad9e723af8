"""Local work on one client's data: a few optimiser steps, or a look at its held-out part.

Exactly the adapters and LoRA modules train. Losses are nats per response token, the end token
included. Shape letters: P response tokens of a batch, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from device_profiles.errors import InputError
from device_profiles.seeds import stream
from edge_client.data.batches import training_order
from edge_client.data.prompts import Encoded
from edge_client.descent import Descent, Moments
from edge_client.passes import passes_of, response_tokens, score
from edge_client.peft.build import Tunable
from edge_client.peft.flat_state import joined, named
from edge_client.progress import Interruption, Progress, Standing
from edge_client.restraint import FREE, Anchor, Restraint, Watch
from edge_client.state import ClientState
from messaging.layout import Tensors, Vector

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
        steps: Optimiser steps of what is kept, earlier rounds included.
        loss: Mean over the steps, nats per response token.
        rows: Examples that went through the model.
        tokens: Their tokens, without padding; tokens that examples have in common count each time.
        kept_steps: Of this training's steps, those whose result is kept: fewer than were taken
            where early stopping went back to the best.
        read_tokens: Of validation examples, which went forward only.
    """

    tensors: Tensors
    first_moments: Tensors
    second_moments: Tensors
    steps: int
    loss: float
    rows: int
    tokens: int
    kept_steps: int
    read_tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Held-out results: mean nats and share predicted (argmax), over ``tokens`` response tokens."""

    loss: float
    accuracy: float
    tokens: int


def train(
    model: Tunable,
    state: ClientState,
    examples: Sequence[Encoded],
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    words: tuple[str | int, ...],
    accumulate: int | None = None,
    checkpoint: bool = False,
    restraint: Restraint = FREE,
    validation: Sequence[Encoded] = (),
    anchor: Anchor | None = None,
    progress: Progress | None = None,
    followed: bool = False,
) -> Training:
    """Take ``steps`` of AdamW from what is on the model, with the moments of ``state``.

    The batches and the masks of dropout are a function of ``seed`` and ``words`` alone. With
    patience, the validation examples are looked at before the first step, after every few and at
    the end, and what had the lowest loss there is kept, with its moments.

    Args:
        model: With the client's tensors on it; they are trained in place.
        state: Adam's moments and steps so far.
        examples: At least 1.
        steps: At least 1.
        batch_size: At least 1; a client with fewer examples takes them all.
        learning_rate: Without schedule.
        seed: Of the run.
        words: Client and round.
        accumulate: Go through a batch in parts of at most so many tokens (an example that is
            longer goes alone), with the gradients of the whole; none for all at once.
        checkpoint: Keep less of the forward pass and compute it twice, with the same gradients.
        restraint: What holds it back.
        validation: Examples that are looked at and not learned from; at least 1 with patience.
        anchor: What a proximal term pulls towards; it is no part of the losses that are told.
        progress: Where it is written down how far the training is; what was begun there from the
            same start, settings and examples goes on, to the same bits.
        followed: Whether another training of the same round comes after it: what it came to is
            then written down too.

    Raises:
        InputError: If training diverges.
        StoppedError: If the device is to leave; ``progress`` has where the training stands.
        DiskError: If the disk does not take that.
    """
    passes = passes_of(model, accumulate, checkpoint)
    values, names = passes.values, model.trainable()
    moments = Moments(
        first=state.first_moments,
        second=state.second_moments,
        steps=state.steps if state.first_moments else 0,
    )
    before = moments.steps
    settings = (steps, batch_size, learning_rate, seed, words, accumulate, checkpoint)
    pulled = anchor and (anchor.pull, hashlib.sha256(anchor.values.data).hexdigest())
    said = repr((settings, restraint, pulled, len(validation), state.steps))
    log = _Log(progress, said, model, moments, [*examples, *validation])
    begun = log.begun
    losses, rows, tokens = list(begun.losses), begun.rows, begun.tokens
    if losses:
        moments = _stand(values, begun.values, names, before + len(losses))
    descent = Descent(
        [values],
        names,
        learning_rate=learning_rate,
        weight_decay=restraint.weight_decay,
        clip_norm=_CLIP_NORM,
        moments=moments,
    )

    def state_now() -> npt.NDArray[np.float32]:
        now = descent.moments()
        return np.stack(
            [_array(values.detach()), joined(now.first, names), joined(now.second, names)]
        )

    def validation_loss() -> float:
        passes.finish()
        return evaluate(model, validation).loss

    watch = Watch(
        restraint.patience,
        restraint.every,
        loss=validation_loss,
        values=state_now,
        seen=begun.watched,
    )

    def standing() -> Standing:
        return Standing(
            losses=losses, rows=rows, tokens=tokens, values=state_now(), watched=watch.seen
        )

    order = training_order(
        len(examples), steps, min(batch_size, len(examples)), stream(seed, "batches", *words)
    )
    for indices in islice(order, len(losses), None):
        if watch.over(len(losses)):
            break
        batch = [examples[i] for i in indices]
        losses.append(passes.loss_gradient(batch, restraint.dropout(seed, words, len(losses))))
        _check(losses, learning_rate)
        _pull(values, anchor)
        if values.numel():
            descent.step()
        rows += len(batch)
        tokens += sum(len(example.tokens) for example in batch)
        if len(losses) < steps:
            log.stepped(len(losses), standing)
    watched = watch.look(len(losses))
    if followed:
        log.ended(standing)
    moments, kept_steps, looks = descent.moments(), len(losses), 0
    if watched is not None:
        kept_steps, looks = watched.best_step, watched.looks
        moments = _stand(values, watched.best, names, before + kept_steps)
    passes.finish()
    return Training(
        tensors=model.take(),
        first_moments=moments.first,
        second_moments=moments.second,
        steps=state.steps + kept_steps,
        loss=sum(losses) / len(losses),
        rows=rows,
        tokens=tokens,
        kept_steps=kept_steps,
        read_tokens=looks * sum(len(example.tokens) for example in validation),
    )


class _Log:
    """Where one training writes down how far it is; nowhere, where it is not asked to."""

    def __init__(
        self,
        progress: Progress | None,
        settings: str,
        model: Tunable,
        moments: Moments,
        examples: Sequence[Encoded],
    ) -> None:
        self._progress, self._fingerprint = progress, ""
        self.begun = Standing(losses=[], rows=0, tokens=0, values=np.zeros((3, 0), np.float32))
        if progress is not None:
            self._fingerprint = _fingerprint(settings, model.take(), moments, examples)
            self.begun = progress.begun(self._fingerprint) or self.begun

    def stepped(self, steps: int, standing: Callable[[], Standing]) -> None:
        if self._progress is not None:
            self._progress.stepped(self._fingerprint, steps, standing)

    def ended(self, standing: Callable[[], Standing]) -> None:
        if self._progress is not None:
            self._progress.ended(self._fingerprint, standing())


def _check(losses: Sequence[float], learning_rate: float) -> None:
    if not losses[-1] < _DIVERGED:
        raise InputError(
            f"learning_rate = {learning_rate:g}: the loss is {losses[-1]:g} at step "
            f"{len(losses)}; choose a lower one"
        )


@torch.no_grad()
def _pull(values: nn.Parameter, anchor: Anchor | None) -> None:
    """Add the gradient of the proximal term, if there is one, to that of the loss."""
    if anchor is not None and values.grad is not None:
        size = len(anchor.values)
        away = values[:size] - torch.from_numpy(anchor.values).to(values)
        values.grad[:size].add_(away, alpha=anchor.pull)


def _fingerprint(
    settings: str, tensors: Tensors, moments: Moments, examples: Sequence[Encoded]
) -> str:
    """Return a hash of all that a training's outcome depends on, the base left out."""
    seen = hashlib.sha256(settings.encode())
    for group in (tensors, moments.first, moments.second):
        for name, tensor in group.items():
            seen.update(name.encode() + repr(tensor.shape).encode())
            seen.update(np.ascontiguousarray(tensor).data)
    for example in examples:
        seen.update(np.asarray([example.response_start, *example.tokens], np.int64).data)
    return seen.hexdigest()


def _stand(
    values: nn.Parameter,
    state: npt.NDArray[np.float32],
    names: Mapping[str, torch.Tensor],
    steps: int,
) -> Moments:
    """Put a training's values where they were; return its moments. Shape (3, size)."""
    now, first, second = state
    with torch.no_grad():
        values.copy_(torch.from_numpy(now))
    return Moments(first=named(first, names), second=named(second, names), steps=steps)


def evaluate(
    model: Tunable,
    examples: Sequence[Encoded],
    interruption: Interruption | None = None,
) -> Evaluation:
    """Return loss and accuracy on the responses of at least 1 example (teacher forcing).

    Raises:
        InputError: If training has diverged.
        StoppedError: If the device is to leave in the middle of it.
    """
    by_length = sorted(examples, key=lambda e: len(e.tokens))
    loss, right, count = 0.0, 0, 0
    for start in range(0, len(by_length), _EVALUATION_BATCH):
        if interruption is not None:
            interruption.check()
        batch = by_length[start : start + _EVALUATION_BATCH]
        nats, hits = score(model, batch)
        loss += nats
        right += hits
        count += response_tokens(batch)
    if not loss / count < _DIVERGED:
        raise InputError(
            f"the held-out loss is {loss / count:g}: training diverged; choose a lower "
            "learning_rate"
        )
    return Evaluation(loss=loss / count, accuracy=right / count, tokens=count)


def _array(vector: torch.Tensor) -> Vector:
    array: Vector = vector.to("cpu", torch.float32).numpy()
    return array
