"""An aggregator that is killed between any two things that it puts down ends with the same bits.

A kill is an exception that nothing catches, at one of the places where something has just been put
down or is about to be. What an undisturbed run passes of them is counted first; then each of them
is a test. Devices talk to the next process from what is on their disks: what they owe until DONE,
and nothing of it afterwards. To train again gives them other figures, so an acknowledged update
that is asked for again shows in the bits.
"""

from __future__ import annotations

import hashlib
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cloud_aggregator.counting import Counting
from cloud_aggregator.intake import Intake
from cloud_aggregator.records import RunRecord
from cloud_aggregator.rounds import RoundRules
from cloud_aggregator.run_folder import RunFolder, read_record
from cloud_aggregator.settings import RunSettings
from cloud_aggregator.shelf import Shelf
from cloud_aggregator.spool import Spool
from cloud_aggregator.stale import StaleUpdates
from cloud_aggregator.store import RoundLedger, Store
from edge_client.local_client import Result
from edge_client.outbox import Outbox
from edge_client.stage_work import GlobalStates
from messaging.protocol import Task
from tests.cloud_aggregator.conftest import (
    Stage,
    Teacher,
    join,
    record_of,
    settings_of,
)

#: Whatever is put down, and in which class; a kill may come before it and after it.
PUT_DOWN: list[tuple[type, str]] = [
    (Store, "forget"),
    (Store, "keep_devices"),
    (Store, "open_round"),
    (RoundLedger, "keep"),
    (Intake, "_done"),  # about to say DONE
    (Store, "close_round"),
    (Shelf, "put"),
    (RunFolder, "write_record"),
    (Store, "keep_only"),
    (Spool, "clear"),
    (StaleUpdates, "keep"),
    (StaleUpdates, "decide"),
]


class Killed(BaseException):
    """The process is gone: nothing is written, said or closed any more."""


class Moments:
    """Places that a run passes, and the one at which it is killed.

    Args:
        monkeypatch: Puts everything back.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.passed: list[str] = []
        self.fatal = ""
        self._times: dict[str, int] = {}
        for owner, name in PUT_DOWN:
            monkeypatch.setattr(owner, name, self._watched(owner, name))

    def _watched(self, owner: type, name: str) -> Callable[..., Any]:
        original = getattr(owner, name)

        def watched(*arguments: Any, **named: Any) -> Any:
            self._pass(f"before {owner.__name__}.{name}")
            result = original(*arguments, **named)
            self._pass(f"after {owner.__name__}.{name}")
            return result

        return watched

    def _pass(self, place: str) -> None:
        self._times[place] = self._times.get(place, 0) + 1
        moment = f"{place} {self._times[place]}"
        self.passed.append(moment)
        if moment == self.fatal:
            raise Killed(moment)


def deployed() -> RunSettings:
    """Return two rounds of three devices on this machine's clock, which all of them end."""
    rules = RoundRules(quorum=1.0, deadline_seconds=1000.0)
    return settings_of(virtual_time=False, rules=rules)


def emulated() -> RunSettings:
    """Return three rounds that two of three devices end; the third one's updates come later."""
    rules = RoundRules(quorum=0.6, deadline_seconds=1000.0)
    return settings_of(rules=rules, rounds=3, counting=Counting(max_staleness=2))


class Fickle(Teacher):
    """A client that learns something else each time it trains for a round."""

    def __init__(self, client: str, value: float, **changes: Any) -> None:
        self._times: Counter[int] = Counter()
        super().__init__(client, lambda round_: value * round_ + self._times[round_], **changes)

    def perform(self, task: Task, states: GlobalStates, download_bytes: int) -> Result:
        """Do a task at once."""
        self._times[task.round] += task.work == "train"
        return super().perform(task, states, download_bytes)


def three() -> list[Teacher]:
    """Return clients whose updates differ; each is slower than the last."""
    return [
        Fickle("a", 0.1, examples=1, seconds=1.0, worst=30.0),
        Fickle("b", 0.7, examples=2, seconds=2.0, worst=30.0),
        Fickle("c", 1.3, examples=5, seconds=3.0, worst=30.0),
    ]


def host(stage: Stage, clients: list[Teacher]) -> None:
    """Start devices, or start them again from what is on their disks."""
    stage.leave()
    names = [client.device.id for client in clients]
    outboxes = {name: Outbox(stage.path.with_name("devices") / name) for name in names}
    stage.host(*clients, outboxes=outboxes)


def states(folder: Path) -> dict[str, str]:
    """Return the hashes of a run's global states."""
    return {
        path.parent.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.glob("global/*/shared.safetensors"))
    }


def kept(folder: Path) -> RunRecord:
    """Return what ``run.json`` says, as whoever starts an aggregator reads it."""
    return read_record(folder) if (folder / "run.json").exists() else record_of()


