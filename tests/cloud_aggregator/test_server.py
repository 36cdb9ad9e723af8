"""A whole run over a network in memory: by hand, in disorder, broken off, and under attack.

Virtual time is driven by teachers, whose updates are constants; real time by puppets and a clock
that passes when a test says so.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import queue
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from cloud_aggregator.cohort import CohortRule
from cloud_aggregator.errors import RunFailedError
from cloud_aggregator.methods import METHODS, stage_layout
from cloud_aggregator.presence import Moment
from cloud_aggregator.records import RunRecord
from cloud_aggregator.rounds import RoundRules
from cloud_aggregator.run_folder import RunFolder, read_record
from cloud_aggregator.settings import RunSettings
from cloud_aggregator.spool import SpoolFullError
from device_profiles.errors import InputError
from device_profiles.modules import initial_adapters
from messaging import topics
from messaging.chunks import Missing
from messaging.codecs import BlobHeader, encode_blob
from messaging.layout import Layout, Tensors, Vector
from messaging.memory import MemoryNetwork
from messaging.protocol import (
    Costs,
    Grant,
    Hello,
    Manifest,
    Reject,
    StateRef,
    Task,
    Want,
    decode,
    encode,
)
from messaging.transfer import UploadLimits
from messaging.transport import Connected, Deliver, Transport, Will
from tests.cloud_aggregator.conftest import (
    BASE,
    BINDING,
    LAYOUT,
    LIMIT,
    MODULES,
    NOTHING,
    RUN,
    SESSION,
    SIZE,
    Clock,
    Events,
    Puppet,
    Stage,
    Teacher,
    blob_of,
    device,
    join,
    offer_of,
    record_of,
    settings_of,
)

DEADLINE = 100.0
LATER = "f" * 16


def initial() -> Vector:
    """Return the state that every device begins with."""
    return LAYOUT.pack(initial_adapters(BASE, SIZE, 7))


def state_after(folder: Path, round_: int) -> Vector:
    """Return the state in a run's folder after a round."""
    return LAYOUT.pack(load_file(folder / "global" / str(round_) / "shared.safetensors"))


