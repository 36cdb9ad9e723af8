"""Reward learning on one client: the heads of its objectives, on its own preference pairs.

The trunk is frozen, so what it says of a pair is computed once and kept for all rounds.
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
from edge_client.reward.evaluation import evaluate_pairs
from edge_client.reward.head import Head, of_objective, scores
from edge_client.reward.judging import Judging
from edge_client.reward.training import HeadTraining, train_head
from edge_client.stage_work import GlobalStates, Measured, Trained
from edge_client.state import ClientState
from messaging.layout import Layout, Tensors, Vector
from messaging.protocol import DeviceRecord, PairFigures, Task


@dataclass(frozen=True, kw_only=True)
class _Read:
    """Pairs as the trunk reads them: features (N, F) and response tokens of each side."""

    chosen: Tensor
    rejected: Tensor
    chosen_tokens: list[int]
    rejected_tokens: list[int]
    tokens: int


class RewardWork:
    """One client's part of reward learning.

    Args:
        judging: The trunk.
        objectives: Of the run's method.
        layout: The heads that travel.
        device: Whose pairs they are.
        pairs: To learn from, by objective.
        held_out: To measure on, of other prompts.
        begin: Gives the state of a client that has trained in no stage yet.
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
    ) -> None:
        self._judging = judging
        self._objectives = list(objectives)
        self._layout = layout
        self._device = device
        self._parts = {"train": pairs, "held_out": held_out}
        self._read: dict[tuple[str, Objective, int], _Read] = {}
        self.begin = begin

    def train(self, task: Task, state: ClientState, states: GlobalStates) -> Trained:
        """Take the task's steps on each objective's head.

        Raises:
            InputError: If there are no reward models to start from, or training diverges.
        """
        tensors = self._layout.unpack(self._shared(states))
        done = {name: self._learn(name, task, tensors, state) for name in self._objectives}
        trained: Tensors = {}
        for result in done.values():
            trained |= result.tensors
        # the trunk reads a pair once a run; a process that begins again does what is not counted
        read = 0 if state.numbers else self._tokens(task)
        pairs = sum(result.pairs for result in done.values())
        return Trained(
            state=replace(state, extra=_kept(done), numbers=_steps(done)),
            after=self._layout.pack(trained),
            loss=sum(result.loss * result.pairs for result in done.values()) / pairs,
            weight=self._device.preference_pairs,
            read_tokens=read,
        )

    def evaluate(self, task: Task, state: ClientState, states: GlobalStates) -> Measured:
        """Return what each reward model is worth on the client's held-out pairs.

        Raises:
            InputError: If there are no reward models.
        """
        del state  # a trunk without modules reads the pairs, and the heads are the run's
        tensors = self._layout.unpack(self._shared(states))
        figures: dict[Objective, PairFigures] = {}
        for name in self._objectives:
            read = self._features("held_out", name, task)
            head = Head(of_objective(tensors, name)).to(read.chosen.device)
            result = evaluate_pairs(
                scores(head, read.chosen),
                scores(head, read.rejected),
                read.chosen_tokens,
                read.rejected_tokens,
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
        read = self._features("train", name, task)
        own = of_objective(tensors, name)
        return train_head(
            own,
            read.chosen,
            read.rejected,
            steps=task.local_steps,
            batch_size=task.batch_size,
            learning_rate=task.learning_rate,
            margin=task.margin,
            seed=task.seed,
            words=(self._device.id, name, task.round),
            moments=_moments(state, name),
        )

    def _features(self, part: str, name: Objective, task: Task) -> _Read:
        base = self._judging.base
        most = min(task.max_length, base.identity.positions)
        key = part, name, most
        if key not in self._read:
            pairs = self._parts[part][name]
            both = [
                [_encoded(pair, side, base.tokenizer, most) for pair in pairs]
                for side in ("chosen", "rejected")
            ]
            found = self._judging.trunk.response_features([*both[0], *both[1]])
            self._read[key] = _Read(
                chosen=found[: len(pairs)],
                rejected=found[len(pairs) :],
                chosen_tokens=[len(e.tokens) - e.response_start for e in both[0]],
                rejected_tokens=[len(e.tokens) - e.response_start for e in both[1]],
                tokens=sum(len(e.tokens) for side in both for e in side),
            )
        return self._read[key]

    def _tokens(self, task: Task) -> int:
        return sum(self._features("train", name, task).tokens for name in self._objectives)


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