def run(
    stage: Stage, settings: RunSettings, record: RunRecord | None = None
) -> BaseException | None:
    """Run an aggregator to its end, or to where it is killed; return what killed it."""
    server = stage.aggregator(settings, record)
    ends: list[BaseException] = []

    def guarded() -> None:
        try:
            server.run()
        except BaseException as err:
            ends.append(err)

    thread = threading.Thread(target=guarded, daemon=True)
    thread.start()
    join(thread)
    return ends[0] if ends else None


@pytest.fixture(autouse=True)
def _in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a device whose word went to an aggregator that is gone say it again soon."""
    monkeypatch.setattr("messaging.transfer.SILENCE_SECONDS", 0.02)
    monkeypatch.setattr("edge_client.host._TICK_SECONDS", 0.02)


@pytest.fixture
def moments(monkeypatch: pytest.MonkeyPatch) -> Moments:
    """Yield the places that a run passes."""
    return Moments(monkeypatch)


#: Of a run of two rounds; what is in several rounds is numbered through.
MOMENTS = [
    *(f"{when} Store.forget 1" for when in ("before", "after")),
    *(f"{when} Store.keep_devices 1" for when in ("before", "after")),
    *(f"{when} Store.open_round {n}" for n in (1, 2) for when in ("before", "after")),
    *(f"{when} RoundLedger.keep {n}" for n in range(1, 7) for when in ("before", "after")),
    *(f"{when} Intake._done {n}" for n in (1, 3, 6) for when in ("before", "after")),
    *(f"{when} Store.close_round {n}" for n in (1, 2) for when in ("before", "after")),
    *(f"{when} Shelf.put {n}" for n in (1, 2, 3) for when in ("before", "after")),
    # run.json: running, before the first round, each round, done
    *(f"{when} RunFolder.write_record {n}" for n in range(1, 6) for when in ("before", "after")),
    *(f"{when} Store.keep_only {n}" for n in (1, 2) for when in ("before", "after")),
    *(f"{when} Spool.clear {n}" for n in range(1, 5) for when in ("before", "after")),
]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return the states of a run that nothing disturbed, which passes every moment of the list."""
    with (
        pytest.MonkeyPatch.context() as patch,
        Stage(tmp_path_factory.mktemp("calm") / "run") as stage,
    ):
        moments = Moments(patch)
        host(stage, three())
        assert run(stage, deployed()) is None
        assert set(MOMENTS) <= set(moments.passed)
        return states(stage.path)


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at_any_moment_it_loses_no_update_and_counts_none_twice(
    moment: str, stage: Stage, moments: Moments, undisturbed: dict[str, str]
) -> None:
    moments.fatal = moment
    clients = three()
    host(stage, clients)
    assert isinstance(run(stage, deployed()), Killed)
    host(stage, clients)
    assert run(stage, deployed(), kept(stage.path)) is None
    assert states(stage.path) == undisturbed
    assert [r.accepted for r in kept(stage.path).rounds] == [["a", "b", "c"]] * 2
    assert list(RunFolder(stage.path).spool_path.glob("*/*")) == []


#: Of a run in which late updates are kept: those of c, in each of three rounds.
LATE = [
    *(f"{when} StaleUpdates.keep {n}" for n in (1, 2) for when in ("before", "after")),
    *(f"{when} Store.close_round {n}" for n in (1, 2) for when in ("before", "after")),
    *(f"{when} StaleUpdates.decide {n}" for n in (1, 2) for when in ("before", "after")),
    *(f"{when} Shelf.put {n}" for n in (2, 3) for when in ("before", "after")),
    *(f"{when} RunFolder.write_record {n}" for n in (3, 4) for when in ("before", "after")),
    *(f"{when} Spool.clear {n}" for n in (2, 4) for when in ("before", "after")),
]


@pytest.fixture(scope="module")
def undisturbed_late(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], object]:
    """Return what a run leaves that folds late updates in, and passes every moment of the list."""
    with (
        pytest.MonkeyPatch.context() as patch,
        Stage(tmp_path_factory.mktemp("late") / "run") as stage,
    ):
        moments = Moments(patch)
        host(stage, three())
        assert run(stage, emulated()) is None
        assert set(LATE) <= set(moments.passed)
        return states(stage.path), folded(stage.path)


def folded(folder: Path) -> list[list[tuple[str, int, int]]]:
    """Return which late updates each round folded in."""
    return [[(s.id, s.round, s.staleness) for s in r.stale] for r in kept(folder).rounds]


@pytest.mark.parametrize("moment", LATE)
def test_killed_at_any_moment_a_late_update_counts_once_and_where_it_would_have(
    moment: str,
    stage: Stage,
    moments: Moments,
    undisturbed_late: tuple[dict[str, str], list[list[tuple[str, int, int]]]],
) -> None:
    moments.fatal = moment
    clients = three()
    host(stage, clients)
    assert isinstance(run(stage, emulated()), Killed)
    host(stage, clients)
    assert run(stage, emulated(), kept(stage.path)) is None
    assert (states(stage.path), folded(stage.path)) == undisturbed_late
    assert folded(stage.path) == [[], [("c", 1, 1)], [("c", 2, 1)]]
