"""Whole runs under each rule: states by hand, late updates in later rounds, and privacy."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from cloud_aggregator.aggregation.robust import RobustSettings
from cloud_aggregator.counting import Counting
from cloud_aggregator.privacy import PrivacySettings
from cloud_aggregator.rounds import RoundRules
from cloud_aggregator.run_folder import RunFolder, read_record
from cloud_aggregator.settings import RunSettings
from cloud_aggregator.store import Store
from device_profiles.errors import InputError
from device_profiles.modules import initial_adapters
from device_profiles.seeds import stream
from edge_client.local_client import Result
from edge_client.privacy import withheld
from edge_client.stage_work import GlobalStates
from messaging.layout import Vector
from messaging.protocol import Reject, Task
from tests.cloud_aggregator.conftest import (
    BASE,
    LAYOUT,
    RUN,
    SIZE,
    Clock,
    Events,
    Puppet,
    Stage,
    Teacher,
    device,
    join,
    settings_of,
)

SLOW_IS_LATE = RoundRules(quorum=0.6, deadline_seconds=1000.0)
NOISE = PrivacySettings(clip_norm=3.0, noise_multiplier=0.5, delta=1e-5, expected_clients=4)


def initial() -> Vector:
    """Return the state that every device begins with."""
    return LAYOUT.pack(initial_adapters(BASE, SIZE, 7))


def moved(folder: Path, round_: int) -> np.ndarray[Any, Any]:
    """Return by how much a run has moved every entry after a round. Shape (P,)."""
    path = folder / "global" / str(round_) / "shared.safetensors"
    return LAYOUT.pack(load_file(path)).astype(np.float64) - initial()


def with_rule(counting: Counting, **changes: Any) -> RunSettings:
    """Return a run in virtual time that counts updates so."""
    return settings_of(counting=counting, **changes)


def three(**changes: Any) -> list[Teacher]:
    """Return clients that are there after 1.5, 2.5 and 3.5 s with updates of 1, 2 and 6."""
    return [
        Teacher("a", 1.0, seconds=1.0, examples=1, **changes),
        Teacher("b", 2.0, seconds=2.0, examples=2, **changes),
        Teacher("c", 6.0, seconds=3.0, examples=1, **changes),
    ]


@pytest.mark.parametrize(
    ("rule", "robust", "by"),
    [
        ("mean", RobustSettings(), (1 * 1 + 2 * 2 + 1 * 6) / 4),
        # 456 equal entries of v have a norm of v * sqrt(456): c's is cut down to 3 an entry
        ("norm-clipped", RobustSettings(clip_norm=3.0 * math.sqrt(456)), (1 + 2 + 3) / 3),
        ("trimmed-mean", RobustSettings(trim_share=0.34), 2.0),
        ("median", RobustSettings(), 2.0),
    ],
)
def test_a_run_counts_updates_by_its_rule(
    stage: Stage, rule: str, robust: RobustSettings, by: float
) -> None:
    stage.host(*three())
    record = stage.aggregator(with_rule(Counting(rule=rule, robust=robust), rounds=1)).run()
    assert record.rounds[0].accepted == ["a", "b", "c"]
    np.testing.assert_allclose(moved(stage.path, 1), by, rtol=1e-6)


def test_krum_leaves_out_the_update_that_lies_far_from_the_others(stage: Stage) -> None:
    honest = [1.0, 1.1, 0.9, 1.0]
    stage.host(*(Teacher(f"h{i}", value) for i, value in enumerate(honest)), Teacher("x", 50.0))
    counting = Counting(rule="krum", robust=RobustSettings(byzantine=1))
    stage.aggregator(with_rule(counting, clients=5, rounds=1)).run()
    np.testing.assert_allclose(moved(stage.path, 1), 1.0, rtol=1e-6)


def test_a_round_with_fewer_updates_than_krum_takes_changes_nothing_and_says_so(
    stage: Stage,
) -> None:
    stage.host(*three())
    counting = Counting(rule="krum", robust=RobustSettings(byzantine=1))
    stage.aggregator(with_rule(counting, rounds=1)).run()
    stage.leave()
    stage.host(*three())
    record = stage.aggregator(with_rule(counting), read_record(stage.path)).run()  # it goes on
    assert [r.unchanged for r in record.rounds] == ["'krum' takes 5 updates, and 3 came"] * 2
    assert not moved(stage.path, 2).any()


def test_an_update_larger_than_an_honest_one_is_refused_whatever_the_rule(stage: Stage) -> None:
    # c's 456 entries of 6 have a norm of 128.1
    stage.host(*three())
    record = stage.aggregator(with_rule(Counting(max_norm=128.0), rounds=1)).run()
    (done,) = record.rounds
    assert done.accepted == ["a", "b"]
    assert done.clients[2].status == "rejected"
    assert done.clients[2].reason == "norm: the update has a norm of 128.1; at most 128 count"
    assert done.observed.refused == {"norm": 1}


# -- late updates ---------------------------------------------------------------------------------


def fedbuff(**changes: Any) -> RunSettings:
    """Return a run that folds late updates in."""
    return with_rule(Counting(max_staleness=2), rules=SLOW_IS_LATE, **changes)


def test_a_late_update_counts_in_the_next_round_by_the_root_of_its_staleness(
    stage: Stage,
) -> None:
    """Rounds end at 2.5 s with a and b; c's update comes 1 s later, in the middle of the next."""
    stage.host(*three())
    record = stage.aggregator(fedbuff(rounds=3)).run()
    first = 5 / 3  # (1*1 + 2*2) / 3
    later = (5 + 6 / math.sqrt(2)) / 4
    for round_, by in ((1, first), (2, first + later), (3, first + 2 * later)):
        np.testing.assert_allclose(moved(stage.path, round_), by, rtol=1e-6)
    assert [r.accepted for r in record.rounds] == [["a", "b"]] * 3
    folded = [[(s.id, s.round, s.staleness, s.examples) for s in r.stale] for r in record.rounds]
    assert folded == [[], [("c", 1, 1, 1)], [("c", 2, 1, 1)]]
    assert record.rounds[1].stale[0].share == pytest.approx(0.7071, abs=1e-4)


