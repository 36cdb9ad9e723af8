"""A device's side of the protocol, message by message; time is a number and work is a list."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import pytest

from edge_client.agent import Agent
from edge_client.arrivals import Arrivals
from edge_client.local_client import Result
from edge_client.stage_work import GlobalStates
from messaging import protocol, topics
from messaging.chunks import Missing, chunk_count, make_chunk, parse_chunk, wire_bytes
from messaging.codecs import BlobHeader, encode_blob
from messaging.layout import Layout, TensorSpec, Vector
from messaging.protocol import (
    Costs,
    DeviceRecord,
    Done,
    Grant,
    Have,
    Hello,
    Manifest,
    Message,
    Offer,
    Reject,
    Report,
    StateRef,
    Task,
    Want,
    decode,
    encode,
)
from messaging.security import DeviceSeal, SigningKey
from messaging.transfer import SILENCE_SECONDS
from tests.edge_client.conftest import a_device, a_setup, a_task

Kind = TypeVar("Kind")

CLIENT = "pi5-01"
BINDING = "ab" * 32
CHUNK = 1024  # 960 bytes of payload
LAYOUT = Layout((TensorSpec(name="adapters.0.mlp.up.bias", shape=(4000,)),))
COSTS = Costs(compute_seconds=1.5)


def a_state(round_: int = 0, *, run: str = "trial", layout: Layout = LAYOUT) -> bytes:
    """Return a global state as bytes."""
    header = BlobHeader(
        run=run, round=round_, sender="aggregator", codec="fp32", layout=layout.sha256, examples=0
    )
    return encode_blob(vector_of(round_, layout), layout, header)


def vector_of(round_: int = 0, layout: Layout = LAYOUT) -> Vector:
    """Return what ``a_state`` holds."""
    return np.arange(layout.size, dtype=np.float32) + round_


def ref_to(blob: bytes, round_: int = 0) -> StateRef:
    """Return how a task names a global state."""
    return StateRef(
        round=round_,
        blob=hashlib.sha256(blob).hexdigest(),
        bytes=len(blob),
        chunk_bytes=CHUNK,
        chunks=chunk_count(len(blob), CHUNK),
    )


UPDATE = bytes(range(256)) * 20  # 5,120 bytes: 6 chunks
UPDATE_HASH = hashlib.sha256(UPDATE).hexdigest()
TRAINED = Result(costs=COSTS, examples=4, blob=UPDATE, train_loss=2.5)
EVALUATED = Result(costs=COSTS, examples=1, eval_loss=3.0, eval_accuracy=0.25)


@dataclass
class _Local:
    """Does a device's work as the test wants it."""

    setup: Any = field(default_factory=lambda: a_setup(LAYOUT, chunk_bytes=CHUNK))
    device: DeviceRecord = field(default_factory=lambda: a_device(CLIENT))
    result: Result = TRAINED
    performed: list[tuple[Task, Vector | None, int]] = field(default_factory=list)

    def perform(self, task: Task, states: GlobalStates, download_bytes: int) -> Result:
        self.performed.append((task, states.shared, download_bytes))
        return self.result


class Device:
    """An agent, what it published, and the work that it wants done."""

    def __init__(self, local: _Local | None = None, **settings: Any) -> None:
        self.local = local or _Local()
        self.published: list[tuple[str, bytes, bool]] = []
        self.work: list[Callable[[], Result]] = []
        self.agent = Agent(
            self.local,
            binding=BINDING,
            publish=lambda *packet: self.published.append(packet),
            start_work=self.work.append,
            **settings,
        )

    def hear(self, message: Message, now: float = 0.0) -> None:
        """Let a message arrive."""
        self.agent.received(encode(message), now)

    def said(self) -> list[Any]:
        """Return what it said since it was last asked: messages, and chunks by their index."""
        said, self.published = self.published, []
        return [
            decode(payload) if payload[:1] == b"{" else parse_chunk("trial", payload).index
            for _, payload, _ in said
        ]

    def says(self, kind: type[Kind]) -> Kind:
        """Return the one message that it said, which must be of this kind."""
        (message,) = self.said()
        assert isinstance(message, kind)
        return message

    def download(self, blob: bytes, now: float = 0.0) -> None:
        """Send the chunks that it asks for until it asks for no more."""
        while self.published:
            want = self.says(Want)
            assert want.blob == hashlib.sha256(blob).hexdigest()
            for index in Missing.from_bitmap(want.missing, 10_000).indices:
                self.agent.received(make_chunk("trial", want.blob, blob, index, CHUNK), now)

    def finish_work(self, now: float = 0.0) -> None:
        """Do the work that it asked for and hand the result back."""
        (function,) = self.work
        self.work.clear()
        result = function()
        self.agent.worked(self.local.performed[-1][0], result, now)

    def offer(self, **changes: Any) -> Offer:
        """Let it train for a task without a state, and return its offer."""
        self.hear(a_task(CLIENT, **changes))
        self.finish_work()
        return self.says(Offer)


@pytest.fixture
def device() -> Device:
    """Return a device that has said nothing yet."""
    return Device()


def grant(window: int = 8, missing: set[int] | None = None, blob: str = UPDATE_HASH) -> Grant:
    """Return a grant for the update's six chunks."""
    bitmap = Missing(6, missing).bitmap()
    return Grant(
        run="trial", client=CLIENT, blob=blob, missing=bitmap, window=window, expiry_seconds=30.0
    )


