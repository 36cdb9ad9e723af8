"""Devices that vanish in deployment: replaced while there is time, waited for when they return."""

from __future__ import annotations

import queue
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from cloud_aggregator.cohort import CohortRule
from cloud_aggregator.registry import Registry
from cloud_aggregator.rounds import RoundRules
from cloud_aggregator.run_folder import read_record
from cloud_aggregator.store import Store
from device_profiles.errors import InputError
from device_profiles.modules import initial_adapters
from messaging import topics
from messaging.errors import ProtocolError
from messaging.protocol import Alive, Hello, Manifest, decode
from tests.cloud_aggregator.conftest import (
    BASE,
    BINDING,
    LAYOUT,
    LIMIT,
    RUN,
    SESSION,
    SIZE,
    Clock,
    Events,
    Puppet,
    Stage,
    device,
    join,
    settings_of,
)

DEADLINE = 100.0


class Cohort:
    """A run whose rounds ask some of its devices, on a clock that passes when a test says so."""

    def __init__(self, stage: Stage, *, devices: str, size: int, **changes: Any) -> None:
        self.stage = stage
        self.clock, self.events = Clock(), Events()
        self.puppets = {name: Puppet(stage.network, name) for name in devices}
        rules = {"quorum": 1.0, "deadline_seconds": DEADLINE, **changes.pop("rules", {})}
        self.settings = settings_of(
            virtual_time=False,
            clients=len(devices),
            minimum_clients=1,
            rounds=1,
            cohort=CohortRule(size=size, selection="uniform", seed=7),
            rules=RoundRules(**rules),
            **changes,
        )

    def start(self, **changes: Any) -> None:
        """Start an aggregator, or another one when the first is gone."""
        self.server = self.stage.aggregator(
            self.settings, events=self.events, clock=self.clock, **changes
        )
        self.thread = self.stage.start(self.server)

    def begin(self) -> list[str]:
        """Let all devices appear and be measured; return who is asked to train."""
        for puppet in self.puppets.values():
            puppet.hello()
        self.start()
        self.measured(0)
        self.events.wait_for("task", work="train", round=1)
        return self.asked(0)

    def asked(self, time: int) -> list[str]:
        """Return who was told to train, the first time or a later one."""
        told = [task for task in self.events.all("task") if task["work"] == "train"]
        return list(told[time]["clients"])

    def measured(self, round_: int, without: str = "") -> None:
        """Let every device report after a round."""
        for name, puppet in self.puppets.items():
            if name not in without:
                puppet.report(puppet.expect_task("evaluate", round_))

    def passes(self, seconds: float) -> None:
        """Let time pass, and wait until the aggregator has heard something afterwards."""
        self.clock.now += seconds
        heard = len(self.events.all("refused"))
        next(iter(self.puppets.values())).publish(topics.control(RUN, "nobody"), b"{}")
        self.events.wait_for("refused", times=heard + 1)

    def accepted(self) -> list[str]:
        """Wait for the end of the run; return whose updates counted."""
        join(self.thread)
        (done,) = read_record(self.stage.path).rounds
        return done.accepted


def moved(folder: Path) -> float:
    """Return by how much the first round moved the state."""
    state = LAYOUT.pack(load_file(folder / "global" / "1" / "shared.safetensors"))
    change = np.unique(state - LAYOUT.pack(initial_adapters(BASE, SIZE, 7)))
    return float(np.round(change.mean(), 4))


def test_another_device_is_asked_in_the_place_of_one_whose_last_will_came(stage: Stage) -> None:
    run = Cohort(stage, devices="abc", size=2)
    first, gone = run.begin()
    (spare,) = set("abc") - {first, gone}
    run.puppets[gone].hello(online=False)
    run.events.wait_for("replaced", client=gone, by=spare)
    assert run.asked(1) == [spare]
    for name in (first, spare):
        run.puppets[name].expect_task("train", 1)
        run.puppets[name].upload(1.0, 1)
    run.measured(1, without=gone)
    assert run.accepted() == sorted([first, spare])
    (record,) = read_record(stage.path).rounds
    left = next(c for c in record.clients if c.id == gone)
    assert left.status == "lost"
    assert f"'{spare}' was asked in its place" in left.reason