def wire(blob: bytes) -> int:
    """Return the bytes of a blob on the wire: 64 more for every 960."""
    return len(blob) + 64 * -(-len(blob) // 960)


def comparable(folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Return what two runs of the same seed must share: the record and the global states."""
    record = json.loads((folder / "run.json").read_text())
    for key in ("engine", "workers", "transport"):
        record.pop(key)
    for round_ in record["rounds"]:
        round_.pop("observed")
    states = {
        path.parent.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.glob("global/*/shared.safetensors")
    }
    return record, states


def three(**changes: Any) -> list[Teacher]:
    """Return clients whose updates weigh (1*1 + 2*2 + 1*6) / 4 = 2.75 a round."""
    return [
        Teacher("a", 1.0, seconds=1.0, examples=1, held_out=1, worst=10.0, **changes),
        Teacher("b", 2.0, seconds=2.0, examples=2, held_out=2, worst=11.0, **changes),
        Teacher("c", 6.0, seconds=3.0, examples=1, held_out=1, worst=15.0, **changes),
    ]


# -- virtual time ---------------------------------------------------------------------------------


def test_a_run_of_constant_updates_ends_with_the_state_known_by_hand(stage: Stage) -> None:
    teachers = three()
    host = stage.host(*teachers)
    record = stage.aggregator().run()
    assert (record.status, record.stop_reason) == ("done", "rounds")

    once = initial() + np.float32(2.75)
    assert state_after(stage.path, 0).tobytes() == initial().tobytes()
    assert state_after(stage.path, 1).tobytes() == once.tobytes()
    assert state_after(stage.path, 2).tobytes() == (once + np.float32(2.75)).tobytes()

    # loss is 10, 11 (weight 2) and 15 at first: (10 + 2*11 + 15) / 4, less the last entry
    assert record.summary.eval_loss_before == 11.75
    assert [r.global_.eval_loss for r in record.rounds] == [9.0, 6.25]
    assert record.summary.eval_loss_after == 6.25
    assert [r.global_.eval_accuracy for r in record.rounds] == pytest.approx([0.0275, 0.055])
    assert record.summary.clients_improved == 3
    assert [r.accepted for r in record.rounds] == [["a", "b", "c"]] * 2

    first = record.rounds[0]
    up = [
        wire(blob_of(i, 0.0, examples=n, train_loss=2.0)) for i, n in (("a", 1), ("b", 2), ("c", 1))
    ]
    assert [c.upload_bytes for c in first.clients] == up
    assert [c.upload_parameters for c in first.clients] == [456] * 3
    assert [c.compute_seconds for c in first.clients] == [1.0, 2.0, 3.0]
    assert [c.compute_joules for c in first.clients] == [3.0, 6.0, 9.0]
    assert [(c.uplink_seconds, c.uplink_joules) for c in first.clients] == [(0.5, 0.25)] * 3
    assert {c.train_loss for c in first.clients} == {2.0}
    head = BlobHeader(
        run=RUN, round=1, sender="aggregator", codec="fp32", layout=LAYOUT.sha256, examples=0
    )
    down = wire(encode_blob(once, LAYOUT, head))
    assert [c.download_bytes for c in first.clients] == [down] * 3
    # the slowest trains for 3 s and sends for 0.5 s; then the new state goes down
    assert first.virtual_seconds == 3.5 + down / 1000
    assert record.summary.upload_bytes_total == 2 * sum(up)
    assert first.observed.peak_memory_bytes == 1
    assert first.observed.retransmitted_bytes == 0
    assert first.observed.refused == {}

    assert [teacher.outcomes for teacher in teachers] == [["none", "aggregated", "aggregated"]] * 3
    assert read_record(stage.path) == record
    assert not list(RunFolder(stage.path).spool_path.glob("*"))
    stage.leave()
    assert host.failures == []


def test_the_slow_client_is_late_and_left_out(stage: Stage) -> None:
    """Two of three end the round: a at 1.5 s and b at 2.5 s; c, at 3.5 s, comes too late."""
    teachers = three()
    stage.host(*teachers)
    rules = RoundRules(quorum=0.6, deadline_seconds=1000.0)
    record = stage.aggregator(settings_of(rules=rules)).run()
    # (1*1 + 2*2) / 3, rounded to float32 once
    once = initial() + np.float32(5 / 3)
    assert state_after(stage.path, 2).tobytes() == (once + np.float32(5 / 3)).tobytes()
    for done in record.rounds:
        assert done.accepted == ["a", "b"]
        assert [c.status for c in done.clients] == ["aggregated", "aggregated", "late"]
        assert all(c.eval_accuracy is not None for c in done.clients)  # c has the new state too
        assert done.virtual_seconds == pytest.approx(2.5 + done.clients[0].downlink_seconds)
    assert teachers[2].outcomes == ["none", "late", "late"]


def test_the_deadline_is_modelled_and_not_this_machines(stage: Stage) -> None:
    stage.host(*three())
    rules = RoundRules(quorum=1.0, deadline_seconds=2.5)
    record = stage.aggregator(settings_of(rules=rules, rounds=1)).run()
    assert record.rounds[0].accepted == ["a", "b"]  # b is there at 2.5 s, to the second
    assert record.rounds[0].virtual_seconds == 2.5 + record.rounds[0].clients[0].downlink_seconds


class Scripted:
    """Devices that are there as a test says, round by round; ``asked`` is what was asked for."""

    def __init__(self, *moments: Moment) -> None:
        self._moments = [*moments]
        self.asked: list[tuple[float, list[str], int]] = []

    def moment(self, at: float, names: Iterable[str], least: int) -> Moment:
        """Return the next moment, whatever is asked for."""
        self.asked.append((at, sorted(names), least))
        return self._moments[len(self.asked) - 1]


def test_who_is_not_there_is_not_asked_and_who_leaves_early_does_not_count(stage: Stage) -> None:
    """A has its update there after 1.5 s, b after 2.5 s; b stays for 2 s, and c is away."""
    stage.host(*three())
    presence = Scripted(
        Moment(waited=10.0, stays={"a": 60.0, "b": 2.0}),
        Moment(waited=59.0, stays={"c": 3.5}),
    )
    rules = RoundRules(quorum=1.0, deadline_seconds=20.0)
    record = stage.aggregator(settings_of(rules=rules, presence=presence)).run()
    first, second = record.rounds
    assert (first.accepted, second.accepted) == (["a"], ["c"])
    assert [c.status for c in first.clients] == ["aggregated", "lost", "skipped"]
    assert first.clients[1].reason == "away: it left 2 s after the round began"
    assert [c.status for c in second.clients] == ["skipped", "skipped", "aggregated"]
    assert (first.waited_seconds, second.waited_seconds) == (10.0, 59.0)
    # the round waited for b until its deadline, and the next begins when it was over
    ended = 10.0 + 20.0 + first.clients[0].downlink_seconds
    assert presence.asked == [(0.0, ["a", "b", "c"], 1), (ended, ["a", "b", "c"], 1)]


def test_a_round_needs_as_many_there_as_its_quorum_of_the_cohort(stage: Stage) -> None:
    stage.host(*three())
    presence = Scripted(Moment(waited=0.0, stays={"b": 9.0, "c": 9.0}))
    record = stage.aggregator(
        settings_of(
            rounds=1,
            rules=RoundRules(quorum=0.6, deadline_seconds=20.0),
            cohort=CohortRule(size=3, selection="uniform", seed=7),
            presence=presence,
        )
    ).run()
    assert record.rounds[0].accepted == ["b", "c"]
    assert presence.asked[0][2] == 2


def test_a_round_that_nobody_finishes_in_time_changes_nothing(stage: Stage) -> None:
    stage.host(*three())
    rules = RoundRules(quorum=1.0, deadline_seconds=0.5)
    record = stage.aggregator(settings_of(rules=rules)).run()
    assert [r.accepted for r in record.rounds] == [[], []]
    assert record.summary.eval_loss_after == record.summary.eval_loss_before
    assert [c.download_bytes for c in record.rounds[0].clients] == [0, 0, 0]
    assert not RunFolder(stage.path).global_path(1).exists()


def test_a_deadline_that_nobody_meets_is_refused_where_that_is_a_mistake(stage: Stage) -> None:
    stage.host(*three())
    rules = RoundRules(quorum=1.0, deadline_seconds=0.5)
    settings = settings_of(rules=rules, refuses_hopeless_deadline=True)
    with pytest.raises(InputError, match=r"deadline_seconds = 0\.5: nobody meets it, the fastest"):
        stage.aggregator(settings).run()
    assert read_record(stage.path).status == "failed"


def hosts_in_order(stage: Stage, order: Sequence[str], events: Events) -> None:
    """Start the clients of ``three``, each working only once the one before it was heard."""
    teachers = {teacher.device.id: teacher for teacher in three()}
    for place, client in enumerate(order):
        before = order[place - 1] if place else None

        def wait(task: Task, before: str | None = before) -> None:
            if before is not None:
                event = "update" if task.work == "train" else "report"
                events.wait_for(event, client=before, round=task.round)

        teachers[client]._before_work = wait
        stage.host(teachers[client])


def test_the_order_of_arrival_changes_no_bit(tmp_path: Path) -> None:
    seen = []
    for order in ("abc", "cab", "cba"):
        events = Events()
        with Stage(tmp_path / order) as stage:
            hosts_in_order(stage, order, events)
            stage.aggregator(events=events).run()
        arrived = [update["client"] for update in events.all("update") if update["round"] == 2]
        assert arrived == list(order)
        reported = [report["client"] for report in events.all("report") if report["round"] == 2]
        assert reported == list(order)
        seen.append(comparable(stage.path))
    assert seen[0] == seen[1] == seen[2]


def test_training_stops_when_the_held_out_loss_does(stage: Stage) -> None:
    """Updates of 1, 1, then 0: loss 10, 9, 8, 8, 8; two rounds without gain are enough."""
    for client in "abc":
        stage.host(Teacher(client, lambda round_: 1.0 if round_ <= 2 else 0.0))
    record = stage.aggregator(settings_of(rounds=50, patience=2)).run()
    assert (record.status, record.stop_reason) == ("done", "converged")
    assert [r.global_.eval_loss for r in record.rounds] == [9.0, 8.0, 8.0, 8.0]


def test_gains_below_epsilon_do_not_count(stage: Stage) -> None:
    stage.host(*(Teacher(client, 0.25) for client in "abc"))
    record = stage.aggregator(settings_of(rounds=50, patience=2, epsilon=0.6)).run()
    # 9.75 is the first; 9.5 and 9.25 are within 0.6 of it
    assert [r.global_.eval_loss for r in record.rounds] == [9.75, 9.5, 9.25]


def test_alone_nothing_is_uploaded(stage: Stage) -> None:
    stage.host(*three(layout=NOTHING))
    record = stage.aggregator(settings_of(layout=NOTHING, method="local-only")).run()
    assert record.status == "done"
    assert [r.accepted for r in record.rounds] == [["a", "b", "c"]] * 2
    for done in record.rounds:
        assert {c.status for c in done.clients} == {"aggregated"}
        assert {c.train_loss for c in done.clients} == {2.0}
        assert {(c.upload_bytes, c.upload_parameters, c.download_bytes) for c in done.clients} == {
            (0, 0, 0)
        }
        assert done.virtual_seconds == 3.0  # the slowest trains, and nothing is sent
    assert record.summary.upload_bytes_total == 0
    assert not list(stage.path.glob("global/*"))


def lora_run(method: str) -> tuple[RunSettings, Layout]:
    """Return a run whose devices share LoRA: six modules of 2*(8 + 8) = 32 parameters."""
    layout = stage_layout("instruction", METHODS[method], MODULES)
    return settings_of(method=method, layout=layout, rounds=1), layout


def lora_state(folder: Path, round_: int) -> Tensors:
    """Return the tensors in a run's folder after a round."""
    return load_file(folder / "global" / str(round_) / "shared.safetensors")


def test_each_tensor_is_averaged_over_the_devices_that_hold_it(stage: Stage) -> None:
    settings, layout = lora_run("vanilla-fl-own")
    stage.host(
        Teacher("a", 1.0, examples=1, method="vanilla-fl-own", layout=layout, lora_count=2),
        Teacher("b", 2.0, examples=2, method="vanilla-fl-own", layout=layout, lora_count=4),
        Teacher("c", 6.0, examples=1, method="vanilla-fl-own", layout=layout, lora_count=6),
    )
    record = stage.aggregator(settings, record_of(method="vanilla-fl-own")).run()
    (done,) = record.rounds
    assert done.accepted == ["a", "b", "c"]
    # 456 parameters of adapters, and those of two, four and six modules
    assert [c.upload_parameters for c in done.clients] == [456 + 64, 456 + 128, 456 + 192]

    before, after = lora_state(stage.path, 0), lora_state(stage.path, 1)
    assert len(before) == 24 + 12
    modules = [f"transformer.h.{block}.attn.c_attn.{part}.lora_"
               for part in ("query", "value", "key") for block in (1, 0)]  # fmt: skip
    # (1*1 + 2*2 + 1*6) / 4 on what all hold, (2*2 + 1*6) / 3 on b's and c's, and c's own
    moved = dict(zip(modules, [2.75, 2.75, 10 / 3, 10 / 3, 6.0, 6.0], strict=True))
    for name, tensor in after.items():
        by = next((by for module, by in moved.items() if name.startswith(module)), 2.75)
        assert tensor.tobytes() == (before[name] + np.float32(by)).tobytes(), name


def test_products_are_averaged_where_the_method_says_so(stage: Stage) -> None:
    """An update of one value v makes A0 + v and B = v of zero, so B A has one row throughout.

    It is v * (the sum of A0's rows + 2*v), and so is the mean: of rank 1, which two factors hold.
    """
    settings, layout = lora_run("fedlora-product")
    values = {"a": (1.0, 1), "b": (2.0, 2), "c": (-0.5, 1)}
    stage.host(
        *(
            Teacher(client, value, examples=n, method="fedlora-product", layout=layout)
            for client, (value, n) in values.items()
        )
    )
    record = stage.aggregator(settings, record_of(method="fedlora-product")).run()
    assert [c.upload_parameters for c in record.rounds[0].clients] == [192] * 3
    before, after = lora_state(stage.path, 0), lora_state(stage.path, 1)
    assert sorted(before) == sorted(after) == sorted(layout.names)
    for name in (n for n in after if n.endswith("lora_A.weight")):
        rows = before[name].astype(np.float64).sum(axis=0)
        row = sum(n * v * (rows + 2 * v) for v, n in values.values()) / 4
        other = name.replace("lora_A", "lora_B")
        product = after[other].astype(np.float64) @ after[name].astype(np.float64)
        # float32: some roundings of 2**-24 of values up to 20
        np.testing.assert_allclose(product, np.tile(row, (8, 1)), atol=1e-5)


def with_rounds(settings: RunSettings, rounds: int) -> RunSettings:
    """Return a run of one stage with another number of rounds."""
    (plan,) = settings.stages
    return dataclasses.replace(settings, stages=(dataclasses.replace(plan, rounds=rounds),))


def test_a_run_that_shares_lora_goes_on_from_its_newest_state(stage: Stage) -> None:
    settings, layout = lora_run("vanilla-fl-own")
    record = record_of(method="vanilla-fl-own")
    for rounds in (1, 2):
        stage.host(
            *(
                Teacher(client, 1.0, method="vanilla-fl-own", layout=layout, lora_count=count)
                for client, count in (("a", 2), ("b", 4), ("c", 6))
            )
        )
        record = stage.aggregator(with_rounds(settings, rounds), record).run()
        stage.leave()
    assert [r.round for r in record.rounds] == [1, 2]
    first, second = lora_state(stage.path, 1), lora_state(stage.path, 2)
    assert all(np.array_equal(second[n], first[n] + np.float32(1)) for n in first)


def test_a_device_on_another_base_is_refused_with_a_sentence_and_not_counted(
    stage: Stage,
) -> None:
    stranger = Puppet(stage.network, "x")
    stranger.hello(binding="0" * 64)
    other = stage.host(Teacher("y", 9.0), binding="0" * 64)
    stage.host(*three())
    events = Events()
    record = stage.aggregator(events=events).run()
    answer = stranger.expect(Reject)
    assert (answer.code, answer.blob) == ("base", None)
    assert "give it the run's model and placement" in answer.reason
    assert [c.id for c in record.clients] == ["a", "b", "c"]
    assert all(task["clients"] == ["a", "b", "c"] for task in events.all("task"))
    assert record.rounds[0].observed.refused["base"] >= 1
    assert state_after(stage.path, 1).tobytes() == (initial() + np.float32(2.75)).tobytes()
    stage.leave()
    (failure,) = other.failures
    assert failure.startswith("y: ")
    assert "placement" in failure


def test_emulated_clients_that_do_not_appear_end_the_run(stage: Stage) -> None:
    events, clock = Events(), Clock()

    def a_minute_later(told: str, _what: dict[str, Any]) -> None:
        clock.now += 60.0 if told == "hello" else 0.0

    events.on = a_minute_later
    Puppet(stage.network, "a").hello()
    server = stage.aggregator(settings_of(gather_seconds=59.0), events=events, clock=clock)
    with pytest.raises(RunFailedError, match="1 of 3 emulated clients appeared within 59 s"):
        server.run()
    kept = read_record(stage.path)
    assert kept.status == "failed"
    assert kept.stop_reason is not None
    assert "1 of 3" in kept.stop_reason


def test_an_emulated_client_that_falls_silent_ends_the_run_by_name(stage: Stage) -> None:
    for client in "abc":
        Puppet(stage.network, client).hello()
    with pytest.raises(RunFailedError, match=r"client 'a' \(3 in all\) gave no held-out results"):
        stage.aggregator(settings_of(patience_seconds=0.05)).run()


def test_an_emulated_client_that_sends_no_update_ends_the_run_by_name(stage: Stage) -> None:
    events, clock, over = Events(), Clock(), threading.Event()

    def hang(task: Task) -> None:
        if task.work == "train":
            for client in "ac":
                events.wait_for("update", client=client)
            # Patience counts from the last thing that came: the second thousand finds nothing new.
            while not over.wait(0.05):
                clock.now += 1000.0

    stage.host(Teacher("a"), Teacher("c"))
    stage.host(Teacher("b", before_work=hang))
    server = stage.aggregator(settings_of(patience_seconds=999.0), events=events, clock=clock)
    with pytest.raises(RunFailedError, match=r"client 'b' \(1 in all\) gave no update of round 1"):
        server.run()
    over.set()
    assert read_record(stage.path).status == "failed"


def test_what_fails_elsewhere_fails_the_run(stage: Stage) -> None:
    server = stage.aggregator()
    server.fail(RunFailedError("a worker ended with 1"))
    with pytest.raises(RunFailedError, match="a worker ended with 1"):
        server.run()
    kept = read_record(stage.path)
    assert (kept.status, kept.stop_reason) == ("failed", "a worker ended with 1")


def test_an_emulated_client_that_is_just_being_started_again_is_asked_like_the_others(
    stage: Stage,
) -> None:
    """The accepted set follows from modelled time, not from which workers were there just then."""
    events = Events()
    puppets = [Puppet(stage.network, client) for client in "ab"]
    a, b = puppets
    for puppet in puppets:
        puppet.hello()
    thread = stage.start(stage.aggregator(settings_of(clients=2), events=events))
    for puppet in puppets:
        puppet.report(puppet.expect_task("evaluate", 0))
    for puppet in puppets:
        puppet.expect_task("train", 1)
        puppet.upload(1.0, 1)
    b.report(b.expect_task("evaluate", 1))
    b.hello(online=False)
    a.report(a.expect_task("evaluate", 1))
    a.expect_task("train", 2)
    a.upload(1.0, 2)
    assert events.all("task")[-1]["clients"] == ["a", "b"]
    b.session = LATER
    b.hello()
    b.expect_task("train", 2)
    b.upload(1.0, 2)
    b.hello(online=False)
    a.report(a.expect_task("evaluate", 2))
    b.hello()
    b.report(b.expect_task("evaluate", 2))
    for puppet in puppets:
        puppet.expect_task("stop", 2)
        puppet.hello(online=False)
    join(thread)
    record = read_record(stage.path)
    assert [r.accepted for r in record.rounds] == [["a", "b"]] * 2
    assert record.summary.eval_accuracy_after == 0.5


# -- broken off and gone on with ------------------------------------------------------------------


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, str]]:
    """Return what a run of ``three`` leaves that nothing disturbed."""
    with Stage(tmp_path_factory.mktemp("undisturbed") / "run") as stage:
        stage.host(*three())
        stage.aggregator().run()
    return comparable(stage.path)


