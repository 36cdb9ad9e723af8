"""What a device keeps between rounds, on its own disk: the part that never leaves it.

LoRA (and adapters, where the method shares none), optimiser moments, what a stage needs besides
(critics, say), and the error that lossy uploads left behind. One safetensors file a round, written
atomically; the two newest are kept, so that a round that is asked for again starts from the state
before it. Once alignment has begun, the policy of stage 1 is there too.

In a file, tensors of a kind are one flat array, and the header has their names and shapes: what
lies together in memory, as a training leaves it, is written as it lies, and read back at once.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from device_profiles.errors import InputError
from edge_client.disk import replace_file
from messaging.layout import Tensors, Vector
from messaging.protocol import Outcome, Stage, Task

_KEPT = 2
_REFERENCE = "stage-1.safetensors"
#: Where a round that is being trained stands (``progress``), and with a suffix another training of
#: that round; a state that is saved ends them.
TRAINING_FILE = "training-under-way"
#: Group of a state's extra tensors: the device's personal model, where it keeps one apart.
COPY = "ditto"
_VECTORS = ("residual", "pending")


@dataclass(frozen=True, kw_only=True)
class ClientState:
    """A device's own state after ``round``.

    Attributes:
        round: Last round that the device trained.
        stage: That the round was of.
        personal: Tensors that never leave the device.
        first_moments: Adam's, by tensor name; also of shared tensors.
        second_moments: Likewise.
        steps: Optimiser steps taken so far.
        residual: What lossy uploads left out so far, packed. Shape (layout size,) or none.
        pending: The residual to use instead once the update of ``round`` was aggregated.
        extra: Tensors that a stage keeps besides.
        numbers: Figures that it keeps.
    """

    round: int
    stage: Stage = "instruction"
    personal: Tensors
    first_moments: Tensors = field(default_factory=dict)
    second_moments: Tensors = field(default_factory=dict)
    steps: int = 0
    residual: Vector | None = None
    pending: Vector | None = None
    extra: Tensors = field(default_factory=dict)
    numbers: dict[str, float] = field(default_factory=dict)


def entering(state: ClientState, stage: Stage) -> ClientState:
    """Return what a device begins a stage with: its modules, and nothing of how they were learned.

    Moments and residuals are of what the stage before it made smaller.
    """
    if state.stage == stage:
        return state
    return ClientState(round=state.round, stage=stage, personal=state.personal)


def extra_group(state: ClientState, group: str) -> Tensors:
    """Return one group of a state's extra tensors by name; empty where there is none."""
    start = f"{group}/"
    return {n.removeprefix(start): t for n, t in state.extra.items() if n.startswith(start)}


def personal_copy(state: ClientState) -> Tensors:
    """Return all tensors of a device's personal model; empty where it keeps none apart."""
    return extra_group(state, COPY)


def settled(state: ClientState, outcome: Outcome) -> ClientState:
    """Return the state once it is known what became of its last update.

    The new residual counts only if the update was aggregated; otherwise the old one stays.
    """
    if state.pending is None:
        return state
    residual = state.pending if outcome == "aggregated" else state.residual
    return replace(state, residual=residual, pending=None)


def outcome_for(state: ClientState, task: Task) -> Outcome | None:
    """Return what a task says of the update that a state is pending on; none if it says nothing.

    A task without ``outcome_round`` speaks of its own round when it measures, and of the round
    before when it trains.
    """
    told = task.outcome_round
    if told is None:
        told = task.round - 1 if task.work == "train" else task.round
    return task.outcome if told == state.round else None


