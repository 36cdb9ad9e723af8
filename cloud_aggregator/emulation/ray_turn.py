"""One piece of a client's work on a worker of a Ray cluster.

It is a function of what it is given, the client's own files among it, so Ray may do it again on
another worker where one is lost, and the same comes of it. A worker keeps bases and data from one
turn to the next; arrays lie in its node's object store, once for all workers there.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cloud_aggregator.emulation.bench import Bench
from cloud_aggregator.emulation.fleet import ClientSpec, WorkerSpec
from device_profiles.errors import InputError
from edge_client.data.instructions import Example
from edge_client.data.own_data import Preferences
from edge_client.local_client import Result
from edge_client.stage_work import GlobalStates
from messaging.layout import Vector
from messaging.protocol import Task
from quantization.base_model import set_threads
from quantization.identity import BaseIdentity
from quantization.parts import Array, put_together

#: What a client keeps is in files of these names (``edge_client.state``).
STATES = "*.safetensors"

_benches: dict[str, tuple[Bench, tempfile.TemporaryDirectory[str]]] = {}


@dataclass(frozen=True, kw_only=True)
class Equipment:
    """What all turns of a run have in common; the bases are taken apart."""

    spec: WorkerSpec
    identity: BaseIdentity
    examples: list[Example]
    preferences: Preferences
    bases: dict[str, tuple[bytes, list[Array]]]


@dataclass(frozen=True, kw_only=True)
class Turn:
    """A task for one client, and what its folder holds."""

    client: ClientSpec
    task: Task
    taken_back: tuple[int, ...]
    download_bytes: int
    files: dict[str, bytes]


@dataclass(frozen=True, kw_only=True)
class Taken:
    """What came of a turn.

    Attributes:
        result: None where the client's input is bad.
        wrong: What is wrong with it, in a sentence.
        files: Of its folder, those that are new or changed.
        gone: Those that are not there any more.
    """

    result: Result | None
    wrong: str = ""
    files: dict[str, bytes]
    gone: list[str]


def take_turn(
    run: str,
    equipment: list[Any],
    turn: Turn,
    *,
    shared: Vector | None,
    reward: Vector | None,
    reference: Vector | None,
) -> Taken:
    """Do a client's task.

    Args:
        run: Distinguishes equipment.
        equipment: A reference to it in the object store: it is fetched where it is not here yet.
        turn: What to do.
        shared: Of the global states that the task names, that to start from.
        reward: The reward models.
        reference: The shared part of the stage-1 policy.
    """
    bench = _bench(run, equipment)
    states = GlobalStates(
        shared=shared, reward=reward, reference=reference, taken_back=turn.taken_back
    )
    with tempfile.TemporaryDirectory(prefix="pwff-turn-") as place:
        folder = Path(place)
        for name, content in turn.files.items():
            (folder / name).write_bytes(content)
        result, wrong = None, ""
        try:
            client = bench.client(turn.client, folder, None)
            result = client.perform(turn.task, states, turn.download_bytes)
        except InputError as err:
            wrong = str(err)
        left = {path.name: path.read_bytes() for path in folder.glob(STATES)}
    changed = {name: data for name, data in left.items() if turn.files.get(name) != data}
    return Taken(result=result, wrong=wrong, files=changed, gone=sorted({*turn.files} - {*left}))


def _bench(run: str, equipment: list[Any]) -> Bench:
    """Return bases and data, and a folder of this worker for what is read of them only once."""
    if run not in _benches:
        import ray

        given: Equipment = ray.get(equipment[0])
        set_threads(given.spec.threads)
        _benches.clear()  # of a run that is over
        features = tempfile.TemporaryDirectory(prefix="pwff-features-")
        bench = Bench(
            given.spec.model_copy(update={"features": features.name}),
            given.identity,
            bases={name: put_together(*parts) for name, parts in given.bases.items()},
            examples=given.examples,
            preferences=given.preferences,
        )
        _benches[run] = bench, features
    return _benches[run][0]