def have(missing: set[int]) -> Have:
    """Return a word about which of the update's six chunks are missing."""
    bitmap = Missing(6, missing).bitmap()
    return Have(run="trial", client=CLIENT, blob=UPDATE_HASH, missing=bitmap)


DONE = Done(run="trial", client=CLIENT, blob=UPDATE_HASH, status="stored")


def reject(code: str, blob: str | None = None) -> Reject:
    """Return a refusal."""
    return Reject(run="trial", client=CLIENT, blob=blob, code=code, reason=f"because of {code}")


def manifest(**changes: Any) -> Manifest:
    """Return the run's manifest."""
    fields: dict[str, Any] = {
        "run": "trial",
        "session": "0" * 16,
        "method": "pwff",
        "stage": "instruction",
        "state": None,
        "binding": BINDING,
        "layout": LAYOUT.sha256,
    }
    return Manifest(**{**fields, **changes})


# -- being there -----------------------------------------------------------------------------------


def test_on_every_connection_a_device_says_what_it_is(device: Device) -> None:
    for _ in range(2):
        device.agent.connected(0.0)
        ((topic, payload, retain),) = device.published
        device.published.clear()
        assert (topic, retain) == ("pwff/v1/trial/c/pi5-01/state", True)
        assert decode(payload) == Hello(
            run="trial",
            client=CLIENT,
            session=device.agent.session,
            online=True,
            binding=BINDING,
            layout=LAYOUT.sha256,
            device=device.local.device,
        )


def test_leaving_is_said_in_the_same_session_without_the_record(device: Device) -> None:
    left = decode(device.agent.hello(online=False))
    assert isinstance(left, Hello)
    assert (left.online, left.device, left.session) == (False, None, device.agent.session)


def test_every_start_is_a_session_of_its_own() -> None:
    sessions = {Device().agent.session for _ in range(20)}
    assert len(sessions) == 20
    assert {len(s) for s in sessions} == {16}


def test_a_device_listens_to_its_own_topic_and_to_the_manifest(device: Device) -> None:
    assert device.agent.filters == [
        "pwff/v1/trial/c/pi5-01/down",
        "pwff/v1/trial/model/latest",
    ]


# -- one round -------------------------------------------------------------------------------------


def test_a_training_task_becomes_an_update_at_the_aggregator(device: Device) -> None:
    blob = a_state()
    ref = ref_to(blob)
    assert ref.chunks == 17  # asked for eight at a time
    device.hear(a_task(CLIENT, state=ref))
    device.download(blob)
    device.finish_work()
    ((task, shared, downloaded),) = device.local.performed
    assert task.round == 1
    assert shared is not None
    assert np.array_equal(shared, vector_of())
    assert downloaded == wire_bytes(len(blob), CHUNK) == len(blob) + 17 * 64
    assert device.published[0][0] == topics.control("trial", CLIENT)
    offer = device.says(Offer)
    assert offer == Offer(
        run="trial",
        client=CLIENT,
        session=device.agent.session,
        round=1,
        blob=UPDATE_HASH,
        bytes=5120,
        chunk_bytes=CHUNK,
        chunks=6,
        binding=BINDING,
        layout=LAYOUT.sha256,
        codec="fp32",
        costs=COSTS,
    )
    device.hear(grant(window=2))
    assert {topic for topic, _, _ in device.published} == {topics.data("trial", CLIENT, offer.blob)}
    pieces = {i: parse_chunk("trial", p).payload for i, (_, p, _) in enumerate(device.published)}
    assert device.said() == [0, 1]
    missing = {0, 1, 2, 3, 4, 5}
    for arrived, next_ones in ((0, [2]), (2, [3]), (1, [4]), (3, [5]), (5, []), (4, [])):
        missing.discard(arrived)
        device.hear(have(missing))
        for _, packet, _ in device.published:
            chunk = parse_chunk("trial", packet)
            pieces[chunk.index] = chunk.payload
        assert device.said() == next_ones
    assert b"".join(pieces[i] for i in range(6)) == UPDATE
    device.hear(DONE)
    device.agent.tick(1000.0)
    assert device.said() == []
    assert not device.agent.finished


def with_lora(modules: int) -> Layout:
    """Return the layout of an adapter's bias and so many LoRA modules."""
    path = "transformer.h.{}.attn.c_attn.query.lora_{}.weight"
    names = [path.format(block, factor) for block in range(modules) for factor in "AB"]
    factors = [TensorSpec(name=name, shape=(2, 2), scale_axis=0) for name in names]
    return Layout((*LAYOUT.specs, *factors))


def test_a_device_with_fewer_lora_modules_offers_its_own_layout_in_the_runs() -> None:
    device = Device(
        _Local(
            setup=a_setup(with_lora(3), chunk_bytes=CHUNK),
            device=a_device(CLIENT, lora_count=2),
        )
    )
    device.agent.connected(0.0)
    assert device.says(Hello).layout == with_lora(3).sha256
    blob = a_state(layout=with_lora(3))
    device.hear(a_task(CLIENT, state=ref_to(blob)))
    device.download(blob)
    device.finish_work()
    ((_, shared, _),) = device.local.performed
    assert shared is not None
    assert np.array_equal(shared, vector_of(layout=with_lora(3)))  # the whole state comes down
    assert device.says(Offer).layout == with_lora(2).sha256