class StateStore:
    """One device's states in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _path(self, round_: int) -> Path:
        return self.folder / f"state-{round_:06d}.safetensors"

    def rounds(self) -> list[int]:
        """Return the rounds of which a state is kept, oldest first."""
        words = [p.stem.removeprefix("state-") for p in self.folder.glob("state-*.safetensors")]
        return sorted(int(word) for word in words if word.isdecimal())

    def newest(self, *, before: int) -> ClientState | None:
        """Return the newest state of a round below ``before``, or none."""
        rounds = [r for r in self.rounds() if r < before]
        return self.load(rounds[-1]) if rounds else None

    def load(self, round_: int) -> ClientState:
        """Return the state after a round.

        Raises:
            InputError: If the file is damaged, or of an earlier version.
        """
        path = self._path(round_)
        try:
            with safe_open(path, "np") as file:
                meta = json.loads(file.metadata()["pwff"])
                if "tensors" not in meta and "steps" in meta:
                    raise _earlier(path)
                flat = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no dict
            vectors = {name: flat.pop(name, None) for name in _VECTORS}
            kinds = _named(flat, meta["tensors"])
            return ClientState(
                round=meta["round"],
                stage=meta["stage"],
                personal=kinds["personal"],
                first_moments=kinds["m"],
                second_moments=kinds["v"],
                steps=meta["steps"],
                extra=kinds["extra"],
                numbers=meta["numbers"],
                **vectors,
            )
        except InputError:
            raise
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, AttributeError) as err:
            raise InputError(
                f"{path} is damaged; remove it to go on from the round before"
            ) from err

    def reference(self) -> Vector | None:
        """Return the stage-1 policy, all of it, if it has been kept. Shape (size,).

        Raises:
            InputError: If the file is damaged.
        """
        path = self.folder / _REFERENCE
        if not path.exists():
            return None
        try:
            vector: Vector = load_file(path)["values"]
        except (OSError, SafetensorError, KeyError) as err:
            raise InputError(
                f"{path} is damaged: without the policy of stage 1 alignment cannot go on; start a "
                "new run"
            ) from err
        return vector

    def keep_reference(self, vector: Vector) -> None:
        """Write the stage-1 policy, atomically: alignment is held to it until the run is over.

        Raises:
            DiskError: If the disk does not take it.
        """
        self._write(self.folder / _REFERENCE, {"values": vector}, {})

    def save(self, state: ClientState) -> None:
        """Write a state atomically; keep it and the one before, drop all others.

        A state of a later round is of a course that is being done again from here; so is a policy
        of stage 1 that was kept before another stage ended.

        Raises:
            DiskError: If the disk does not take it; the states before are as they were.
        """
        kinds = {
            "personal": state.personal,
            "m": state.first_moments,
            "v": state.second_moments,
            "extra": state.extra,
        }
        groups: dict[str, Tensors] = {}
        for kind, tensors in kinds.items():
            for name, tensor in tensors.items():
                group, _, own = f"{kind}/{name}".rpartition("/")
                groups.setdefault(group, {})[own] = tensor
        arrays = {group: _flat(tensors) for group, tensors in groups.items()}
        for name in _VECTORS:
            vector = getattr(state, name)
            if vector is not None:
                arrays[name] = vector
        said = {
            "round": state.round,
            "stage": state.stage,
            "steps": state.steps,
            "numbers": state.numbers,
            "tensors": {g: [(n, t.shape) for n, t in ts.items()] for g, ts in groups.items()},
        }
        meta = {"pwff": json.dumps(said)}
        self._write(self._path(state.round), arrays, meta)
        kept = [r for r in self.rounds() if r <= state.round][-_KEPT:]
        for other in set(self.rounds()) - set(kept):
            self._path(other).unlink()
        for under_way in self.folder.glob(f"{TRAINING_FILE}*"):
            under_way.unlink()
        if state.stage != "alignment":
            (self.folder / _REFERENCE).unlink(missing_ok=True)

    def take_back(self, round_: int) -> None:
        """Go back to the state before a round of which nothing came, if the newest is of it.

        What goes away is the newest state: done twice, it changes nothing more.
        """
        if self.rounds()[-1:] == [round_]:
            self._path(round_).unlink()

    def _write(self, path: Path, arrays: Tensors, meta: dict[str, str]) -> None:
        whole = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        replace_file(path, lambda new: save_file(whole, new, metadata=meta))


def _earlier(path: Path) -> InputError:
    """Return what to say of a file in which each tensor lies by itself."""
    return InputError(
        f"{path} is of an earlier version of pwff; finish the run with that version, or start a "
        "new one"
    )


def _flat(tensors: Tensors) -> Vector:
    """Return tensors one after the other; no copy where they are one run of memory already."""
    arrays = [np.ascontiguousarray(tensor) for tensor in tensors.values()]
    owner = arrays[0].base
    if isinstance(owner, np.ndarray) and owner.flags.c_contiguous and owner.dtype == np.float32:
        starts = [array.ctypes.data for array in arrays]
        ends = [start + array.nbytes for start, array in zip(starts, arrays, strict=True)]
        if starts[1:] == ends[:-1] and all(array.base is owner for array in arrays):
            first = (starts[0] - owner.ctypes.data) // owner.itemsize
            run: Vector = owner.reshape(-1)[first : first + sum(a.size for a in arrays)]
            return run
    return np.concatenate([array.reshape(-1) for array in arrays])


def _named(
    flat: Mapping[str, Vector], shapes: Mapping[str, Sequence[tuple[str, Sequence[int]]]]
) -> dict[str, Tensors]:
    """Return the tensors in flat arrays by kind and name.

    Raises:
        KeyError: If what there is is not what is named, or of no known kind.
        ValueError: If an array has another size than its tensors together.
    """
    if flat.keys() != shapes.keys():
        raise KeyError(f"{sorted(flat)} are there, {sorted(shapes)} are named")
    kinds: dict[str, Tensors] = {kind: {} for kind in ("personal", "m", "v", "extra")}
    for group, vector in flat.items():
        kind, _, rest = group.partition("/")
        start = f"{rest}/" if rest else ""
        for name, tensor in _parted(vector, shapes[group]).items():
            kinds[kind][start + name] = tensor
    return kinds


def _parted(vector: Vector, shapes: Sequence[tuple[str, Sequence[int]]]) -> Tensors:
    """Return a flat array's tensors by name (views).

    Raises:
        ValueError: If they are not all of it.
    """
    ends = list(accumulate((math.prod(shape) for _, shape in shapes), initial=0))
    if vector.shape != (ends[-1],):
        raise ValueError(f"{vector.shape} values for tensors of {ends[-1]}")
    parts = np.split(vector, ends[1:-1])
    return {name: part.reshape(shape) for (name, shape), part in zip(shapes, parts, strict=True)}