def test_nobody_is_asked_in_anothers_place_where_the_run_says_so(stage: Stage) -> None:
    run = Cohort(stage, devices="abc", size=2, rules={"replacements": False})
    first, gone = run.begin()
    run.puppets[gone].hello(online=False)
    run.puppets[first].upload(1.0, 1)
    run.clock.now += DEADLINE + 1
    run.measured(1, without=gone)
    assert run.accepted() == [first]
    assert run.events.all("replaced") == []


def test_one_that_vanished_and_comes_back_still_counts(stage: Stage) -> None:
    run = Cohort(stage, devices="ab", size=2)
    first, gone = run.begin()
    run.puppets[gone].hello(online=False)
    run.puppets[gone].hello()
    run.puppets[gone].expect_task("train", 1)
    for name in (first, gone):
        run.puppets[name].upload(1.0, 1)
    run.measured(1)
    assert run.accepted() == [first, gone]


def test_more_are_asked_than_are_needed_and_the_first_ones_end_the_round(stage: Stage) -> None:
    run = Cohort(stage, devices="abcd", size=2, rules={"over_selection": 1.5})
    asked = run.begin()
    assert len(asked) == 3  # of two that are wanted
    for name in asked[:2]:
        run.puppets[name].upload(1.0, 1)
    run.measured(1)
    assert run.accepted() == asked[:2]


def test_a_device_without_a_word_for_too_long_is_replaced(stage: Stage) -> None:
    run = Cohort(stage, devices="abc", size=2, silence_seconds=30.0)
    first, gone = run.begin()
    (spare,) = set("abc") - {first, gone}
    for _ in range(33):
        for name in (first, spare):
            run.puppets[name].say(Alive(run=RUN, client=name, session=SESSION))
        run.passes(1.0)
    assert [gone_["client"] for gone_ in run.events.all("gone")] == [gone]
    run.events.wait_for("replaced", client=gone, by=spare)
    for name in (first, spare):
        run.puppets[name].expect_task("train", 1)
        run.puppets[name].upload(1.0, 1)
    run.measured(1, without=gone)
    assert run.accepted() == sorted([first, spare])


# -- started again --------------------------------------------------------------------------------


class KilledError(BaseException):
    """The process is gone."""