def test_an_update_that_takes_several_rounds_is_staler_and_one_too_old_is_dropped(
    stage: Stage,
) -> None:
    """C needs 9.5 s: it comes 7 s after the first round, in the third after it (2.5 s each)."""
    slow = [*three()[:2], Teacher("c", 6.0, seconds=9.0)]
    stage.host(*slow)
    record = stage.aggregator(fedbuff(rounds=4)).run()
    assert [len(r.stale) for r in record.rounds] == [0, 0, 0, 0]
    assert [r.stale_dropped for r in record.rounds] == [0, 0, 0, 1]
    np.testing.assert_allclose(moved(stage.path, 4), 4 * 5 / 3, rtol=1e-6)


def test_a_round_in_which_nothing_but_late_updates_count_moves_the_state(stage: Stage) -> None:
    """Nobody is in time for rounds of 1 s: a, after 1.5 s, counts in the second round."""
    stage.host(Teacher("a", 1.0, seconds=1.0))
    rules = RoundRules(quorum=1.0, deadline_seconds=1.0)
    settings = with_rule(Counting(max_staleness=2), rules=rules, clients=1)
    stage.aggregator(settings).run()
    stage.leave()
    stage.host(Teacher("a", 1.0, seconds=1.0))
    longer = dataclasses.replace(
        settings, stages=(dataclasses.replace(settings.stages[0], rounds=3),)
    )
    record = stage.aggregator(longer, read_record(stage.path)).run()  # from the state of round 2
    assert [r.accepted for r in record.rounds] == [[]] * 3
    assert [r.moved for r in record.rounds] == [False, True, True]
    np.testing.assert_allclose(moved(stage.path, 3), 2 / math.sqrt(2), rtol=1e-6)


def test_in_deployment_a_late_update_is_stored_and_counts_in_the_next_round(stage: Stage) -> None:
    events, clock = Events(), Clock()
    a, b = Puppet(stage.network, "a"), Puppet(stage.network, "b")
    for puppet in (a, b):
        puppet.hello()
    settings = settings_of(
        counting=Counting(max_staleness=2),
        virtual_time=False,
        clients=2,
        minimum_clients=2,
        rules=RoundRules(quorum=0.5, deadline_seconds=100.0),
    )
    thread = stage.start(stage.aggregator(settings, events=events, clock=clock))
    for puppet in (a, b):
        puppet.report(puppet.expect_task("evaluate", 0))
    b.expect_task("train", 1)
    a.upload(1.0, 1)
    for puppet in (a, b):
        puppet.report(puppet.expect_task("evaluate", 1))
    b.expect_task("train", 2)
    assert getattr(b.upload(3.0, 1), "status", "") == "late"
    events.wait_for("stale", client="b", round=1, staleness=1)
    a.upload(1.0, 2)
    for puppet in (a, b):
        puppet.report(puppet.expect_task("evaluate", 2))
    join(thread)
    # a alone moves it by one; then a counts in full and b by the root of two rounds
    np.testing.assert_allclose(moved(stage.path, 2), 1 + (1 + 3 / math.sqrt(2)) / 2, rtol=1e-6)
    assert [s.id for s in read_record(stage.path).rounds[1].stale] == ["b"]