def test_chunks_are_asked_for_eight_at_a_time(device: Device) -> None:
    blob = a_state()
    device.hear(a_task(CLIENT, state=ref_to(blob)))
    asked = []
    while device.published:
        want = device.says(Want)
        indices = sorted(Missing.from_bitmap(want.missing, 17).indices)
        asked.append(indices)
        for index in reversed(indices):
            assert not device.published  # nothing is asked while an answer is on its way
            device.agent.received(make_chunk("trial", want.blob, blob, index, CHUNK), 0.0)
    assert asked == [list(range(8)), list(range(8, 16)), [16]]


def test_an_evaluation_becomes_a_report(device: Device) -> None:
    device.local.result = EVALUATED
    device.hear(a_task(CLIENT, work="evaluate", round=4))
    device.finish_work()
    assert device.says(Report) == Report(
        run="trial",
        client=CLIENT,
        session=device.agent.session,
        round=4,
        phase="evaluate",
        examples=1,
        eval_loss=3.0,
        eval_accuracy=0.25,
        costs=COSTS,
    )


def test_a_training_that_shares_nothing_becomes_a_report(device: Device) -> None:
    device.local.result = Result(costs=COSTS, examples=4, train_loss=2.5)
    device.hear(a_task(CLIENT))
    device.finish_work()
    report = device.says(Report)
    assert (report.phase, report.round, report.train_loss) == ("train", 1, 2.5)


def test_a_state_that_is_there_is_not_asked_for_again(device: Device) -> None:
    blob = a_state()
    device.hear(a_task(CLIENT, work="evaluate", round=0, state=ref_to(blob)))
    device.download(blob)
    device.finish_work()
    device.said()
    device.hear(a_task(CLIENT, state=ref_to(blob)))
    assert device.said() == []
    device.finish_work()
    bytes_counted = [downloaded for _, _, downloaded in device.local.performed]
    assert bytes_counted == [wire_bytes(len(blob), CHUNK), 0]
    shared = device.local.performed[1][1]
    assert shared is not None
    assert np.array_equal(shared, vector_of())


def test_a_task_without_a_state_gets_none_though_one_is_there(device: Device) -> None:
    blob = a_state()
    device.hear(a_task(CLIENT, state=ref_to(blob)))
    device.download(blob)
    device.finish_work()
    device.said()
    device.hear(a_task(CLIENT, round=2))
    device.finish_work()
    assert device.local.performed[1][1:] == (None, 0)


# -- the same again --------------------------------------------------------------------------------


def test_a_task_that_comes_again_is_answered_again_and_worked_once(device: Device) -> None:
    blob = a_state()
    task = a_task(CLIENT, state=ref_to(blob))
    device.hear(task)
    device.hear(task)  # while it downloads
    device.download(blob)
    device.hear(task)  # while it works
    assert device.said() == []
    device.finish_work()
    offer = device.says(Offer)
    device.hear(task)
    assert device.says(Offer) == offer
    device.hear(grant(window=4))
    assert device.said() == [0, 1, 2, 3]
    device.hear(task)  # the aggregator was started again: its grant names what it lacks
    assert device.says(Offer) == offer
    device.hear(grant(window=4, missing={1, 5}))
    assert device.said() == [1, 5]
    assert (len(device.local.performed), device.work) == (1, [])


def test_an_update_is_kept_after_done_for_an_aggregator_that_lost_it(device: Device) -> None:
    task = a_task(CLIENT)
    offer = device.offer()
    device.hear(grant())
    device.said()
    device.hear(DONE)
    device.hear(task)
    assert device.says(Offer) == offer
    device.hear(grant())
    assert device.said() == [0, 1, 2, 3, 4, 5]
    assert len(device.local.performed) == 1


def test_an_update_that_is_not_kept_is_made_again_for_an_aggregator_that_lost_it() -> None:
    device = Device(keeps_results=False)
    task = a_task(CLIENT)
    offer = device.offer()
    device.hear(grant())
    device.said()
    device.hear(DONE)
    device.hear(task)
    assert device.said() == []
    device.finish_work()
    assert device.says(Offer) == offer
    assert len(device.local.performed) == 2


def test_a_global_state_that_two_devices_hold_is_in_memory_once() -> None:
    arrivals = Arrivals()
    devices = [Device(arrivals=arrivals) for _ in range(2)]
    blob = a_state()
    for device in devices:
        device.hear(a_task(CLIENT, state=ref_to(blob)))
        device.download(blob)
        device.finish_work()
    one, other = (device.local.performed[0][1] for device in devices)
    assert one is not None
    assert one is other


def test_a_report_is_said_again(device: Device) -> None:
    device.local.result = EVALUATED
    task = a_task(CLIENT, work="evaluate")
    device.hear(task)
    device.finish_work()
    report = device.says(Report)
    # a device that connects again hears its task again, with the outcome that is known by now
    device.hear(task.model_copy(update={"outcome": "late"}))
    assert device.says(Report) == report
    assert device.work == []


@pytest.mark.parametrize(
    "changes",
    [
        {"round": 2},
        {"work": "evaluate"},
        {"stage": "reward"},
        {"state": ref_to(a_state())},
    ],
)
def test_a_task_that_differs_is_another_task(device: Device, changes: dict[str, Any]) -> None:
    device.offer()
    device.hear(a_task(CLIENT, **changes))
    if "state" in changes:
        device.download(a_state())
    device.finish_work()
    assert len(device.local.performed) == 2


