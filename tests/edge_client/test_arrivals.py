"""Devices of one process that need the same state: who asks, who waits, and what each counts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edge_client.arrivals import Arrivals
from edge_client.host import Host
from messaging.chunks import Missing, make_chunk, wire_bytes
from messaging.claims import Claims, ClaimStore
from messaging.layout import Layout, TensorSpec
from messaging.memory import MemoryNetwork
from messaging.protocol import Hello, Report, StateRef, Want
from messaging.transfer import SILENCE_SECONDS
from tests.edge_client.conftest import WAIT_SECONDS, Cloud, a_device, a_setup, a_task
from tests.edge_client.test_agent import (
    BINDING,
    CHUNK,
    EVALUATED,
    Device,
    _Local,
    a_state,
    ref_to,
    reject,
    vector_of,
)
from tests.edge_client.test_host import running

BLOB = a_state()
REF = ref_to(BLOB)  # 17 pieces: eight, eight and one
NAMES = ("pi5-01", "pi5-02", "pi5-03")


class Neighbour(Device):
    """A device whose process has others."""

    def __init__(self, name: str, arrivals: Arrivals, **settings: Any) -> None:
        super().__init__(
            _Local(device=a_device(name), result=EVALUATED), arrivals=arrivals, **settings
        )
        self.name = name

    def needs(self, ref: StateRef = REF, *, now: float = 0.0, **changes: Any) -> None:
        """Hear of a task that needs a state."""
        self.hear(a_task(self.name, work="evaluate", state=ref, **changes), now)

    def answer(self, blob: bytes = BLOB, *, now: float = 0.0, times: int = 100) -> int:
        """Give it what it asks for, so many times at most; return how often it asked."""
        asked = 0
        while self.published and asked < times:
            want = self.says(Want)
            asked += 1
            for index in sorted(Missing.from_bitmap(want.missing, REF.chunks).indices):
                self.agent.received(make_chunk("trial", want.blob, blob, index, CHUNK), now)
        return asked

    def has_worked(self) -> None:
        """Do the work, which must be on the state, and cost what its way here costs alone."""
        self.finish_work()
        ((_, shared, downloaded),) = self.local.performed
        assert shared is not None
        assert np.array_equal(shared, vector_of())
        assert downloaded == wire_bytes(len(BLOB), CHUNK)


def neighbours(count: int = 2, **settings: Any) -> list[Neighbour]:
    """Return devices of one process."""
    arrivals = Arrivals()
    return [Neighbour(name, arrivals, **settings) for name in NAMES[:count]]


def test_the_first_of_a_process_asks_and_all_work_on_what_comes_as_if_alone() -> None:
    devices = neighbours(3)
    for device in devices:
        device.needs()
    first, *others = devices
    assert first.answer() == 3
    for device in others:
        device.agent.tick(0.0)
        assert device.said() == []
    for device in devices:
        device.has_worked()
    held = {id(device.local.performed[0][1]) for device in devices}
    assert len(held) == 1


def test_one_that_comes_late_takes_what_another_holds_and_counts_its_way() -> None:
    first, late = neighbours()
    first.needs()
    first.answer()
    late.needs()
    assert late.said() == []
    first.has_worked()
    late.has_worked()


def test_a_state_that_nobody_holds_any_longer_is_asked_for() -> None:
    first, late = neighbours()
    first.needs()
    first.answer()
    first.has_worked()
    first.local.performed.clear()
    first.said()
    newer = a_state(5)
    first.needs(ref_to(newer, 5), round=6)
    first.answer(newer)
    first.finish_work()
    late.needs()
    assert late.says(Want).blob == REF.blob


@pytest.mark.parametrize("way", ["stop", "refused", "gave up", "another task"])
def test_where_the_one_that_asks_leaves_the_next_goes_on_with_what_has_come(way: str) -> None:
    first, second, third = neighbours(3)
    for device in (first, second, third):
        device.needs()
    assert first.answer(times=1) == 1  # eight pieces, and it has asked for eight more
    if way == "stop":
        first.hear(a_task(first.name, work="stop"))
    elif way == "refused":
        first.hear(reject("base"))
    elif way == "gave up":
        first.agent.gave_up("its data are gone")
    else:
        first.hear(a_task(first.name, work="evaluate", round=2))
    for device in (second, third):
        device.agent.tick(0.1)
    assert third.said() == []
    want = second.says(Want)
    assert want.client == second.name
    assert Missing.from_bitmap(want.missing, REF.chunks).indices == set(range(8, 16))
    for index in range(8, 16):
        second.agent.received(make_chunk("trial", want.blob, BLOB, index, CHUNK), 0.2)
    assert second.answer() == 1
    second.has_worked()
    third.has_worked()
    assert first.local.performed == []


def test_where_the_one_that_asks_is_not_answered_the_next_asks() -> None:
    first, second = neighbours()
    for device in (first, second):
        device.needs()
    first.says(Want)
    for now in (SILENCE_SECONDS - 0.1, SILENCE_SECONDS):
        for device in (first, second):
            device.agent.tick(now)
    assert first.said() == []
    assert second.answer(now=SILENCE_SECONDS) == 3
    first.has_worked()
    second.has_worked()


def test_pieces_for_the_one_that_asked_before_are_taken_though_late() -> None:
    first, second = neighbours()
    for device in (first, second):
        device.needs()
    want = first.says(Want)
    first.agent.tick(SILENCE_SECONDS)
    second.says(Want)
    for index in range(8):
        first.agent.received(make_chunk("trial", want.blob, BLOB, index, CHUNK), 6.0)
    assert first.said() == []
    assert second.answer(now=6.0) == 2
    first.has_worked()


def test_pieces_of_another_state_make_the_next_one_ask() -> None:
    first, second = neighbours()
    for device in (first, second):
        device.needs()
    first.answer(bytes(len(BLOB)))
    assert first.agent.refused == {"hash": 1}
    for device in (first, second):
        device.agent.tick(0.1)
    assert first.said() == []
    assert second.answer(now=0.1) == 3
    first.has_worked()
    second.has_worked()


def test_a_state_that_can_never_be_used_is_a_failure_of_all_that_wait() -> None:
    devices = neighbours()
    alien = a_state(run="another")
    for device in devices:
        device.needs(ref_to(alien))
    devices[0].answer(alien)
    for device in devices:
        assert device.agent.failure == (
            "the global state of round 0 says that it is of round 0 of the run 'another'"
        )


def test_devices_of_other_layouts_do_not_share_what_comes() -> None:
    arrivals = Arrivals()
    first = Neighbour(NAMES[0], arrivals)
    other = Layout((TensorSpec(name="adapters.0.mlp.up.bias", shape=(4001,)),))
    local = _Local(device=a_device(NAMES[1]), setup=a_setup(other, chunk_bytes=CHUNK))
    second = Device(local, arrivals=arrivals)
    first.needs()
    second.hear(a_task(NAMES[1], state=REF))
    assert (first.answer(), second.says(Want).blob) == (3, REF.blob)


# -- from a store ----------------------------------------------------------------------------------


def fetching(count: int = 2) -> tuple[list[Neighbour], list[StateRef], StateRef]:
    """Return devices with a store, what they have fetched, and a state that lies there."""
    fetches: list[StateRef] = []
    store = ClaimStore("file:///nowhere/store", attempts=1)
    devices = neighbours(
        count, claims=Claims(store=store, above_bytes=1000), start_fetch=fetches.append
    )
    return devices, fetches, REF.model_copy(update={"url": store.url_of(REF.blob)})


def test_a_state_is_fetched_from_its_store_once_for_all_though_the_first_leaves() -> None:
    (first, second), fetches, ref = fetching()
    for device in (first, second):
        device.needs(ref)
    first.hear(a_task(first.name, work="stop"))
    second.agent.tick(10.0)
    assert fetches == [ref]
    first.agent.fetched(ref, BLOB, 11.0)
    second.finish_work()
    assert second.local.performed[0][2] == len(BLOB)  # and no headers
    assert second.says(Report).client == second.name


def test_a_state_that_its_store_does_not_give_is_asked_for_by_one() -> None:
    (first, second), fetches, ref = fetching()
    for device in (first, second):
        device.needs(ref)
    first.agent.fetched(ref, None, 1.0)
    assert second.said() == []
    assert first.answer(now=1.0) == 3
    assert fetches == [ref]
    first.has_worked()
    second.has_worked()


# -- on one host -----------------------------------------------------------------------------------


def test_two_clients_of_a_host_ask_once_over_the_wire_and_report_the_same_costs() -> None:
    network = MemoryNetwork()
    locals_ = [_Local(device=a_device(name), result=EVALUATED) for name in NAMES[:2]]
    host = Host(network, locals_, binding=BINDING)
    cloud = Cloud(network)
    with running(host) as run:
        assert {cloud.hear(Hello).client for _ in locals_} == set(NAMES[:2])
        for name in NAMES[:2]:
            cloud.say(name, a_task(name, work="evaluate", state=REF))
        for pieces in (range(8), range(8, 16), [16]):
            want = cloud.hear(Want)
            assert want.client == NAMES[0]
            for index in pieces:
                cloud.send(NAMES[0], make_chunk("trial", REF.blob, BLOB, index, CHUNK))
        assert {cloud.hear(Report).client for _ in locals_} == set(NAMES[:2])
        for name in NAMES[:2]:
            cloud.say(name, a_task(name, work="stop"))
        run.result(WAIT_SECONDS)
    for local in locals_:
        assert [downloaded for _, _, downloaded in local.performed] == [len(BLOB) + 17 * 64]