def test_a_round_that_is_done_again_forgets_whom_its_first_try_accepted(stage: Stage) -> None:
    """A was accepted, and its update is lost; b alone ends the second try, and a's comes late."""
    events, clock = Events(), Clock()
    a, b = Puppet(stage.network, "a"), Puppet(stage.network, "b")
    for puppet in (a, b):
        puppet.hello()
    settings = settings_of(
        counting=Counting(max_staleness=2),
        virtual_time=False,
        clients=2,
        minimum_clients=2,
        rules=RoundRules(quorum=0.5, deadline_seconds=100.0),
    )
    first = stage.aggregator(settings, events=events, clock=clock)
    thread = stage.start(first)
    for puppet in (a, b):
        puppet.report(puppet.expect_task("evaluate", 0))
    a.upload(1.0, 1)
    a.expect_task("evaluate", 1)  # so the round is closed and aggregated
    first.stop()
    join(thread)
    (RunFolder(stage.path).spool_path / "1" / "a.safetensors").unlink()

    events = Events()
    record = read_record(stage.path)
    thread = stage.start(stage.aggregator(settings, record, events, clock=clock))
    b.expect_task("train", 1)
    b.upload(3.0, 1)
    for puppet in (a, b):
        puppet.report(puppet.expect_task("evaluate", 1))
    b.expect_task("train", 2)
    assert getattr(a.upload(1.0, 1), "status", "") == "late"
    events.wait_for("stale", client="a", round=1, staleness=1)
    b.upload(3.0, 2)
    for puppet in (a, b):
        puppet.report(puppet.expect_task("evaluate", 2))
    join(thread)
    record = read_record(stage.path)
    assert [r.accepted for r in record.rounds] == [["b"], ["b"]]
    assert [s.id for s in record.rounds[1].stale] == ["a"]
    np.testing.assert_allclose(moved(stage.path, 2), 3 + (3 + 1 / math.sqrt(2)) / 2, rtol=1e-6)


# -- privacy --------------------------------------------------------------------------------------


def private(**changes: Any) -> RunSettings:
    """Return a run that hides each client's part."""
    return with_rule(Counting(privacy=NOISE), **changes)


class Discreet(Teacher):
    """A client that says nothing of what it holds."""

    def perform(self, task: Task, states: GlobalStates, download_bytes: int) -> Result:
        """Do a task at once."""
        return withheld(super().perform(task, states, download_bytes))


def discreet() -> list[Teacher]:
    """Return two of them."""
    return [Discreet(name, value, held_out=0) for name, value in (("a", 1.0), ("b", 2.0))]


def test_a_private_run_clips_adds_noise_and_says_what_it_has_spent(stage: Stage) -> None:
    tasks: list[Task] = []
    teachers = discreet()
    for teacher in teachers:
        teacher._before_work = tasks.append
    stage.host(*teachers)
    record = stage.aggregator(private(clients=2)).run()
    # each update is one value throughout: its norm of v * sqrt(456) is cut down to 3; n is 4
    total = 2 * 3.0 / math.sqrt(456) * np.ones(456)
    by = np.zeros(456)
    for round_ in (1, 2):
        noise = 0.5 * 3.0 * stream(7, "privacy", round_).standard_normal(456)
        by += (total + noise) / 4
        np.testing.assert_allclose(moved(stage.path, round_), by, atol=2e-6)  # float32, twice
    assert all(task.private for task in tasks)
    spent = record.privacy
    assert spent is not None
    assert (spent.rounds, spent.clip_norm, spent.delta) == (2, 3.0, 1e-5)
    assert spent.repeatable_noise
    # two Gaussians of multiplier 0.5 are one of 0.5 / sqrt(2): its exact epsilon (Balle and Wang)
    mu = math.sqrt(2) / 0.5
    e = spent.epsilon
    delta = _phi(mu / 2 - e / mu) - math.exp(e) * _phi(-mu / 2 - e / mu)
    assert delta == pytest.approx(1e-5, rel=0.05)