# -- another task in the meantime ------------------------------------------------------------------


def test_a_task_that_comes_during_work_is_done_next_and_the_old_result_is_left(
    device: Device,
) -> None:
    device.hear(a_task(CLIENT, round=1))
    device.hear(a_task(CLIENT, round=2))
    assert len(device.work) == 1  # one piece of work at a time
    device.finish_work()
    assert device.said() == []
    device.finish_work()
    assert device.says(Offer).round == 2
    assert [task.round for task, _, _ in device.local.performed] == [1, 2]


def test_a_state_that_a_task_during_work_needs_is_fetched_afterwards(device: Device) -> None:
    blob = a_state(1)
    device.hear(a_task(CLIENT, round=1))
    device.hear(a_task(CLIENT, round=2, state=ref_to(blob, 1)))
    assert device.said() == []
    device.finish_work()
    device.download(blob)
    device.finish_work()
    assert device.says(Offer).round == 2


def test_the_first_task_again_during_its_own_work_is_answered_with_its_result(
    device: Device,
) -> None:
    device.hear(a_task(CLIENT, round=1))
    device.hear(a_task(CLIENT, round=2))
    device.hear(a_task(CLIENT, round=1))
    device.finish_work()
    assert device.says(Offer).round == 1
    assert device.work == []


def test_another_task_ends_an_upload(device: Device) -> None:
    device.offer()
    device.hear(a_task(CLIENT, work="evaluate"))
    device.hear(grant())
    device.agent.tick(1000.0)
    assert device.said() == []


def test_a_newer_state_replaces_one_that_is_under_way(device: Device) -> None:
    old, new = a_state(0), a_state(1)
    device.hear(a_task(CLIENT, state=ref_to(old)))
    want = device.says(Want)
    device.hear(a_task(CLIENT, round=2, state=ref_to(new, 1)))
    device.agent.received(make_chunk("trial", want.blob, old, 0, CHUNK), 0.0)
    device.download(new)
    device.finish_work()
    shared = device.local.performed[0][1]
    assert shared is not None
    assert np.array_equal(shared, vector_of(1))


def test_a_state_that_no_task_needs_any_more_is_not_asked_for(device: Device) -> None:
    device.hear(a_task(CLIENT, state=ref_to(a_state())))
    device.says(Want)
    device.hear(a_task(CLIENT, round=2))
    device.agent.tick(1000.0)
    assert device.said() == []
    assert len(device.work) == 1


# -- what alignment needs besides ------------------------------------------------------------------

HEADS = Layout((TensorSpec(name="reward.helpfulness.inner.bias", shape=(1500,)),))


class _Learner(_Local):
    """A device of three stages that keeps what it was handed."""

    def __init__(self) -> None:
        layouts = {"instruction": LAYOUT, "reward": HEADS, "alignment": LAYOUT}
        setup = replace(a_setup(LAYOUT, chunk_bytes=CHUNK), layouts=layouts)
        super().__init__(setup=setup, result=EVALUATED)
        self.handed: list[GlobalStates] = []

    def perform(self, task: Task, states: GlobalStates, download_bytes: int) -> Result:
        copy = deepcopy(states)  # what the device gives up is gone, whatever the test keeps
        self.handed.append(copy)
        return super().perform(task, copy, download_bytes)


class _Pupil(Device):
    """A device of three stages."""

    def __init__(self) -> None:
        self.learner = _Learner()
        super().__init__(self.learner)

    def fetch(self, *blobs: bytes) -> list[int]:
        """Give it all that it asks for; return which of the blobs that is, in its order."""
        hashes = [hashlib.sha256(blob).hexdigest() for blob in blobs]
        asked: list[int] = []
        while self.published:
            want = self.says(Want)
            which = hashes.index(want.blob)
            asked += [which] if not asked or asked[-1] != which else []
            for index in Missing.from_bitmap(want.missing, 10_000).indices:
                packet = make_chunk("trial", want.blob, blobs[which], index, CHUNK)
                self.agent.received(packet, 0.0)
        return asked


TUNED, LEARNED = a_state(3), a_state(5, layout=HEADS)


def in_alignment(round_: int, state: bytes, of_round: int, **changes: Any) -> Task:
    """Return a task of alignment."""
    refs = {"reward": ref_to(LEARNED, 5), "reference": ref_to(TUNED, 3), **changes}
    return a_task(CLIENT, stage="alignment", round=round_, state=ref_to(state, of_round), **refs)


def test_a_task_of_alignment_asks_for_all_that_is_not_there_one_after_the_other() -> None:
    device, moved = _Pupil(), a_state(6)
    device.hear(in_alignment(7, moved, 6))
    assert device.fetch(moved, LEARNED, TUNED) == [0, 1, 2]
    device.finish_work()
    (states,) = device.learner.handed
    for found, wanted in (
        (states.shared, vector_of(6)),
        (states.reward, vector_of(5, HEADS)),
        (states.reference, vector_of(3)),
    ):
        assert found is not None
        assert np.array_equal(found, wanted)