MOMENTS: list[tuple[str, dict[str, Any]]] = [
    ("hello", {}),
    ("report", {"round": 0}),
    ("before", {}),
    ("task", {"work": "train", "round": 1}),
    ("update", {"round": 1}),
    ("task", {"work": "evaluate", "round": 1}),
    ("report", {"round": 1, "client": "b"}),
    ("round", {"round": 1}),
    ("update", {"round": 2, "client": "c"}),
    ("report", {"round": 2}),
]


@pytest.mark.parametrize("devices", ["stay", "leave"])
@pytest.mark.parametrize("moment", MOMENTS, ids=str)
def test_stopped_and_started_again_it_ends_with_the_same_bits(
    moment: tuple[str, dict[str, Any]],
    devices: str,
    stage: Stage,
    undisturbed: tuple[dict[str, Any], dict[str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # a device whose request went to an aggregator that is gone soon asks again
    monkeypatch.setattr("messaging.transfer.SILENCE_SECONDS", 0.1)
    events = Events()
    first = stage.aggregator(events=events)

    def stop_then(told: str, what: dict[str, Any]) -> None:
        if told == moment[0] and moment[1].items() <= what.items():
            first.stop()

    events.on = stop_then
    stage.host(*three())
    stopped = first.run()
    assert (stopped.status, stopped.stop_reason) == ("stopped", "interrupted")
    assert read_record(stage.path) == stopped
    assert events.told[-1] == ("end", {"status": "stopped", "reason": "interrupted"})
    if devices == "leave":
        stage.leave()
        stage.host(*three())
    record = stage.aggregator(record=read_record(stage.path)).run()
    assert record.status == "done"
    assert comparable(stage.path) == undisturbed


def test_a_finished_run_started_again_is_finished(stage: Stage) -> None:
    stage.host(*three())
    stage.aggregator().run()
    before = comparable(stage.path)
    stage.leave()
    stage.host(*three())
    record = stage.aggregator(record=read_record(stage.path)).run()
    assert (record.status, record.stop_reason) == ("done", "rounds")
    assert comparable(stage.path) == before


def test_a_finished_run_may_be_given_more_rounds(
    stage: Stage, undisturbed: tuple[dict[str, Any], dict[str, str]]
) -> None:
    stage.host(*three())
    stage.aggregator(settings_of(rounds=1)).run()
    stage.leave()
    stage.host(*three())
    stage.aggregator(settings_of(rounds=2), read_record(stage.path)).run()
    assert comparable(stage.path) == undisturbed


def test_an_update_that_was_acknowledged_is_not_asked_for_again(stage: Stage) -> None:
    """A device may forget what is DONE; so the aggregator must not, whatever happens to it."""
    a, b = Puppet(stage.network, "a"), Puppet(stage.network, "b")
    for puppet in (a, b):
        puppet.hello()
    first = stage.aggregator(settings_of(clients=2))
    thread = stage.start(first)
    for puppet in (a, b):
        puppet.report(puppet.expect_task("evaluate", 0))
    a.expect_task("train", 1)
    a.upload(3.0, 1)
    first.stop()
    join(thread)

    events = Events()
    thread = stage.start(
        stage.aggregator(settings_of(clients=2, rounds=1), read_record(stage.path), events)
    )
    events.wait_for("task", work="train", round=1, clients=["b"])
    b.expect_task("train", 1)
    b.upload(5.0, 1)
    for puppet in (a, b):
        puppet.report(puppet.expect_task("evaluate", 1))
    for puppet in (a, b):
        puppet.expect_task("stop", 1)
        puppet.hello(online=False)
    join(thread)
    assert state_after(stage.path, 1).tobytes() == (initial() + np.float32(4.0)).tobytes()


def test_a_run_goes_on_after_a_round_without_an_update(stage: Stage) -> None:
    stage.host(*three())
    rules = RoundRules(quorum=1.0, deadline_seconds=0.5)
    stage.aggregator(settings_of(rules=rules, rounds=1)).run()
    stage.leave()
    stage.host(*three())
    record = stage.aggregator(record=read_record(stage.path)).run()
    assert [r.accepted for r in record.rounds] == [[], ["a", "b", "c"]]
    assert state_after(stage.path, 2).tobytes() == (initial() + np.float32(2.75)).tobytes()


def test_updates_of_an_older_run_in_the_folder_are_not_taken(stage: Stage) -> None:
    """Someone removed run.json and began anew; what lies in the spool is of another experiment."""
    for round_ in (1, 2):
        folder = RunFolder(stage.path).spool_path / str(round_)
        folder.mkdir(parents=True)
        blob = blob_of("a", 9.0, round=round_)
        (folder / "a.safetensors").write_bytes(blob)
        (folder / "a.json").write_bytes(encode(offer_of("a", blob, round=round_)))
    stage.host(*three())
    stage.aggregator().run()
    assert state_after(stage.path, 1).tobytes() == (initial() + np.float32(2.75)).tobytes()


def test_told_to_stop_while_devices_leave_a_run_that_is_done_stays_done(stage: Stage) -> None:
    events = Events()
    a = Puppet(stage.network, "a")
    a.hello()
    server = stage.aggregator(settings_of(clients=1, rounds=1), events=events)
    thread = stage.start(server)
    a.report(a.expect_task("evaluate", 0))
    a.expect_task("train", 1)
    a.upload(1.0, 1)
    a.report(a.expect_task("evaluate", 1))
    assert a.expect_task("stop", 1).reason == "rounds"
    a.hello()  # it was away when it was told
    a.expect_task("stop", 1)
    server.stop()
    join(thread)
    assert read_record(stage.path).status == "done"
    assert events.told[-1] == ("end", {"status": "done", "reason": "rounds"})


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_a_full_disk_ends_the_run_in_words_and_it_goes_on_once_there_is_room(
    stage: Stage, undisturbed: tuple[dict[str, Any], dict[str, str]]
) -> None:
    events = Events()

    def fill(told: str, what: dict[str, Any]) -> None:
        if told == "task" and (what["work"], what["round"]) == ("train", 2):
            (RunFolder(stage.path).spool_path / "2" / "b.part").symlink_to("/dev/full")

    events.on = fill
    stage.host(*three())
    with pytest.raises(SpoolFullError, match="No space left") as told:
        stage.aggregator(events=events).run()
    kept = read_record(stage.path)
    assert (kept.status, kept.stop_reason) == ("failed", str(told.value))
    assert len(kept.rounds) == 1
    (RunFolder(stage.path).spool_path / "2" / "b.part").unlink()  # there is room again
    stage.aggregator(record=kept).run()
    assert comparable(stage.path) == undisturbed


def test_a_global_state_that_is_damaged_is_not_gone_on_with(stage: Stage) -> None:
    stage.host(*three())
    stage.aggregator(settings_of(rounds=1)).run()
    RunFolder(stage.path).global_path(1).write_bytes(b"half")
    with pytest.raises(ValueError, match="missing, damaged"):
        stage.aggregator(record=read_record(stage.path)).run()


# -- real time ------------------------------------------------------------------------------------


class Deployed:
    """An aggregator in real time, its devices, and the clock that they all wait for."""

    def __init__(self, stage: Stage, **changes: Any) -> None:
        self.stage = stage
        self.clock = Clock()
        self.events = Events()
        self._changes = {
            "virtual_time": False,
            "clients": 2,
            "minimum_clients": 2,
            "rules": RoundRules(quorum=1.0, deadline_seconds=DEADLINE),
            "patience_seconds": 600.0,
            **changes,
        }
        self.a, self.b = Puppet(stage.network, "a"), Puppet(stage.network, "b")

    def start(self, record: RunRecord | None = None, **changes: Any) -> Any:
        """Start the aggregator; return its thread."""
        self.server = self.stage.aggregator(
            settings_of(**{**self._changes, **changes}), record, self.events, clock=self.clock
        )
        self.thread = self.stage.start(self.server)
        return self.thread

    def begin(self) -> None:
        """Let both devices appear and give their first results."""
        for puppet in (self.a, self.b):
            puppet.hello()
        self.start()
        self.measured(0)

    def half_done(self) -> None:
        """Let both devices appear and be asked to train, and the first give its update."""
        self.begin()
        self.a.expect_task("train", 1)
        self.b.expect_task("train", 1)
        assert self.a.upload(1.0, 1).kind == "DONE"

    def measured(self, round_: int) -> list[str]:
        """Let both devices report after a round; return what they were told of their updates."""
        tasks = [puppet.expect_task("evaluate", round_) for puppet in (self.a, self.b)]
        for puppet, task in zip((self.a, self.b), tasks, strict=True):
            puppet.report(task)
        return [task.outcome for task in tasks]

    def passes(self, seconds: float) -> None:
        """Let time pass, and the aggregator look at the clock."""
        self.clock.now += seconds
        self.a.publish(topics.state(RUN, "a"), b"")

    def end(self) -> RunRecord:
        """Wait for the end of the run and return its record."""
        join(self.thread)
        return read_record(self.stage.path)


def test_a_silent_device_is_lost_at_the_deadline_and_its_late_update_left_out(
    stage: Stage,
) -> None:
    run = Deployed(stage)
    run.half_done()
    a, b = run.a, run.b
    run.passes(DEADLINE - 1)
    assert not [t for t in run.events.all("task") if t["round"] == 1 and t["work"] == "evaluate"]
    run.passes(2)
    assert run.measured(1) == ["aggregated", "lost"]

    a.expect_task("train", 2)
    b.expect_task("train", 2)
    old, _ = b.offer(5.0, round=1)
    answer = b.answer(old.blob)
    assert (answer.kind, getattr(answer, "status", "")) == ("DONE", "late")
    assert getattr(a.upload(2.0, 2), "status", "") == "stored"
    offer, blob = b.offer(7.0, round=2)
    b.expect(Grant)
    b.send(offer, blob, [0])
    run.passes(DEADLINE + 1)
    a.report(a.expect_task("evaluate", 2))
    task = b.expect_task("evaluate", 2)
    b.send(offer, blob, [1, 2])
    answer = b.answer(offer.blob)
    assert getattr(answer, "status", "") == "late"
    b.report(task)
    record = run.end()

    assert [r.accepted for r in record.rounds] == [["a"], ["a"]]
    assert [[c.status for c in r.clients] for r in record.rounds] == [
        ["aggregated", "lost"],
        ["aggregated", "late"],
    ]
    assert [r.virtual_seconds for r in record.rounds] == [DEADLINE, DEADLINE]
    assert [r.clients[1].upload_bytes for r in record.rounds] == [0, wire(blob)]
    assert [r.observed.refused for r in record.rounds] == [{}, {"late": 1}]
    once = initial() + np.float32(1.0)
    assert state_after(stage.path, 2).tobytes() == (once + np.float32(2.0)).tobytes()


def test_the_deadline_of_an_open_round_goes_on_after_a_restart(stage: Stage) -> None:
    run = Deployed(stage, rounds=1)
    run.half_done()
    run.passes(DEADLINE - 10)
    offer, _ = run.a.offer(1.0, round=1)
    assert run.a.answer(offer.blob).kind == "DONE"  # said again: the time was looked at before
    run.server.stop()
    join(run.thread)

    run.clock.now += 1000.0  # nobody's time: no aggregator ran
    run.start(read_record(stage.path))
    run.events.wait_for("task", work="train", round=1, clients=["b"])
    run.passes(11)
    assert run.measured(1) == ["aggregated", "lost"]
    record = run.end()
    assert record.rounds[0].virtual_seconds == DEADLINE
    assert [c.status for c in record.rounds[0].clients] == ["aggregated", "lost"]


def test_the_quorum_ends_a_round_before_its_deadline(stage: Stage) -> None:
    run = Deployed(stage, rounds=1, rules=RoundRules(quorum=0.5, deadline_seconds=DEADLINE))
    run.begin()
    run.a.expect_task("train", 1)
    run.clock.now += 7.0
    run.a.upload(1.0, 1)
    assert run.measured(1) == ["aggregated", "lost"]
    record = run.end()
    assert record.rounds[0].virtual_seconds == 7.0
    assert record.rounds[0].observed.wall_seconds == 7.0


def test_a_device_that_left_is_not_waited_for_with_its_results(stage: Stage) -> None:
    run = Deployed(stage, rounds=1)
    run.begin()
    for puppet in (run.a, run.b):
        puppet.expect_task("train", 1)
        puppet.upload(2.0, 1)
    run.a.report(run.a.expect_task("evaluate", 1))
    run.b.hello(online=False)
    record = run.end()
    (done,) = record.rounds
    assert done.accepted == ["a", "b"]
    assert [c.eval_accuracy for c in done.clients] == [0.5, None]


def test_results_that_do_not_come_are_waited_for_as_long_as_was_said(stage: Stage) -> None:
    run = Deployed(stage, rounds=1)
    run.begin()
    for puppet in (run.a, run.b):
        puppet.expect_task("train", 1)
        puppet.upload(2.0, 1)
    run.a.report(run.a.expect_task("evaluate", 1))
    run.b.expect_task("evaluate", 1)
    run.passes(601.0)
    assert [c.eval_accuracy for c in run.end().rounds[0].clients] == [0.5, None]


def test_a_device_that_lost_its_connection_goes_on_with_what_is_missing(stage: Stage) -> None:
    run = Deployed(stage, rounds=1)
    run.begin()
    a, b = run.a, run.b
    a.expect_task("train", 1)
    offer, blob = a.offer(1.0)
    a.expect(Grant)
    a.send(offer, blob, [1])
    a.hello(online=False)  # its will
    a.hello()
    a.expect_task("train", 1)  # it is told again what to do
    a.say(offer)
    grant = a.expect(Grant)
    assert Missing.from_bitmap(grant.missing, offer.chunks).indices == {0, 2}
    a.send(offer, blob, [0, 2])
    assert getattr(a.answer(offer.blob), "status", "") == "stored"
    b.upload(1.0, 1)
    run.measured(1)
    assert run.end().rounds[0].observed.retransmitted_bytes == 0


def test_a_device_that_joins_later_is_measured_at_once_and_trains_in_the_next_round(
    stage: Stage,
) -> None:
    run = Deployed(stage)
    run.begin()
    run.a.expect_task("train", 1)
    c = Puppet(stage.network, "c")
    c.hello()
    run.events.wait_for("hello", client="c")
    for puppet in (run.a, run.b):
        puppet.upload(1.0, 1)
    task = c.expect_task("evaluate", 1)
    assert task.outcome == "none"
    c.report(task, loss=4.0)
    run.measured(1)
    assert c.expect_task("train", 2).outcome == "skipped"
    for puppet in (run.a, run.b, c):
        puppet.upload(1.0, 2)
    c.report(c.expect_task("evaluate", 2))
    run.measured(2)
    record = run.end()
    assert [[c.id for c in r.clients] for r in record.rounds] == [["a", "b", "c"]] * 2
    assert record.rounds[0].clients[2].status == "skipped"
    assert record.rounds[0].global_.eval_loss == 2.0  # (1 + 1 + 4) / 3
    assert record.rounds[1].accepted == ["a", "b", "c"]
    assert [c.id for c in record.before] == ["a", "b"]


def test_it_waits_when_every_device_has_left(stage: Stage) -> None:
    run = Deployed(stage, minimum_clients=1)
    run.begin()
    for puppet in (run.a, run.b):
        puppet.expect_task("train", 1)
        puppet.upload(1.0, 1)
    for puppet in (run.a, run.b):
        puppet.expect_task("evaluate", 1)
        puppet.hello(online=False)
    run.events.wait_for("round", round=1)
    run.passes(10 * DEADLINE)
    run.b.session = LATER
    run.b.hello()
    run.b.expect_task("train", 2)
    run.b.upload(1.0, 2)
    run.b.report(run.b.expect_task("evaluate", 2))
    record = run.end()
    assert [r.accepted for r in record.rounds] == [["a", "b"], ["b"]]
    assert record.rounds[1].clients[0].status == "skipped"


def test_a_round_waits_for_as_many_devices_as_the_run_needs_to_begin(stage: Stage) -> None:
    run = Deployed(stage, minimum_clients=2)
    run.begin()
    for puppet in (run.a, run.b):
        puppet.expect_task("train", 1)
        puppet.upload(1.0, 1)
    run.a.report(run.a.expect_task("evaluate", 1))
    run.b.expect_task("evaluate", 1)
    run.b.hello(online=False)
    run.events.wait_for("round", round=1)
    run.passes(10 * DEADLINE)
    run.b.session = LATER
    run.b.hello()
    for puppet in (run.a, run.b):
        puppet.expect_task("train", 2)
        puppet.upload(1.0, 2)
    run.measured(2)
    assert [r.accepted for r in run.end().rounds] == [["a", "b"], ["a", "b"]]


def test_a_device_whose_update_is_in_is_not_asked_for_it_again(stage: Stage) -> None:
    run = Deployed(stage, rounds=1)
    run.begin()
    for puppet in (run.a, run.b):
        puppet.expect_task("train", 1)
    run.a.upload(1.0, 1)
    run.a.session = LATER
    run.a.hello()  # it was started again
    run.events.wait_for("hello", client="a", times=2)
    run.b.upload(1.0, 1)
    assert run.a.expect(Task).work == "evaluate"
    run.b.report(run.b.expect_task("evaluate", 1))
    run.passes(601.0)
    assert run.end().rounds[0].accepted == ["a", "b"]


def test_the_end_is_said_to_a_device_that_comes_back_while_others_have_left(stage: Stage) -> None:
    run = Deployed(stage, rounds=1, farewell_seconds=60.0)
    run.begin()
    for puppet in (run.a, run.b):
        puppet.expect_task("train", 1)
        puppet.upload(1.0, 1)
    run.measured(1)
    run.a.expect_task("stop", 1)
    run.a.hello(online=False)
    run.b.hello()  # the broker fell, and what was said to it is lost
    run.b.expect_task("stop", 1)
    run.b.expect_task("stop", 1)
    assert run.thread.is_alive()
    run.b.hello(online=False)
    assert run.end().status == "done"


def test_a_run_that_is_over_waits_for_nobody_to_say_so(stage: Stage) -> None:
    run = Deployed(stage, rounds=1)
    run.begin()
    for puppet in (run.a, run.b):
        puppet.expect_task("train", 1)
        puppet.upload(1.0, 1)
    run.measured(1)
    over = run.end()
    for puppet in (run.a, run.b):
        puppet.hello(online=False)
    run.start(over)
    assert run.end().status == "done"


def test_the_grant_of_a_device_that_fell_silent_is_handed_on(stage: Stage) -> None:
    limits = UploadLimits(grants=1, window=8, expiry_seconds=30.0)
    run = Deployed(stage, rounds=1, limits=limits)
    run.begin()
    for puppet in (run.a, run.b):
        puppet.expect_task("train", 1)
    run.a.offer(1.0)
    run.a.expect(Grant)
    offer, blob = run.b.offer(3.0)
    run.passes(31.0)
    run.b.expect(Grant)
    run.b.send(offer, blob)
    run.b.answer(offer.blob)
    run.passes(DEADLINE)
    assert run.measured(1) == ["lost", "aggregated"]
    assert run.end().rounds[0].accepted == ["b"]


class Losing(MemoryNetwork):
    """A network whose broker can be started again, empty: it tells every node that it connects."""

    def __init__(self) -> None:
        super().__init__()
        self._told: list[Connected] = []

    def open(
        self,
        *,
        client_id: str,
        filters: list[str],
        deliver: Deliver,
        connected: Connected,
        will: Will | None = None,
    ) -> Transport:
        """Return a connection, and remember whom to tell."""
        self._told.append(connected)
        return super().open(
            client_id=client_id, filters=filters, deliver=deliver, connected=connected, will=will
        )

    def start_again(self) -> None:
        """Forget what was retained, and connect everybody anew."""
        self._retained.clear()
        for connected in self._told:
            connected()


def test_a_broker_that_lost_the_manifest_gets_it_again(stage: Stage) -> None:
    stage.network = network = Losing()
    run = Deployed(stage, rounds=1)
    run.begin()
    run.a.expect_task("train", 1)
    published: queue.Queue[bytes] = queue.Queue()
    network.open(
        client_id="late",
        filters=[topics.manifest(RUN)],
        deliver=lambda _topic, payload: published.put(payload),
        connected=lambda: None,
    ).start()
    retained = published.get(timeout=LIMIT)
    network.start_again()
    assert published.get(timeout=LIMIT) == retained
    for puppet in (run.a, run.b):
        puppet.upload(2.0, 1)
    run.measured(1)
    run.end()
    manifest = decode(retained)
    assert isinstance(manifest, Manifest)
    assert (manifest.binding, manifest.layout) == (BINDING, LAYOUT.sha256)
    assert manifest.state is not None
    assert manifest.state.round == 0


def test_it_begins_with_fewer_devices_once_it_has_waited_long_enough(stage: Stage) -> None:
    run = Deployed(stage, clients=5, minimum_clients=1, gather_seconds=60.0, rounds=1)
    run.start()
    run.passes(61.0)  # nobody is there: it goes on waiting
    run.a.hello()
    run.events.wait_for("hello", client="a")
    assert run.events.all("task") == []
    run.passes(61.0)
    run.a.report(run.a.expect_task("evaluate", 0))
    run.a.expect_task("train", 1)
    run.a.upload(1.0, 1)
    run.a.report(run.a.expect_task("evaluate", 1))
    assert [c.id for c in run.end().clients] == ["a"]


def test_a_refused_update_is_told_counted_and_not_waited_for(stage: Stage) -> None:
    run = Deployed(stage, rounds=1)
    run.begin()
    a, b = run.a, run.b
    lying = blob_of("b", 1.0, examples=1000)
    offer = offer_of("b", lying)
    b.say(offer)
    b.expect(Grant)
    b.send(offer, lying)
    answer = b.answer(offer.blob)
    assert isinstance(answer, Reject)
    assert answer.code == "examples"
    a.upload(1.0, 1)  # and with that the round is over
    assert run.measured(1) == ["aggregated", "rejected"]
    record = run.end()
    assert record.rounds[0].observed.refused == {"examples": 1}
    (_, refused) = record.rounds[0].clients
    assert refused.reason.startswith("examples: the update weighs 1000 examples")
    assert len(run.events.all("refused")) == 1


# -- attacks --------------------------------------------------------------------------------------


def malformed() -> list[bytes]:
    """Return what is no message, or none for an aggregator."""
    task = Task(run=RUN, client="a", work="stop", stage="instruction", round=0, state=None, seed=0)
    return [
        b"x",
        b"PWFF",
        b"PWFF\x01" + bytes(59),
        b"\xff\xfe\x00",
        b"[]",
        b"{",
        b"{}",
        b"{" * 30_000,
        b'{"kind":' * 5_000,
        b'{"kind":"HELLO"}',
        b'{"kind":"TASK\xff"}',
        b'{"kind":"REPORT","eval_loss":NaN}',
        b"{" + b" " * 70_000 + b"}",
        encode(task),
    ]


def test_malformed_bytes_on_every_topic_are_counted_and_harm_nothing(stage: Stage) -> None:
    run = Deployed(stage, rounds=1)
    run.begin()
    places = [
        topics.state(RUN, "a"),
        topics.control(RUN, "a"),
        topics.data(RUN, "a", "0" * 64),
        topics.control(RUN, "nobody"),
        f"{topics.ROOT}/{RUN}/c//state",
        f"{topics.ROOT}/{RUN}/c/..%2f..%2fetc/up/passwd",
    ]
    attacker = Puppet(stage.network, "x")
    for topic in places:
        for payload in malformed():
            attacker.publish(topic, payload)
        attacker.publish(topic, b"")  # takes a retained message back: not worth a word
    for puppet in (run.a, run.b):
        puppet.expect_task("train", 1)
        puppet.upload(2.0, 1)
    run.measured(1)
    record = run.end()
    refused = record.rounds[0].observed.refused
    assert sum(refused.values()) == len(places) * len(malformed())
    assert set(refused) <= {"chunk", "grant", "run", "schema", "size", "identity"}
    assert record.rounds[0].accepted == ["a", "b"]
    assert state_after(stage.path, 1).tobytes() == (initial() + np.float32(2.0)).tobytes()
    assert [c.id for c in record.clients] == ["a", "b"]


def test_nobody_speaks_in_another_devices_name(stage: Stage) -> None:
    run = Deployed(stage, rounds=1)
    run.begin()
    a, b = run.a, run.b
    attacker = Puppet(stage.network, "x")
    # on its own topic in the name of a: HELLO, OFFER and REPORT
    away = Hello(
        run=RUN, client="a", session=SESSION, online=False, binding=BINDING, layout=LAYOUT.sha256
    )
    attacker.publish(topics.state(RUN, "x"), encode(away))
    blob = blob_of("a", 99.0)
    attacker.say(offer_of("a", blob))
    attacker.hello(device=device("a"))  # in its own name with the record of another
    attacker.expect(Reject)
    # on the topic of a without a's session
    attacker.publish(topics.control(RUN, "a"), encode(offer_of("a", blob, session=LATER)))
    # of another run on this run's topics
    attacker.publish(topics.control(RUN, "a"), encode(offer_of("a", blob, run="other")))
    for puppet in (a, b):
        puppet.expect_task("train", 1)
        assert getattr(puppet.upload(2.0, 1), "status", "") == "stored"
    run.measured(1)
    record = run.end()
    assert record.rounds[0].observed.refused == {"identity": 4, "session": 1}
    assert state_after(stage.path, 1).tobytes() == (initial() + np.float32(2.0)).tobytes()


def test_chunks_without_a_grant_and_requests_beyond_the_shelf_are_refused(stage: Stage) -> None:
    run = Deployed(stage, rounds=1)
    run.begin()
    a, b = run.a, run.b
    a.expect_task("train", 1)
    blob = blob_of("a", 99.0)
    a.send(offer_of("a", blob), blob)
    want = {"run": RUN, "client": "a", "session": SESSION}
    a.say(Want(**want, blob="0" * 64, missing="01"))
    state = b.expect_task("train", 1).state
    assert isinstance(state, StateRef)
    a.say(Want(**want, blob=state.blob, missing="ff"))
    a.say(Want(**want, blob=state.blob, missing="04"))
    assert a.expect_chunk() == 2
    for puppet in (a, b):
        puppet.upload(2.0, 1)
    run.measured(1)
    assert run.end().rounds[0].observed.refused == {"grant": 3, "state": 1, "bitmap": 1}


def test_a_device_that_asks_for_the_same_state_without_end_is_refused_and_counted(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cloud_aggregator.shelf._LEAST_AT_ONCE", 0)
    run = Deployed(stage, rounds=1)
    run.begin()
    state = run.a.expect_task("train", 1).state
    assert isinstance(state, StateRef)
    want = Want(run=RUN, client="a", session=SESSION, blob=state.blob, missing="07")
    for _ in range(10):  # four times the whole of it are given; no time passes
        run.a.say(want)
    assert [run.a.expect_chunk() for _ in range(12)] == [0, 1, 2] * 4
    run.b.expect_task("train", 1)
    for puppet in (run.a, run.b):
        puppet.upload(2.0, 1)
    run.measured(1)
    assert run.end().rounds[0].observed.refused == {"rate": 6}


def test_what_was_refused_before_the_first_round_is_in_its_record(stage: Stage) -> None:
    run = Deployed(stage, rounds=1)
    Puppet(stage.network, "x").publish(topics.control(RUN, "x"), b"{}")
    run.start()
    Puppet(stage.network, "y").publish(topics.state(RUN, "y"), b"{}")
    for puppet in (run.a, run.b):
        puppet.hello()
    run.measured(0)
    for puppet in (run.a, run.b):
        puppet.upload(2.0, 1)
    run.measured(1)
    # what x said, nobody heard: it came before the aggregator and was not retained
    assert run.end().rounds[0].observed.refused == {"schema": 1}


def test_a_result_said_twice_or_out_of_turn_counts_once(stage: Stage) -> None:
    run = Deployed(stage, rounds=1)
    run.begin()
    a, b = run.a, run.b
    task = a.expect_task("train", 1)
    a.report(task, loss=99.0, phase="evaluate")  # nobody asks for it now
    for puppet in (a, b):
        puppet.upload(2.0, 1)
    measured = a.expect_task("evaluate", 1)
    a.report(measured, loss=2.0)
    a.report(measured, loss=2.0)
    a.report(measured, loss=99.0, round=0)  # of the round before
    a.report(measured, loss=99.0, phase="restore")  # as if the round had been taken back
    a.report(measured, loss=99.0, stage="reward")  # of a stage that ended with the same round
    b.report(b.expect_task("evaluate", 1), loss=4.0)
    record = run.end()
    assert record.rounds[0].global_.eval_loss == 3.0  # (2 + 4) / 2


def test_a_report_does_not_stand_in_for_an_update(stage: Stage) -> None:
    run = Deployed(stage, rounds=1)
    run.begin()
    run.a.report(run.a.expect_task("train", 1), costs=Costs())
    run.events.wait_for("refused", client="a", code="round")
    for puppet in (run.a, run.b):
        puppet.upload(2.0, 1)
    run.measured(1)
    assert run.end().rounds[0].accepted == ["a", "b"]


def test_the_record_of_a_new_run_is_on_disk_before_the_first_device(stage: Stage) -> None:
    server = stage.aggregator(record=record_of())
    server.stop()
    assert server.run().status == "stopped"
    assert read_record(stage.path).run == RUN
