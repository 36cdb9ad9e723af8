"""A run of three stages: what each begins with, what devices are told, and a round taken back."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from cloud_aggregator.counting import Counting
from cloud_aggregator.methods import find_method, initial_state, stage_layout
from cloud_aggregator.privacy import PrivacySettings
from cloud_aggregator.records import RunRecord
from cloud_aggregator.run_folder import RunFolder
from cloud_aggregator.settings import RunSettings
from cloud_aggregator.stages import StagePlan
from device_profiles.errors import InputError
from edge_client.local_client import Result, Setup
from edge_client.privacy import withheld_record
from edge_client.stage_work import GlobalStates
from messaging.codecs import encode_blob
from messaging.layout import Layout, Vector
from messaging.protocol import AlignmentSettings, Costs, PairFigures, ResponseFigures, Task
from tests.cloud_aggregator.conftest import (
    CHUNK,
    MODULES,
    RUN,
    SIZE,
    Events,
    constant,
    device,
    header,
    plan_of,
    record_of,
    settings_of,
)
from tests.cloud_aggregator.conftest import Stage as Theatre

PWFF = find_method("pwff")
LAYOUTS = {
    name: stage_layout(name, PWFF, MODULES) for name in ("instruction", "reward", "alignment")
}


class Pupil:
    """A device of three stages: adds 1 to what it is given, and says what it was given."""

    def __init__(self, client: str, kl: float = 1.0) -> None:
        self.device = device(client).model_copy(update={"preference_pairs": 3})
        self.setup = Setup(
            run=RUN,
            method="pwff",
            layouts=LAYOUTS,  # type: ignore[arg-type]
            placement="qkv",
            adapter_size=SIZE,
            lora_rank=2,
            chunk_bytes=CHUNK,
        )
        self.seen: list[tuple[Task, GlobalStates]] = []
        self._kl = kl

    def perform(self, task: Task, states: GlobalStates, download_bytes: int) -> Result:
        """Do a task at once."""
        del download_bytes
        self.seen.append((task, states))
        if task.work != "train":
            return self._measured(task)
        layout = LAYOUTS[task.stage]
        weight = 3 if task.stage == "reward" else self.device.examples
        head = header(
            self.device.id,
            round=task.round,
            layout=layout.sha256,
            examples=weight,
        )
        blob = encode_blob(constant(1.0, layout), layout, head)
        return Result(costs=Costs(), examples=weight, blob=blob)

    def _measured(self, task: Task) -> Result:
        if task.stage == "reward":
            figures = PairFigures(
                pairs=4, loss=0.5, accuracy=0.75, longer_wins=0.5, calibration_error=0.1
            )
            return Result(costs=Costs(), examples=4, pairs={"helpfulness": figures})
        responses = None
        if task.stage == "alignment":
            trained = task.work == "evaluate" and any(t.work == "train" for t, _ in self.of(task))
            responses = ResponseFigures(
                responses=2,
                scores={"helpfulness": 0.5, "harmlessness": -0.5},
                tokens=5.0,
                ended=1.0,
                kl=self._kl if trained else None,
            )
        return Result(
            costs=Costs(), examples=1, eval_loss=3.0, eval_accuracy=0.5, responses=responses
        )

    def of(self, task: Task) -> list[tuple[Task, GlobalStates]]:
        """Return what it was told in a task's stage."""
        return [(t, s) for t, s in self.seen if t.stage == task.stage]

    def told(self, work: str, stage: str) -> list[tuple[Task, GlobalStates]]:
        """Return what it was told to do in a stage."""
        return [(t, s) for t, s in self.seen if (t.work, t.stage) == (work, stage)]


def three_stages(**alignment: float) -> RunSettings:
    """Return a run of two clients: one round of instruction tuning, two of each other stage."""
    plans: list[StagePlan] = []
    for name, layout in LAYOUTS.items():
        rounds = 1 if name == "instruction" else 2
        plans.append(plan_of(stage=name, layout=layout, rounds=rounds))
    how = AlignmentSettings(kl_limit=alignment.get("kl_limit", 50.0))
    plans[-1] = dataclasses.replace(plans[-1], alignment=how)
    return dataclasses.replace(settings_of(clients=2, minimum_clients=2), stages=tuple(plans))