def test_a_device_that_was_started_again_counts_the_tasks_own_state_alone() -> None:
    """What it fetches of earlier stages was counted there: a restart changes no bit of a round."""
    device, moved = _Pupil(), a_state(6)
    device.hear(in_alignment(6, moved, 6, work="evaluate"))
    assert device.fetch(moved, LEARNED, TUNED) == [0, 1, 2]
    device.finish_work()
    assert device.local.performed[0][2] == wire_bytes(len(moved), CHUNK)


@pytest.mark.parametrize("work", ["evaluate", "restore"])
def test_a_report_says_which_measurement_of_which_stage_it_is(work: str) -> None:
    device = _Pupil()
    device.hear(in_alignment(6, TUNED, 3, work=work))
    device.fetch(TUNED, LEARNED)
    device.finish_work()
    report = device.says(Report)
    assert (report.stage, report.phase, report.round) == ("alignment", work, 6)


def test_a_task_of_another_stage_hands_over_its_own_state_alone() -> None:
    device = _Pupil()
    device.hear(a_task(CLIENT, stage="reward", round=5, state=ref_to(LEARNED, 5)))
    assert device.fetch(LEARNED) == [0]
    device.finish_work()
    (states,) = device.learner.handed
    assert states.shared is not None
    assert np.array_equal(states.shared, vector_of(5, HEADS))
    assert (states.reward, states.reference) == (None, None)


def test_the_last_states_of_earlier_stages_are_not_asked_for_again() -> None:
    device = _Pupil()
    first, moved, later = a_state(2), a_state(6), a_state(7)
    begun = a_state(4, layout=HEADS)
    course = [
        (a_task(CLIENT, round=3, state=ref_to(first, 2)), [first]),
        (a_task(CLIENT, work="evaluate", round=3, state=ref_to(TUNED, 3)), [TUNED]),
        (a_task(CLIENT, stage="reward", round=5, state=ref_to(begun, 4)), [begun]),
        (
            a_task(CLIENT, work="evaluate", stage="reward", round=5, state=ref_to(LEARNED, 5)),
            [LEARNED],
        ),
        # alignment begins with what stage 1 ended with: all three are there
        (in_alignment(5, TUNED, 3, work="evaluate"), []),
        (in_alignment(6, TUNED, 3), []),
        (in_alignment(6, moved, 6, work="evaluate"), [moved]),
        (in_alignment(7, later, 7, work="evaluate"), [later]),
        # taken back to an earlier one, which is the reference
        (in_alignment(7, TUNED, 3, work="restore"), []),
        (in_alignment(8, moved, 6), [moved]),  # it was given up when a newer one came
    ]
    for task, wanted in course:
        device.hear(task)
        assert device.fetch(*wanted) == list(range(len(wanted)))
        device.finish_work()
        assert device.says(Report).round == task.round
    counted = [downloaded for _, _, downloaded in device.local.performed]
    assert counted == [sum(wire_bytes(len(b), CHUNK) for b in wanted) for _, wanted in course]
    assert all(s.reward is not None for s in device.learner.handed[4:])
    assert all(s.reference is not None for s in device.learner.handed[4:])
    begins = device.learner.handed[4]
    assert begins.shared is not None
    assert np.array_equal(begins.shared, vector_of(3))


@pytest.mark.parametrize("name", ["reward", "reference"])
def test_a_state_of_another_layout_than_its_own_is_a_failure(name: str) -> None:
    # each in the layout of the other
    wrong = a_state(5) if name == "reward" else a_state(3, layout=HEADS)
    device, refs = _Pupil(), {name: ref_to(wrong, 5 if name == "reward" else 3)}
    device.hear(in_alignment(7, a_state(6), 6, **refs))
    device.fetch(a_state(6), wrong, LEARNED, TUNED)
    assert device.agent.failure is not None
    assert re.search(r"the global state of round \d cannot be used: .*layout", device.agent.failure)
    assert (device.agent.finished, device.work) == (True, [])


def test_reward_models_that_are_too_large_for_their_own_layout_are_refused(
    caplog: pytest.LogCaptureFixture,
) -> None:
    device = _Pupil()
    huge = StateRef(round=5, blob="cd" * 32, bytes=96_000, chunk_bytes=CHUNK, chunks=100)
    device.hear(in_alignment(7, a_state(6), 6, reward=huge))
    assert (device.said(), device.work, device.agent.task) == ([], [], None)
    assert "a global state of 96000 bytes is too large" in caplog.text


def test_a_task_that_is_said_again_with_a_state_that_is_too_large_changes_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    device, task = _Pupil(), in_alignment(7, a_state(6), 6)
    device.hear(task)
    before = device.agent.task
    assert before is not None
    huge = StateRef(round=5, blob="cd" * 32, bytes=2**33, chunk_bytes=2**24, chunks=513)
    device.hear(task.model_copy(update={"reward": huge}))
    assert device.agent.task == before
    assert f"a global state of {2**33} bytes is too large" in caplog.text


# -- what is lost on the way -----------------------------------------------------------------------


def test_an_offer_that_nobody_answers_is_made_again_after_five_seconds(device: Device) -> None:
    device.hear(a_task(CLIENT), 100.0)
    device.finish_work(100.0)
    offer = device.says(Offer)
    device.agent.tick(100.0 + SILENCE_SECONDS - 0.1)
    assert device.said() == []
    device.agent.tick(100.0 + SILENCE_SECONDS)
    assert device.says(Offer) == offer
    device.agent.tick(100.0 + SILENCE_SECONDS + 1)
    assert device.said() == []


