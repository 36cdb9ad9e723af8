"""Reward learning on one client: the reward models of its objectives, on its own preference pairs.

What a bare trunk says of a pair is computed once and kept for all rounds. Where the reward models
have adapters on it, or weights of their own, every step goes through it and back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from device_profiles.errors import InputError
from device_profiles.methods import Objective
from edge_client.data.instructions import Example
from edge_client.data.preferences import Pair
from edge_client.data.prompts import Encoded, encode_example
from edge_client.descent import Moments
from edge_client.progress import Interruption
from edge_client.reward.adapted import train_with_trunk
from edge_client.reward.evaluation import evaluate_pairs
from edge_client.reward.head import Head, of_objective, scores
from edge_client.reward.judging import Judging
from edge_client.reward.training import HeadTraining, PairSteps, train_head
from edge_client.stage_work import GlobalStates, Measured, Trained
from edge_client.state import ClientState
from messaging.layout import Layout, Tensors, Vector
from messaging.protocol import DeviceRecord, PairFigures, Task


@dataclass(frozen=True, kw_only=True)
class _Sides:
    """Both sides of pairs, encoded."""

    chosen: list[Encoded]
    rejected: list[Encoded]

    @property
    def tokens(self) -> int:
        """Of all of them."""
        return sum(len(e.tokens) for e in [*self.chosen, *self.rejected])


#: Features of both sides of pairs. Shapes (N, F), (N, F).
_Features = tuple[Tensor, Tensor]


class RewardWork:
    """One client's part of reward learning.

    Args:
        judging: The trunk; whether it has adapters says what is learned.
        objectives: Of the run's method.
        layout: The reward models that travel.
        device: Whose pairs they are.
        pairs: To learn from, by objective.
        held_out: To measure on, of other prompts.
        begin: Gives the state of a client that has trained in no stage yet.
        interruption: Looked at before every step through the trunk.
    """

    def __init__(
        self,
        judging: Judging,
        *,
        objectives: Sequence[Objective],
        layout: Layout,
        device: DeviceRecord,
        pairs: Mapping[Objective, list[Pair]],
        held_out: Mapping[Objective, list[Pair]],
        begin: Callable[[int], ClientState],
        interruption: Interruption | None = None,
    ) -> None:
        self._judging = judging
        self._objectives = list(objectives)
        self._layout = layout
        self._device = device
        self._parts = {"train": pairs, "held_out": held_out}
        self._sides: dict[tuple[str, Objective, int], _Sides] = {}
        self._bare: dict[tuple[str, Objective, int], _Features] = {}
        self._interruption = interruption
        self.begin = begin

    def train(self, task: Task, state: ClientState, states: GlobalStates) -> Trained:
        """Take the task's steps on each objective's reward model.

        Raises:
            InputError: If there are no reward models to start from, or training diverges.
        """
        tensors = self._layout.unpack(self._shared(states))
        done = {name: self._learn(name, task, tensors, state) for name in self._objectives}
        trained: Tensors = {}
        for result in done.values():
            trained |= result.tensors
        pairs = sum(result.pairs for result in done.values())
        # a bare trunk reads a pair once a run; a process that begins again does what is not counted
        reads = not self._judging.shape.own and not state.numbers
        read = self._tokens(task) if reads else 0
        encodes = self._judging.encoder is not None
        return Trained(
            state=replace(state, extra=_kept(done), numbers=_steps(done)),
            after=self._layout.pack(trained),
            loss=sum(result.loss * result.pairs for result in done.values()) / pairs,
            weight=self._device.preference_pairs,
            tokens=sum(result.tokens for result in done.values()),
            rows=2 * pairs if self._judging.shape.own else 0,
            read_tokens=0 if encodes else read,
            encoder_tokens=read if encodes else 0,
        )

    def evaluate(self, task: Task, state: ClientState, states: GlobalStates) -> Measured:
        """Return what each reward model is worth on the client's held-out pairs.

        Raises:
            InputError: If there are no reward models.
        """
        del state  # what reads the pairs is the run's: no module of the client's is on the trunk
        tensors = self._layout.unpack(self._shared(states))
        figures: dict[Objective, PairFigures] = {}
        for name in self._objectives:
            sides = self._encoded("held_out", name, task)
            chosen, rejected = self._features("held_out", name, task, tensors)
            head = Head(of_objective(tensors, name)).to(chosen.device)
            result = evaluate_pairs(
                scores(head, chosen),
                scores(head, rejected),
                *(
                    [len(e.tokens) - e.response_start for e in side]
                    for side in (sides.chosen, sides.rejected)
                ),
            )
            figures[name] = PairFigures(
                pairs=result.pairs,
                loss=result.loss,
                accuracy=result.accuracy,
                longer_wins=result.longer_wins,
                calibration_error=result.calibration_error,
            )
        return Measured(examples=sum(f.pairs for f in figures.values()), pairs=figures)

    def _shared(self, states: GlobalStates) -> Vector:
        if states.shared is None:
            raise InputError(
                f"'{self._device.id}' is asked to learn reward models and is given none to start "
                "from; choose a method that shares them"
            )
        return states.shared

    def _learn(
        self, name: Objective, task: Task, tensors: Tensors, state: ClientState
    ) -> HeadTraining:
        how = PairSteps(
            steps=task.local_steps,
            batch_size=task.batch_size,
            learning_rate=task.learning_rate,
            margin=task.margin,
            seed=task.seed,
            words=(self._device.id, name, task.round),
        )
        moments = _moments(state, name)
        if not self._judging.shape.own:
            chosen, rejected = self._features("train", name, task, tensors)
            return train_head(of_objective(tensors, name), chosen, rejected, how, moments)
        sides = self._encoded("train", name, task)
        return train_with_trunk(
            self._judging.learning,
            tensors,
            list(zip(sides.chosen, sides.rejected, strict=True)),
            how,
            objective=name,
            moments=moments,
            interruption=self._interruption,
        )

    def _features(self, part: str, name: Objective, task: Task, tensors: Tensors) -> _Features:
        """Return what a reward model reads of pairs; of a bare trunk it is kept for all rounds."""
        key = part, name, task.max_length
        if key in self._bare:
            return self._bare[key]
        sides = self._encoded(part, name, task)
        both = [*sides.chosen, *sides.rejected]
        found = self._judging.response_features(tensors, name, both)
        features = found[: len(sides.chosen)], found[len(sides.chosen) :]
        if not self._judging.shape.own:
            self._bare[key] = features
        return features

    def _encoded(self, part: str, name: Objective, task: Task) -> _Sides:
        base, key = self._judging.base, (part, name, task.max_length)
        if key not in self._sides:
            pairs, most = self._parts[part][name], min(task.max_length, base.identity.positions)
            self._sides[key] = _Sides(
                chosen=[_encoded(pair, "chosen", base.tokenizer, most) for pair in pairs],
                rejected=[_encoded(pair, "rejected", base.tokenizer, most) for pair in pairs],
            )
        return self._sides[key]

    def _tokens(self, task: Task) -> int:
        return sum(self._encoded("train", name, task).tokens for name in self._objectives)


def _encoded(pair: Pair, side: str, tokenizer: object, most: int) -> Encoded:
    example = Example(instruction=pair.instruction, input=pair.input, output=getattr(pair, side))
    return encode_example(example, tokenizer, most)


def _moments(state: ClientState, name: str) -> Moments:
    def under(prefix: str) -> Tensors:
        return {n.removeprefix(prefix): t for n, t in state.extra.items() if n.startswith(prefix)}

    return Moments(
        first=under(f"{name}/m/"),
        second=under(f"{name}/v/"),
        steps=int(state.numbers.get(f"steps_{name}", 0)),
    )


def _kept(done: Mapping[Objective, HeadTraining]) -> Tensors:
    kept: Tensors = {}
    for name, result in done.items():
        kept |= {f"{name}/m/{n}": t for n, t in result.moments.first.items()}
        kept |= {f"{name}/v/{n}": t for n, t in result.moments.second.items()}
    return kept


def _steps(done: Mapping[Objective, HeadTraining]) -> dict[str, float]:
    return {f"steps_{name}": float(result.moments.steps) for name, result in done.items()}