def record() -> RunRecord:
    """Return the record of such a run that has not begun."""
    return record_of(stages=["instruction", "reward", "alignment"])


def first(layout: Layout, stage: str) -> Vector:
    """Return what a stage begins with if nothing came before."""
    return layout.pack(initial_state(stage, PWFF, MODULES, 7))  # type: ignore[arg-type]


@pytest.fixture
def pupils(stage: Theatre) -> tuple[Pupil, Pupil]:
    """Return two devices that take part."""
    both = Pupil("a"), Pupil("b")
    stage.host(*both)
    return both


@pytest.mark.usefixtures("pupils")
def test_rounds_are_numbered_through_all_stages(stage: Theatre) -> None:
    run = stage.aggregator(three_stages(), record()).run()
    assert [(r.stage, r.round) for r in run.rounds] == [
        ("instruction", 1),
        ("reward", 2),
        ("reward", 3),
        ("alignment", 4),
        ("alignment", 5),
    ]
    assert [(b.id, b.stage) for b in run.before] == [
        (client, name) for name in LAYOUTS for client in "ab"
    ]
    assert (run.status, run.stop_reason) == ("done", "rounds")
    assert all(r.accepted == ["a", "b"] for r in run.rounds)


def test_alignment_begins_where_instruction_tuning_ended(
    stage: Theatre, pupils: tuple[Pupil, Pupil]
) -> None:
    stage.aggregator(three_stages(), record()).run()
    tuned = first(LAYOUTS["instruction"], "instruction") + np.float32(1)
    heads = first(LAYOUTS["reward"], "reward") + np.float32(1) + np.float32(1)
    for task, states in pupils[0].told("train", "alignment"):
        assert states.reference is not None
        assert np.array_equal(states.reference, tuned)
        assert states.reward is not None
        assert np.array_equal(states.reward, heads)
        assert states.shared is not None
        assert np.array_equal(states.shared, tuned + np.float32(task.round - 4))
    for stage_name in ("instruction", "reward"):
        assert all(
            s.reward is None and s.reference is None for _, s in pupils[0].told("train", stage_name)
        )


def test_reward_learning_weighs_by_pairs_and_begins_with_the_heads_of_the_seed(
    stage: Theatre, pupils: tuple[Pupil, Pupil]
) -> None:
    run = stage.aggregator(three_stages(), record()).run()
    begun = pupils[0].told("evaluate", "reward")[0][1].shared
    assert begun is not None
    assert np.array_equal(begun, first(LAYOUTS["reward"], "reward"))
    learned = [r for r in run.rounds if r.stage == "reward"]
    assert all(r.global_.reward_accuracy == 0.75 for r in learned)
    assert all(c.reward_accuracy == 0.75 for r in learned for c in r.clients)


def test_a_device_without_pairs_is_not_asked_to_learn_reward_models(stage: Theatre) -> None:
    with_pairs, without = Pupil("a"), Pupil("b")
    without.device = without.device.model_copy(update={"preference_pairs": 0})
    stage.host(with_pairs, without)
    run = stage.aggregator(three_stages(), record()).run()
    assert [r.accepted for r in run.rounds if r.stage == "reward"] == [["a"], ["a"]]
    assert without.told("train", "reward") == []
    assert run.rounds[-1].accepted == ["a", "b"]