def test_chunks_that_do_not_come_are_asked_for_again_after_five_seconds(device: Device) -> None:
    blob = a_state()
    ref = ref_to(blob)
    device.hear(a_task(CLIENT, state=ref), 100.0)
    device.says(Want)
    for index in (0, 1, 2, 4, 5, 6, 7):  # 3 is lost
        device.agent.received(make_chunk("trial", ref.blob, blob, index, CHUNK), 101.0)
    device.agent.tick(101.0 + SILENCE_SECONDS - 0.1)
    assert device.said() == []
    device.agent.tick(101.0 + SILENCE_SECONDS)
    asked = Missing.from_bitmap(device.says(Want).missing, 17).indices
    assert asked == {3, 8, 9, 10, 11, 12, 13, 14}


def test_a_chunk_that_comes_twice_changes_nothing(device: Device) -> None:
    blob = a_state()
    ref = ref_to(blob)
    device.hear(a_task(CLIENT, state=ref))
    device.says(Want)
    for index in [*range(8), 3]:
        device.agent.received(make_chunk("trial", ref.blob, blob, index, CHUNK), 0.0)
    device.download(blob)
    device.agent.received(make_chunk("trial", ref.blob, blob, 16, CHUNK), 0.0)
    assert len(device.work) == 1
    device.finish_work()
    assert device.local.performed[0][2] == wire_bytes(len(blob), CHUNK)


def test_a_late_word_about_an_update_that_is_over_is_left(device: Device) -> None:
    device.offer()
    device.hear(DONE)
    device.hear(grant())
    device.hear(have({0, 1}))
    device.hear(DONE)
    assert device.said() == []


def test_a_word_about_another_update_is_left(device: Device) -> None:
    device.offer()
    device.hear(grant(blob="cd" * 32))
    device.hear(Done(run="trial", client=CLIENT, blob="cd" * 32, status="stored"))
    assert device.said() == []
    device.hear(grant())
    assert device.said() == [0, 1, 2, 3, 4, 5]


def test_an_update_that_came_late_is_done_with(
    device: Device, caplog: pytest.LogCaptureFixture
) -> None:
    device.offer()
    with caplog.at_level(logging.INFO):
        device.hear(Done(run="trial", client=CLIENT, blob=UPDATE_HASH, status="late"))
    assert "came late" in caplog.text
    device.agent.tick(1000.0)
    assert device.said() == []


# -- what is wrong ---------------------------------------------------------------------------------


@pytest.mark.parametrize("code", ["base", "layout"])
def test_a_refusal_that_no_repetition_mends_is_a_failure(device: Device, code: str) -> None:
    device.agent.connected(0.0)
    device.said()
    device.hear(reject(code))
    assert (device.agent.finished, device.agent.failure) == (True, f"because of {code}")
    device.agent.connected(0.0)
    device.hear(a_task(CLIENT))
    device.agent.tick(1000.0)
    assert (device.said(), device.work) == ([], [])


def test_a_refused_update_is_dropped_and_the_next_round_goes_on(device: Device) -> None:
    device.offer()
    device.hear(reject("finite", UPDATE_HASH))
    device.hear(a_task(CLIENT))  # to send the same again would be of no use
    device.hear(grant())
    device.agent.tick(1000.0)
    assert (device.said(), device.agent.finished) == ([], False)
    device.hear(a_task(CLIENT, round=2))
    device.finish_work()
    assert device.says(Offer).round == 2


def test_a_refusal_of_another_update_leaves_this_one(device: Device) -> None:
    device.offer()
    device.hear(reject("hash", "cd" * 32))
    device.hear(grant(window=1))
    assert device.said() == [0]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"binding": "cd" * 32}, "another base, tokenizer or LoRA placement than this device"),
        ({"layout": "cd" * 32}, "shares other tensors than this device"),
    ],
)
def test_a_device_on_another_base_refuses_the_run_itself(
    device: Device, changes: dict[str, Any], sentence: str
) -> None:
    device.hear(manifest(**changes))
    assert device.agent.finished
    assert device.agent.failure is not None
    assert sentence in device.agent.failure


def test_an_aggregator_that_was_started_again_hears_of_the_device_once(device: Device) -> None:
    for session in ("0" * 16, "1" * 16):
        device.hear(manifest(session=session))
        assert device.says(Hello).online
        device.hear(manifest(session=session, state=ref_to(a_state())))
        assert device.said() == []
    assert (device.agent.finished, device.work) == (False, [])


@pytest.mark.parametrize("busy", [False, True])
def test_a_run_that_is_over_is_left_without_a_failure(device: Device, busy: bool) -> None:
    # with a task at hand, the device was not connected when it was told to stop
    if busy:
        device.offer()
    device.hear(manifest(finished=True))
    assert (device.agent.finished, device.agent.failure) == (True, None)


def test_a_stop_ends_the_devices_part(device: Device) -> None:
    device.hear(a_task(CLIENT))
    device.hear(a_task(CLIENT, work="stop", reason="converged"))
    assert (device.agent.finished, device.agent.failure) == (True, None)
    device.finish_work()
    device.agent.tick(1000.0)
    device.agent.connected(0.0)
    assert device.said() == []


