"""What a stage asks of a client, and what it gives: one way for all three stages.

A stage's work knows the client's data and model. What travels, what is kept on disk and what all of
it costs is its caller's concern (``local_client``).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from edge_client.state import ClientState
from messaging.layout import Vector
from messaging.protocol import Objective, PairFigures, ResponseFigures, Task


@dataclass(frozen=True, kw_only=True)
class GlobalStates:
    """What a task came with, packed; none where it names none.

    Attributes:
        shared: The state to start from. Shape (layout size of the stage,).
        reward: The reward models to score by. Shape (layout size of reward learning,).
        reference: The shared part of the stage-1 policy. Shape (layout size of alignment,).
        taken_back: Rounds of which nothing has come, whether or not the device was told then.
    """

    shared: Vector | None = None
    reward: Vector | None = None
    reference: Vector | None = None
    taken_back: tuple[int, ...] = ()


NO_STATES = GlobalStates()


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a round of training gave.

    Attributes:
        state: The client's own, without what lossy uploads left out.
        after: What travels, packed as the client sends it; none where nothing does.
        loss: Mean over the steps of what the stage makes smaller; none where that says nothing.
        weight: Examples or pairs that it counts for.
        tokens: That were trained on, without padding.
        rows: In so many examples.
        read_tokens: That went forward only.
        encoder_tokens: That went through the encoder of the reward models, if they read one.
    """

    state: ClientState
    after: Vector | None
    loss: float | None
    weight: int
    tokens: int = 0
    rows: int = 0
    read_tokens: int = 0
    encoder_tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Held-out results; what a stage does not measure is left out."""

    examples: int
    eval_loss: float | None = None
    eval_accuracy: float | None = None
    pairs: dict[Objective, PairFigures] = field(default_factory=dict)
    responses: ResponseFigures | None = None
    others_loss: float | None = None
    others_accuracy: float | None = None
    kept_steps: int | None = None


class StageWork(Protocol):
    """One client's part of one stage."""

    def begin(self, seed: int) -> ClientState:
        """Return the state of a client that has trained in no stage yet."""

    def train(self, task: Task, state: ClientState, states: GlobalStates) -> Trained:
        """Take the task's steps.

        Raises:
            InputError: If the state does not fit the modules, or training diverges.
        """

    def evaluate(self, task: Task, state: ClientState, states: GlobalStates) -> Measured:
        """Measure the client's held-out data.

        Raises:
            InputError: If the state does not fit the modules, or training has diverged.
        """
