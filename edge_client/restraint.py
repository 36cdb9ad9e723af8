"""What keeps a device's training from fitting its few examples too closely; by default nothing.

All of it is of instruction tuning: a proximal term after Ditto (``personal_copy``), LoRA dropout,
weight decay, and early stopping on examples that the device sets apart from its own.
Sources: Li et al. 2021 (Ditto); Loshchilov and Hutter 2019 (decoupled decay: zero, towards which it
pulls, is the base model itself, since a module whose outer factor is zero changes nothing).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from device_profiles.errors import InputError
from device_profiles.seeds import stream
from edge_client.peft.dropout import LoraDropout
from messaging.layout import Vector
from messaging.protocol import Task

T = TypeVar("T")

_Values = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Restraint:
    """How a training is held back.

    Attributes:
        lora_dropout: Share of the inputs of every LoRA module that a step leaves out, in [0, 1).
        weight_decay: Decoupled: a step multiplies what trains by 1 - learning_rate * weight_decay.
        patience: Looks at the validation examples without a lower loss after which a round's
            training ends; 0 trains all its steps and sets nothing apart.
        every: Steps between two looks.
    """

    lora_dropout: float = 0.0
    weight_decay: float = 0.0
    patience: int = 0
    every: int = 4

    @classmethod
    def of(cls, task: Task) -> Restraint:
        """Return what a task asks for."""
        return cls(
            lora_dropout=task.lora_dropout,
            weight_decay=task.weight_decay,
            patience=task.stopping_patience,
            every=task.validation_every,
        )

    def dropout(self, seed: int, words: tuple[str | int, ...], step: int) -> LoraDropout | None:
        """Return the masks of a step; none where nothing is left out."""
        if not self.lora_dropout:
            return None
        return LoraDropout(share=self.lora_dropout, seed=seed, words=(*words, step))


FREE = Restraint()


def set_apart(
    examples: Sequence[T], share: float, seed: int, client: str
) -> tuple[list[T], list[T]]:
    """Return a client's examples to learn from, and those to look at: the same in every round.

    Args:
        examples: Of its training part.
        share: Of them to look at, in (0, 1); at least one on either side.
        seed: Of the run.
        client: Whose they are.

    Raises:
        InputError: If there are fewer than two.
    """
    count = len(examples)
    if count < 2:
        raise InputError(
            f"'{client}' has {count} training example, and early stopping sets some apart; give it "
            "at least 2, or leave stopping_patience out"
        )
    size = min(max(1, round(share * count)), count - 1)
    chosen = stream(seed, "validation", client).permutation(count)[:size]
    apart = {int(i) for i in chosen}
    learned = [example for i, example in enumerate(examples) if i not in apart]
    return learned, [example for i, example in enumerate(examples) if i in apart]


@dataclass(frozen=True, kw_only=True)
class Watched:
    """What early stopping has seen so far.

    Attributes:
        best: What trains and Adam's moments at the lowest loss. Shape (3, size).
        best_loss: On the validation examples, nats.
        best_step: Of the round, 0 for its start.
        looked: Step of the last look.
        looks: So far.
        waited: Looks since the best.
    """

    best: _Values
    best_loss: float
    best_step: int
    looked: int
    looks: int
    waited: int


class Watch:
    """Early stopping of one round's training.

    Args:
        patience: Looks without a lower loss after which it is over; with 0 it never looks.
        every: Steps between two looks, at least 1.
        loss: Measures the validation examples, nats.
        values: Returns what trains and its moments, copied. Shape (3, size).
        seen: What it saw before the training was put down.
    """

    def __init__(
        self,
        patience: int,
        every: int,
        *,
        loss: Callable[[], float],
        values: Callable[[], _Values],
        seen: Watched | None,
    ) -> None:
        self._patience, self._every = patience, every
        self._loss, self._values = loss, values
        self._seen = seen

    @property
    def seen(self) -> Watched | None:
        """What it has seen; none before its first look."""
        return self._seen

    def over(self, step: int) -> bool:
        """Look if it is time after ``step`` steps, and say whether to stop."""
        if step % self._every == 0:
            self.look(step)
        return self._seen is not None and self._seen.waited >= self._patience

    def look(self, step: int) -> Watched | None:
        """Measure what ``step`` steps have given, once, and return what has been seen."""
        seen = self._seen
        if not self._patience or (seen is not None and seen.looked == step):
            return seen
        loss, looks = self._loss(), 1 if seen is None else seen.looks + 1
        if seen is None or loss < seen.best_loss:
            best, best_loss, best_step, waited = self._values(), loss, step, 0
        else:
            best, best_loss, best_step = seen.best, seen.best_loss, seen.best_step
            waited = seen.waited + 1
        self._seen = Watched(
            best=best, best_loss=best_loss, best_step=best_step, looked=step, looks=looks,
            waited=waited,
        )  # fmt: skip
        return self._seen


@dataclass(frozen=True, kw_only=True)
class Anchor:
    """What a proximal term pulls towards: the beginning of what trains.

    Attributes:
        values: The shared part of the global state. Shape (shared size,).
        pull: Lambda of lambda / 2 ||v - w||^2, above 0.
    """

    values: Vector
    pull: float