def test_the_recorded_set_counts_whatever_comes_after_a_restart(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of them end a round; killed before it is aggregated, it is the same half afterwards."""

    def die(*_: object, **__: object) -> None:
        raise KilledError

    run = Cohort(stage, devices="ab", size=2, rules={"quorum": 0.5})
    with monkeypatch.context() as patch:
        patch.setattr("cloud_aggregator.server.combine", die)
        run.begin()
        run.puppets["b"].upload(5.0, 1)
        join(run.thread)
    assert isinstance(stage._errors.pop(), KilledError)

    run.puppets["b"].hello(online=False)  # it need not even be there
    run.start(record=read_record(stage.path))
    run.events.wait_for("hello", client="a", times=2)
    run.passes(LIMIT + 1)  # it gathers no longer
    a = run.puppets["a"]
    task = a.expect_task("evaluate", 1)
    assert (task.outcome, task.round) == ("lost", 1)
    a.report(task)
    assert run.accepted() == ["b"]
    assert moved(stage.path) == 5.0


def test_a_restarted_aggregator_asks_the_cohort_that_it_had_chosen(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever is there now is not asked instead: the cohort was drawn before the kill."""

    def die(*_: object, **__: object) -> None:
        raise KilledError

    run = Cohort(stage, devices="abc", size=2)
    with monkeypatch.context() as patch:
        patch.setattr("cloud_aggregator.phases.Phases._ask_those_missing", die)
        for puppet in run.puppets.values():
            puppet.hello()
        run.start()
        run.measured(0)
        join(run.thread)
    assert isinstance(stage._errors.pop(), KilledError)
    stage._stores.close()
    with Store(stage.path, RUN) as store:
        opened = store.round(1)
        assert opened is not None
        assert (len(opened.cohort), opened.wanted) == (2, 2)

    run.puppets["d"] = Puppet(stage.network, "d")
    run.puppets["d"].hello()
    run.start(record=read_record(stage.path))
    run.events.wait_for("task", work="train", clients=list(opened.cohort))
    for name in opened.cohort:
        run.puppets[name].expect_task("train", 1)
        run.puppets[name].upload(1.0, 1)
    run.measured(1)
    assert run.accepted() == list(opened.cohort)


def test_a_second_aggregator_on_the_same_run_is_refused(stage: Stage) -> None:
    stage.aggregator()
    with pytest.raises(InputError, match="another aggregator is at work on the run"):
        Store(stage.path, RUN)


def test_each_start_is_counted_in_the_manifest(stage: Stage) -> None:
    epochs = []
    for _ in range(2):
        server = stage.aggregator()
        epochs.append(server._desk._epoch)
    assert epochs == [1, 2]


# -- who is there ---------------------------------------------------------------------------------


def hello(client: str = "a", **changes: Any) -> Hello:
    fields: dict[str, Any] = {
        "run": RUN,
        "client": client,
        "session": SESSION,
        "online": True,
        "binding": BINDING,
        "layout": LAYOUT.sha256,
        "device": device(client),
    }
    return Hello(**{**fields, **changes})


def registry(**changes: Any) -> Registry:
    return Registry(binding=BINDING, layout=LAYOUT.sha256, **changes)


def test_silence_counts_only_while_somebody_listened() -> None:
    there = registry(silence_seconds=30.0)
    there.greeted(hello())
    there.look(0.0)
    # an aggregation of 1,000 s: what was said in it lies in the inbox; five seconds of it count
    assert there.look(1000.0) == []
    for second in range(1001, 1025):
        assert there.look(float(second)) == []
    assert there.look(1025.0) == []
    assert there.look(1026.0) == ["a"]
    assert there.look(1027.0) == []  # it is told once
    assert there.online == []
    there.heard("a")
    assert there.online == ["a"]


def test_silence_counts_anew_after_a_connection_that_was_lost() -> None:
    there = registry(silence_seconds=3.0)
    there.greeted(hello())
    for second in (0.0, 3.0):
        there.look(second)
    there.reconnected()
    assert there.look(6.0) == []
    assert there.look(7.0) == ["a"]


def test_a_session_of_an_earlier_start_of_a_device_is_over() -> None:
    there = registry(epochs={"a": 4})
    with pytest.raises(ProtocolError, match=r"'a' says that this is its start 3.*in its start 4"):
        there.greeted(hello(epoch=3))
    assert there.online == []
    assert there.greeted(hello(epoch=5))
    with pytest.raises(ProtocolError, match="start 4"):
        there.greeted(hello(epoch=4, session="f" * 16))


def test_a_device_is_put_down_again_only_when_something_of_it_is_new() -> None:
    there = registry(devices={"a": device("a")}, epochs={"a": 1})
    there.greeted(hello(epoch=1))
    assert there.take_changed() == {}
    there.greeted(hello(epoch=2))
    there.greeted(hello("b"))
    assert there.take_changed() == {"a": (2, device("a")), "b": (0, device("b"))}
    assert there.take_changed() == {}
    assert there.online == ["a", "b"]


def test_an_aggregator_that_knows_many_devices_spreads_their_return(stage: Stage) -> None:
    """Six hundred devices at fifty a second: 12 s, which stand in the first manifest."""
    with Store(stage.path, RUN) as store:
        store.keep_devices({f"d{i}": (1, device(f"d{i}")) for i in range(600)})
    heard: queue.Queue[bytes] = queue.Queue()
    stage.network.open(
        client_id="d1",
        filters=[topics.manifest(RUN)],
        deliver=lambda _topic, payload: heard.put(payload),
        connected=lambda: None,
    ).start()
    server = stage.aggregator(settings_of(virtual_time=False), events=Events())
    stage.start(server)
    manifest = decode(heard.get(timeout=LIMIT))
    assert isinstance(manifest, Manifest)
    assert (manifest.reconnect_seconds, manifest.epoch) == (12.0, 2)