def test_a_round_beyond_the_kl_limit_is_taken_back_everywhere(stage: Theatre) -> None:
    both = Pupil("a", kl=9.0), Pupil("b", kl=9.0)
    stage.host(*both)
    run = stage.aggregator(three_stages(kl_limit=5.0), record()).run()
    last = run.rounds[-1]
    assert (run.stop_reason, last.round, last.taken_back) == ("kl-limit", 4, "kl-limit")
    assert last.dropped is not None
    assert last.dropped.kl == 9.0
    assert last.global_.kl is None  # measured again on what was there before
    tuned = first(LAYOUTS["instruction"], "instruction") + np.float32(1)
    for pupil in both:
        ((task, states),) = pupil.told("restore", "alignment")
        assert task.round == 4
        assert states.shared is not None
        assert np.array_equal(states.shared, tuned)
    kept = load_file(RunFolder(stage.path).global_path(4))
    assert np.array_equal(LAYOUTS["alignment"].pack(kept), tuned)


def test_a_private_round_is_not_taken_back_on_the_word_of_a_device(stage: Theatre) -> None:
    """Broken off and done again it would be released twice; an honest device says nothing."""
    privacy = PrivacySettings(clip_norm=3.0, noise_multiplier=1.0, delta=1e-5, expected_clients=2)
    settings = dataclasses.replace(three_stages(kl_limit=5.0), counting=Counting(privacy=privacy))
    liars = Pupil("a", kl=9.0), Pupil("b", kl=9.0)
    for liar in liars:
        liar.device = withheld_record(liar.device)
    stage.host(*liars)
    run = stage.aggregator(settings, record()).run()
    assert [r.taken_back for r in run.rounds] == [""] * 5
    assert run.privacy is not None
    assert run.privacy.rounds == 5


def test_a_run_goes_on_in_the_stage_where_it_was_stopped(stage: Theatre) -> None:
    whole = three_stages()
    *begun, last = whole.stages
    stopped = dataclasses.replace(whole, stages=(*begun, dataclasses.replace(last, rounds=0)))
    run = record()
    for settings in (stopped, whole):
        both = Pupil("a"), Pupil("b")
        stage.host(*both)
        run = stage.aggregator(settings, run).run()
        stage.leave()
    assert [r.round for r in run.rounds] == [1, 2, 3, 4, 5]
    tuned = first(LAYOUTS["instruction"], "instruction") + np.float32(1)
    heads = first(LAYOUTS["reward"], "reward") + np.float32(1) + np.float32(1)
    task, states = both[0].told("train", "alignment")[0]
    assert task.round == 4
    assert states.reference is not None
    assert np.array_equal(states.reference, tuned)
    assert states.reward is not None
    assert np.array_equal(states.reward, heads)


def test_a_round_that_was_being_taken_back_when_the_run_broke_off_is_done_again(
    stage: Theatre,
) -> None:
    """Devices may have lost what they had learned in it: its updates alone are worth nothing."""
    events = Events()
    first_try = stage.aggregator(three_stages(kl_limit=5.0), record(), events)

    def stop_then(told: str, what: dict[str, Any]) -> None:
        if told == "task" and what["work"] == "restore":
            first_try.stop()

    events.on = stop_then
    stage.host(Pupil("a", kl=9.0), Pupil("b", kl=9.0))
    run = first_try.run()
    assert (run.status, len(run.rounds)) == ("stopped", 3)
    stage.leave()
    again = Pupil("a", kl=9.0), Pupil("b", kl=9.0)
    stage.host(*again)
    run = stage.aggregator(three_stages(kl_limit=5.0), run).run()
    assert [len(pupil.told("train", "alignment")) for pupil in again] == [1, 1]
    assert [r.taken_back for r in run.rounds] == ["", "", "", "kl-limit"]


def test_more_rounds_of_a_stage_that_another_has_followed_are_refused(stage: Theatre) -> None:
    stage.host(Pupil("a"), Pupil("b"))
    run = stage.aggregator(three_stages(), record()).run()
    begun, *others = three_stages().stages
    longer = (dataclasses.replace(begun, rounds=3), *others)
    server = stage.aggregator(dataclasses.replace(three_stages(), stages=longer), run)
    with pytest.raises(InputError, match="'instruction' ended after 1 rounds and 'reward' has"):
        server.run()
    assert (run.status, len(run.rounds)) == ("done", 5)