def test_an_update_that_nobody_took_is_not_offered_after_a_stop(device: Device) -> None:
    device.offer()
    device.hear(a_task(CLIENT, work="stop"))
    device.hear(grant())
    device.agent.tick(1000.0)
    assert device.said() == []


OTHER_LAYOUT = Layout((TensorSpec(name="adapters.0.mlp.up.bias", shape=(3999,)),))


@pytest.mark.parametrize(
    ("blob", "sentence"),
    [
        (a_state(0, layout=OTHER_LAYOUT), "the global state of round 0 cannot be used: .*layout"),
        (a_state(3), "the global state of round 0 says that it is of round 3"),
        (a_state(0, run="other"), "of the run 'other'"),
        (b"no safetensors file at all", "the global state of round 0 cannot be used"),
    ],
)
def test_a_state_that_does_not_fit_is_a_failure_and_not_a_wait_for_ever(
    device: Device, blob: bytes, sentence: str
) -> None:
    device.hear(a_task(CLIENT, state=ref_to(blob)))
    device.download(blob)
    assert device.agent.failure is not None
    assert re.search(sentence, device.agent.failure)
    assert (device.agent.finished, device.work) == (True, [])


def test_a_state_with_another_hash_is_fetched_anew(device: Device) -> None:
    blob, wrong = a_state(), a_state(5)
    ref = ref_to(blob)
    device.hear(a_task(CLIENT, state=ref))
    device.says(Want)
    for index in range(17):
        device.published.clear()
        device.agent.received(make_chunk("trial", ref.blob, wrong, index, CHUNK), 0.0)
    assert (device.work, device.said()) == ([], [])
    device.agent.tick(1.0)
    device.download(blob)
    assert len(device.work) == 1
    assert device.agent.failure is None


def corrupted(packet: bytes) -> bytes:
    """Return a chunk with its last byte changed."""
    return packet[:-1] + bytes([packet[-1] ^ 1])


STATE = a_state()
HUGE = StateRef(round=1, blob="cd" * 32, bytes=960_000, chunk_bytes=CHUNK, chunks=1000)
GOOD_CHUNK = make_chunk("trial", ref_to(STATE).blob, STATE, 0, CHUNK)


