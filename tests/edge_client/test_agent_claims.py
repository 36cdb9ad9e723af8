"""A device whose large updates and states lie in a store; what the store does not give."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_client.agent import Agent
from edge_client.outbox import Outbox
from messaging.chunks import CHUNK_BYTES
from messaging.claims import Claims, ClaimStore
from messaging.protocol import Offer, StateRef, Want
from tests.edge_client.conftest import a_task
from tests.edge_client.test_agent import (
    BINDING,
    CLIENT,
    TRAINED,
    UPDATE,
    UPDATE_HASH,
    Device,
    a_state,
    grant,
    ref_to,
    vector_of,
)

assert len(UPDATE) < CHUNK_BYTES


class Claiming(Device):
    """A device with a store of its own, and the fetches that it wants."""

    def __init__(self, folder: Path, above_bytes: int = 1000, outbox: Outbox | None = None) -> None:
        super().__init__()
        self.store = ClaimStore(f"file://{folder}/store", attempts=1)
        self.fetches: list[StateRef] = []
        self.agent = Agent(
            self.local,
            binding=BINDING,
            publish=lambda *packet: self.published.append(packet),
            start_work=self.work.append,
            outbox=outbox,
            claims=Claims(store=self.store, above_bytes=above_bytes),
            start_fetch=self.fetches.append,
        )


def lying(device: Claiming, blob: bytes) -> StateRef:
    """Return the reference to a state that is said to lie in the store."""
    ref = ref_to(blob)
    return ref.model_copy(update={"url": device.store.url_of(ref.blob)})


def test_a_large_update_is_put_into_the_store_before_it_is_offered(tmp_path: Path) -> None:
    device = Claiming(tmp_path)
    offer = device.offer()
    assert offer.url == f"file://{tmp_path}/store/{UPDATE_HASH}"
    assert (tmp_path / "store" / UPDATE_HASH).read_bytes() == UPDATE
    device.hear(grant())  # the aggregator cannot reach the store
    assert device.said() == [0, 1, 2, 3, 4, 5]


def test_an_update_that_is_not_above_the_threshold_is_offered_in_chunks(tmp_path: Path) -> None:
    assert Claiming(tmp_path, above_bytes=len(UPDATE)).offer().url is None
    assert Claiming(tmp_path, above_bytes=len(UPDATE) - 1).offer().url is not None


def test_an_update_that_the_store_does_not_take_is_offered_in_chunks(tmp_path: Path) -> None:
    (tmp_path / "store").touch()  # no folder
    assert Claiming(tmp_path).offer().url is None


def test_after_a_restart_the_update_is_seen_to_lie_in_the_store(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path / "outbox")
    task = a_task(CLIENT)
    outbox.put(task, TRAINED)  # killed between the disk and the store
    device = Claiming(tmp_path, outbox=outbox)
    device.hear(task)
    (put,) = device.work
    assert device.said() == []
    device.agent.worked(task, put(), 0.0)
    assert device.says(Offer).url == device.store.url_of(UPDATE_HASH)
    assert (tmp_path / "store" / UPDATE_HASH).read_bytes() == UPDATE
    assert device.local.performed == []  # it did not train again


def test_a_state_in_the_store_is_fetched_once_and_installed(tmp_path: Path) -> None:
    device, blob = Claiming(tmp_path), a_state()
    ref = lying(device, blob)
    device.hear(a_task(CLIENT, state=ref))
    device.agent.tick(100.0)
    assert device.fetches == [ref]
    assert device.said() == []  # nothing is asked for over the broker
    device.agent.fetched(ref, blob, 1.0)
    device.finish_work()
    ((_, shared, downloaded),) = device.local.performed
    assert shared is not None
    assert np.array_equal(shared, vector_of())
    assert downloaded == len(blob)  # and no headers


def test_a_state_that_the_store_does_not_give_is_asked_for_in_chunks(tmp_path: Path) -> None:
    device, blob = Claiming(tmp_path), a_state()
    ref = lying(device, blob)
    device.hear(a_task(CLIENT, state=ref))
    device.agent.fetched(ref, None, 1.0)
    device.download(blob, 1.0)
    device.finish_work()
    assert len(device.local.performed) == 1
    device.said()
    device.hear(a_task(CLIENT, state=ref, round=2))
    assert len(device.fetches) == 1


def test_a_device_without_a_store_asks_for_chunks_of_a_state_that_lies_in_one(
    tmp_path: Path,
) -> None:
    blob = a_state()
    plain = Device()
    plain.hear(a_task(CLIENT, state=lying(Claiming(tmp_path), blob)))
    assert plain.says(Want).blob == hashlib.sha256(blob).hexdigest()


@pytest.mark.parametrize("late", [None, b"x"])
def test_a_fetch_that_ends_when_another_task_is_at_hand_changes_nothing(
    late: Any, tmp_path: Path
) -> None:
    device = Claiming(tmp_path)
    ref = lying(device, a_state())
    device.hear(a_task(CLIENT, state=ref))
    device.hear(a_task(CLIENT, round=2))
    device.agent.fetched(ref, late, 1.0)
    device.finish_work()
    assert [task.round for task, _, _ in device.local.performed] == [2]