def _phi(x: float) -> float:
    return 0.5 * math.erfc(-x / math.sqrt(2))


def test_a_private_round_without_an_update_releases_noise_too(stage: Stage) -> None:
    stage.host(*discreet())
    rules = RoundRules(quorum=1.0, deadline_seconds=0.5)
    settings = private(clients=2, rules=rules, rounds=1)
    stage.aggregator(settings).run()
    noise = 0.5 * 3.0 * stream(7, "privacy", 1).standard_normal(456)
    np.testing.assert_allclose(moved(stage.path, 1), noise / 4, atol=1e-6)


def test_a_device_that_says_what_it_holds_is_refused_by_a_private_run(stage: Stage) -> None:
    teller = Puppet(stage.network, "x")
    teller.hello(device=device("x", examples=51))
    stage.host(*discreet())
    record = stage.aggregator(private(clients=2, rounds=1)).run()
    answer = teller.expect(Reject)
    assert answer.code == "private"
    assert "set private = true" in answer.reason
    assert [c.id for c in record.clients] == ["a", "b"]


def test_a_private_run_is_not_gone_on_with_under_other_settings(stage: Stage) -> None:
    stage.host(*discreet())
    stage.aggregator(private(clients=2, rounds=1)).run()
    kept = read_record(stage.path)
    other = dataclasses.replace(NOISE, noise_multiplier=1.0)
    with pytest.raises(InputError, match=r"noise_multiplier = 1\.0, and the run's 1 rounds"):
        stage.aggregator(with_rule(Counting(privacy=other), clients=2), kept).run()
    with pytest.raises(InputError, match="asked to go on without"):
        stage.aggregator(settings_of(clients=2), kept).run()


class KilledError(BaseException):
    """The process is gone."""


def closed_and_killed(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> RunSettings:
    """Kill a private run after its only round is closed and before the record names it."""

    def die(*_: object) -> None:
        raise KilledError

    settings = private(virtual_time=False, clients=2, minimum_clients=2, rounds=1)
    stage.host(*discreet())
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "write_record", _only(2, RunFolder.write_record, die))
        with pytest.raises(KilledError):
            stage.aggregator(settings).run()
    return settings


def test_killed_after_a_round_is_closed_a_private_run_releases_the_same_noise(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other noise on the same sum would show the sum: the key is drawn once, and then erased."""
    settings = closed_and_killed(stage, monkeypatch)
    first = moved(stage.path, 1)
    (RunFolder(stage.path).global_path(1)).unlink()
    stage.aggregator(settings, read_record(stage.path)).run()
    assert np.array_equal(moved(stage.path, 1), first)
    stage._stores.close()
    with Store(stage.path, RUN) as store:
        assert store.round(1) is None


def test_a_private_round_whose_update_is_gone_is_not_released_a_second_time(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Done again, it would have other noise: two releases, and epsilon counts one."""
    settings = closed_and_killed(stage, monkeypatch)
    first = moved(stage.path, 1)
    gone = RunFolder(stage.path).spool_path / "1" / "a.safetensors"
    update = gone.read_bytes()
    gone.unlink()
    with pytest.raises(InputError, match=r"'a'.* that counted in round 1 is gone") as told:
        stage.aggregator(settings, read_record(stage.path)).run()
    assert "start a new run" in str(told.value)
    gone.write_bytes(update)
    stage.aggregator(settings, read_record(stage.path)).run()
    assert np.array_equal(moved(stage.path, 1), first)


def _only(times: int, original: Any, then: Any) -> Any:
    """Return what does so many calls and then something else."""
    calls = iter(range(times))

    def called(*arguments: Any) -> Any:
        return then(*arguments) if next(calls, None) is None else original(*arguments)

    return called


# -- what stays on disk ---------------------------------------------------------------------------


def test_the_newest_states_of_a_stage_stay_and_the_run_goes_on_from_them(stage: Stage) -> None:
    stage.host(*three(worst=20.0))
    stage.aggregator(settings_of(rounds=3, keep_states=2)).run()
    assert sorted(p.name for p in stage.path.glob("global/*")) == ["0", "2", "3"]
    stage.leave()
    stage.host(*three(worst=20.0))
    stage.aggregator(settings_of(rounds=4, keep_states=2), read_record(stage.path)).run()
    assert sorted(p.name for p in stage.path.glob("global/*")) == ["0", "3", "4"]
    np.testing.assert_allclose(moved(stage.path, 4), 4 * 2.75, rtol=1e-6)