@pytest.mark.parametrize(
    "payload",
    [
        b"{",
        b"{}",
        b"[]",
        b"\xff\xfe",
        b'{"kind": "TASK"}',
        b'{"kind": "GREETING", "run": "trial"}',
        b"{" * 5000,
        b"{" + b" " * 70_000 + b"}",
        encode(a_task(CLIENT, round=2)).replace(b'"round":2', b'"round":-2'),
        encode(a_task(CLIENT, round=2)).replace(b'"seed"', b'"sead"'),
        encode(a_task(CLIENT, round=2, run="other")),
        encode(a_task(CLIENT, round=2, state=HUGE)),
        encode(a_task("pi5-02", round=2)),
        encode(manifest(run="other", binding="cd" * 32)),
        encode(Reject(run="trial", client="pi5-02", blob=None, code="base", reason="")),
        encode(a_task("pi5-02", work="stop")),
        GOOD_CHUNK[:40],
        GOOD_CHUNK[:-1],
        corrupted(GOOD_CHUNK),
        make_chunk("other", ref_to(STATE).blob, STATE, 0, CHUNK),
        make_chunk("trial", ref_to(STATE).blob, STATE, 0, 2 * CHUNK),
        make_chunk("trial", ref_to(STATE).blob, STATE[:-1000], 0, CHUNK),
    ],
)
def test_what_is_malformed_or_for_another_is_logged_and_left(
    device: Device, payload: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    device.offer()
    device.hear(a_task(CLIENT, round=3, state=ref_to(STATE)))
    device.said()
    caplog.clear()
    device.agent.received(payload, 0.0)
    assert (device.said(), device.work, device.agent.finished) == ([], [], False)
    assert "refused a message" in caplog.text
    assert device.agent.task is not None
    assert device.agent.task.round == 3


@pytest.mark.parametrize("kind", [grant, have])
def test_a_bitmap_of_a_chunk_that_the_update_does_not_have_is_left(
    device: Device, kind: Callable[..., Message], caplog: pytest.LogCaptureFixture
) -> None:
    device.offer()
    message = kind(missing={0, 5})
    wrong = encode(message).replace(b'"missing":"21"', b'"missing":"41"')  # 2**0 + 2**6
    assert wrong != encode(message)
    device.agent.received(wrong, 0.0)
    assert device.said() == []
    assert "bitmap names chunk 6 of 6" in caplog.text
    device.hear(grant())
    assert device.said() == [0, 1, 2, 3, 4, 5]


def test_a_retained_message_that_is_cleared_says_nothing(
    device: Device, caplog: pytest.LogCaptureFixture
) -> None:
    device.agent.received(b"", 0.0)
    assert (device.said(), caplog.text) == ([], "")


def test_a_message_of_a_kind_that_only_devices_send_is_left(device: Device) -> None:
    offer = device.offer()
    device.hear(offer)
    device.agent.received(device.agent.hello(), 0.0)
    device.hear(
        Want(run="trial", client=CLIENT, session=offer.session, blob=offer.blob, missing="")
    )
    assert (device.said(), device.agent.finished) == ([], False)


def test_a_device_refuses_a_run_of_another_method(device: Device) -> None:
    device.hear(manifest(method="fedada"))
    assert device.agent.finished
    assert device.agent.failure is not None
    assert "'fedada'" in device.agent.failure
    assert "'pwff'" in device.agent.failure


def test_a_device_says_hello_to_an_aggregator_that_has_not_seen_it(device: Device) -> None:
    for session, greetings in (("1" * 16, 1), ("1" * 16, 0), ("2" * 16, 1)):
        device.published.clear()
        device.hear(manifest(session=session))
        assert len(device.published) == greetings


# -- versions --------------------------------------------------------------------------------------


def test_a_device_takes_part_in_a_run_of_a_newer_aggregator_that_still_understands_it(
    device: Device,
) -> None:
    newer = encode(manifest()).replace(b'"schema":1', b'"schema":7,"colour":"red"')
    device.agent.received(newer, 0.0)
    assert device.says(Hello).schema_ == 1
    task = encode(a_task()).replace(b'"schema":1', b'"schema":7,"mood":{"a":[1]}')
    device.agent.received(task, 0.0)
    assert device.agent.task is not None
    assert len(device.work) == 1


def test_a_device_that_its_aggregator_no_longer_understands_leaves_with_a_sentence(
    device: Device,
) -> None:
    newer = encode(manifest(oldest=3)).replace(b'"schema":1', b'"schema":7')
    device.agent.received(newer, 0.0)
    assert device.agent.finished
    assert device.agent.failure is not None
    assert "understands protocol 3 and newer, and this device speaks 1" in device.agent.failure
    assert "update pwff on this device" in device.agent.failure


def test_a_device_leaves_an_aggregator_that_it_no_longer_understands(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "SCHEMA", 3)
    monkeypatch.setattr(protocol, "OLDEST", 2)
    device.agent.received(encode(manifest()), 0.0)
    assert device.agent.failure is not None
    assert "protocol 1, and this side understands 2 to 3; update pwff" in device.agent.failure


def test_a_version_that_nobody_vouches_for_moves_no_sealed_device() -> None:
    """Anybody can write a byte that says another version; only a true message may end it."""
    seal = DeviceSeal(
        run="trial",
        client=CLIENT,
        key=bytes(32),
        verify_key=SigningKey.generate().verify_key,
        session="0" * 16,
        epoch=1,
    )
    local = _Local()
    agent = Agent(
        local, binding=BINDING, publish=lambda *_: None, start_work=lambda _: None, seal=seal
    )
    for packet in (b"S\x09M" + bytes(200), encode(manifest(oldest=9))):
        agent.received(packet, 0.0, topic=topics.manifest("trial"))
    assert not agent.finished
    assert agent.refused == {"version": 1, "mac": 1}


def test_a_device_that_was_away_asks_for_the_newest_state_alone(device: Device) -> None:
    states = [a_state(r) for r in range(6)]
    device.hear(a_task(CLIENT, round=1, state=ref_to(states[0])))
    device.download(states[0])
    device.finish_work()
    device.said()
    # rounds 2 to 5 go by without it
    device.hear(a_task(CLIENT, round=6, state=ref_to(states[5], 5)))
    asked = set()
    while device.published:
        want = device.says(Want)
        asked.add(want.blob)
        for index in Missing.from_bitmap(want.missing, 17).indices:
            device.agent.received(make_chunk("trial", want.blob, states[5], index, CHUNK), 1.0)
    assert asked == {hashlib.sha256(states[5]).hexdigest()}
    assert len(device.work) == 1


# -- brokers that take small packets ---------------------------------------------------------------


def on_a_broker(largest: list[int | None]) -> Device:
    """Return a device whose broker takes packets of the last of these sizes."""
    device = Device()
    device.agent = Agent(
        device.local,
        binding=BINDING,
        publish=lambda *packet: device.published.append(packet),
        start_work=device.work.append,
        largest_packet=lambda: largest[-1],
    )
    return device


def test_an_update_is_offered_in_pieces_that_the_broker_takes() -> None:
    device = on_a_broker([1200])
    device.local.setup = a_setup(LAYOUT, chunk_bytes=4096)
    offer = device.offer()
    assert (offer.chunk_bytes, offer.chunks) == (1024, 6)  # 1200 - 512 is below the least


def test_on_a_broker_of_smaller_packets_an_upload_is_offered_anew() -> None:
    largest: list[int | None] = [None]
    device = on_a_broker(largest)
    device.local.setup = a_setup(LAYOUT, chunk_bytes=4096)
    assert device.offer().chunks == 2
    largest.append(2048)
    device.agent.connected(1.0)
    device.said()
    device.hear(a_task(CLIENT))
    offer = device.says(Offer)
    assert (offer.blob, offer.chunk_bytes, offer.chunks) == (UPDATE_HASH, 1536, 4)


def test_a_state_that_comes_in_other_pieces_now_is_asked_for_in_those(device: Device) -> None:
    blob = a_state()
    ref = ref_to(blob)
    device.hear(a_task(CLIENT, state=ref))
    assert device.says(Want).missing == "ff0000"  # eight of 17
    larger = ref.model_copy(update={"chunk_bytes": 4096, "chunks": chunk_count(len(blob), 4096)})
    device.hear(a_task(CLIENT, state=larger), 0.1)
    assert larger.chunks == 5  # 16,296 bytes in pieces of 4,032
    assert device.says(Want).missing == "1f"
