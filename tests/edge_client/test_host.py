"""Agents, threads and connections together, against a scripted aggregator in this process."""

from __future__ import annotations

import hashlib
import itertools
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from edge_client.host import Host
from edge_client.local_client import Result
from edge_client.stage_work import GlobalStates
from messaging.chunks import Missing, parse_chunk
from messaging.claims import Claims, ClaimStore
from messaging.layout import Layout, TensorSpec
from messaging.memory import MemoryNetwork
from messaging.protocol import Costs, Done, Grant, Hello, Manifest, Offer, Reject, Report, Task
from tests.edge_client.conftest import WAIT_SECONDS, Cloud, a_device, a_setup, a_task

BINDING = "ab" * 32
LAYOUT = Layout((TensorSpec(name="adapters.0.mlp.up.bias", shape=(4,)),))
ONE, TWO = "pi5-01", "pi5-02"


class Worker:
    """Does a client's work once the test lets it."""

    def __init__(self, client: str, error: Exception | None = None) -> None:
        self.setup = a_setup(LAYOUT, chunk_bytes=1024)
        self.device = a_device(client)
        self.begun = threading.Event()
        self.may_end = threading.Event()
        self.error = error

    @property
    def update(self) -> bytes:
        """What it uploads: three chunks."""
        return self.device.id.encode() * 400

    def perform(self, task: Task, states: GlobalStates, download_bytes: int) -> Result:
        """Wait for the test, then return the update or raise the error."""
        del states, download_bytes
        self.begun.set()
        assert self.may_end.wait(WAIT_SECONDS)
        if self.error is not None:
            raise self.error
        if task.work == "evaluate":
            return Result(costs=Costs(), examples=1, eval_loss=1.0, eval_accuracy=0.5)
        return Result(costs=Costs(), examples=4, blob=self.update, train_loss=2.0)


@contextmanager
def running(host: Host) -> Iterator[Future[None]]:
    """Run a host on a thread for as long as the block lasts."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(host.run)
        try:
            yield future
        finally:
            host.stop()


def a_host(*workers: Worker, **options: Any) -> tuple[Host, Cloud]:
    """Return a host of these clients, and the aggregator that they meet."""
    network = MemoryNetwork()
    return Host(network, list(workers), binding=BINDING, **options), Cloud(network)


def a_manifest(**changes: Any) -> Manifest:
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


def greet(cloud: Cloud, clients: int) -> list[str]:
    """Return who said HELLO."""
    hellos = [cloud.hear(Hello) for _ in range(clients)]
    assert all(h.online and h.binding == BINDING for h in hellos)
    return sorted(h.client for h in hellos)


def take_update(cloud: Cloud, client: str) -> bytes:
    """Take one client's update and return it."""
    offer = cloud.hear(Offer)
    assert offer.client == client
    cloud.say(
        client,
        Grant(
            run="trial",
            client=client,
            blob=offer.blob,
            missing=Missing(offer.chunks).bitmap(),
            window=8,
            expiry_seconds=30.0,
        ),
    )
    chunks = [parse_chunk("trial", cloud.hear_chunk()) for _ in range(offer.chunks)]
    blob = b"".join(c.payload for c in sorted(chunks, key=lambda c: c.index))
    assert hashlib.sha256(blob).hexdigest() == offer.blob
    cloud.say(client, Done(run="trial", client=client, blob=offer.blob, status="stored"))
    return blob


def stop_all(cloud: Cloud, *clients: str) -> None:
    """Tell clients that the run is over, and hear them leave."""
    for client in clients:
        cloud.say(client, a_task(client, work="stop", reason="rounds"))
    left = [cloud.hear(Hello) for _ in clients]
    assert sorted((h.client, h.online) for h in left) == [(c, False) for c in clients]


def test_two_clients_of_one_process_take_part_in_a_run() -> None:
    workers = Worker(ONE), Worker(TWO)
    host, cloud = a_host(*workers)
    for worker in workers:
        worker.may_end.set()
    with running(host) as run:
        assert greet(cloud, 2) == [ONE, TWO]
        for worker in workers:
            cloud.say(worker.device.id, a_task(worker.device.id))
            assert take_update(cloud, worker.device.id) == worker.update
        for client in (ONE, TWO):
            cloud.say(client, a_task(client, work="evaluate", outcome="aggregated"))
            assert cloud.hear(Report).client == client
        stop_all(cloud, ONE, TWO)
        run.result(WAIT_SECONDS)
    assert host.failures == []


def test_an_upload_goes_on_while_another_client_trains() -> None:
    one, two = Worker(ONE), Worker(TWO)
    host, cloud = a_host(one, two)
    one.may_end.set()
    with running(host):
        greet(cloud, 2)
        cloud.say(ONE, a_task(ONE))
        cloud.say(TWO, a_task(TWO))
        assert two.begun.wait(WAIT_SECONDS)
        assert take_update(cloud, ONE) == one.update
        assert not two.may_end.is_set()
        two.may_end.set()
        assert take_update(cloud, TWO) == two.update


def test_one_client_works_at_a_time() -> None:
    one, two = Worker(ONE), Worker(TWO)
    host, cloud = a_host(one, two)
    with running(host):
        greet(cloud, 2)
        cloud.say(ONE, a_task(ONE))
        assert one.begun.wait(WAIT_SECONDS)
        cloud.say(TWO, a_task(TWO))
        cloud.say(TWO, a_task(TWO))
        # an answer to this shows that what came before it was taken
        cloud.post(a_manifest())
        greet(cloud, 2)
        assert not two.begun.is_set()
        one.may_end.set()
        assert take_update(cloud, ONE) == one.update
        two.may_end.set()
        assert take_update(cloud, TWO) == two.update


def test_an_error_in_a_clients_work_ends_the_host_with_that_error() -> None:
    error = ValueError("the disk is full")
    one, two = Worker(ONE, error), Worker(TWO)
    one.may_end.set()
    host, cloud = a_host(one, two)
    with running(host) as run:
        greet(cloud, 2)
        cloud.say(ONE, a_task(ONE))
        with pytest.raises(ValueError, match="the disk is full") as raised:
            run.result(WAIT_SECONDS)
        assert raised.value is error
        left = [cloud.hear(Hello) for _ in range(2)]
        assert not any(h.online for h in left)


def test_a_host_stops_when_another_thread_says_so() -> None:
    host, cloud = a_host(Worker(ONE))
    with running(host) as run:
        greet(cloud, 1)
        host.stop()
        run.result(WAIT_SECONDS)
        assert not cloud.hear(Hello).online


def test_a_host_that_was_stopped_before_it_ran_leaves_at_once() -> None:
    host, cloud = a_host(Worker(ONE))
    host.stop()
    host.run()
    assert not cloud.hear(Hello).online


def test_stopping_waits_for_the_work_under_way() -> None:
    worker = Worker(ONE)
    host, cloud = a_host(worker)
    with running(host) as run:
        greet(cloud, 1)
        cloud.say(ONE, a_task(ONE))
        assert worker.begun.wait(WAIT_SECONDS)
        host.stop()
        assert not run.done()
        worker.may_end.set()
        run.result(WAIT_SECONDS)
        assert not cloud.hear(Hello).online  # and its result is not sent


def test_stopping_waits_for_no_store_that_does_not_answer(tmp_path: Path) -> None:
    asked, over = threading.Event(), threading.Event()

    class Silent(ClaimStore):
        def _put(self, url: str, blob: bytes) -> None:
            del url, blob
            asked.set()
            assert over.wait(WAIT_SECONDS)

    worker = Worker(ONE)
    worker.may_end.set()
    claims = Claims(store=Silent(f"file://{tmp_path}"), above_bytes=1000)
    host, cloud = a_host(worker, claims=claims)
    with running(host) as future:
        greet(cloud, 1)
        cloud.say(ONE, a_task(ONE))
        assert asked.wait(WAIT_SECONDS)
        host.stop()
        future.result(WAIT_SECONDS)
        assert not over.is_set()
        over.set()


def test_one_refused_client_is_named_and_the_other_goes_on() -> None:
    one, two = Worker(ONE), Worker(TWO)
    two.may_end.set()
    host, cloud = a_host(one, two)
    with running(host) as run:
        greet(cloud, 2)
        refusal = Reject(run="trial", client=ONE, blob=None, code="base", reason="another base")
        cloud.say(ONE, refusal)
        cloud.say(TWO, a_task(TWO))
        assert take_update(cloud, TWO) == two.update
        cloud.say(TWO, a_task(TWO, work="stop"))
        run.result(WAIT_SECONDS)
    assert host.failures == [f"{ONE}: another base"]


def test_a_manifest_of_another_base_ends_every_client() -> None:
    host, cloud = a_host(Worker(ONE), Worker(TWO))
    with running(host) as run:
        greet(cloud, 2)
        cloud.post(a_manifest(binding="cd" * 32))
        run.result(WAIT_SECONDS)
    assert [f.partition(":")[0] for f in host.failures] == [ONE, TWO]


def test_garbage_from_the_network_stops_nobody() -> None:
    worker = Worker(ONE)
    worker.may_end.set()
    host, cloud = a_host(worker)
    with running(host):
        greet(cloud, 1)
        for payload in (b"\x00", b"{", b"PWFF" + bytes(100)):
            cloud.send(ONE, payload)
        cloud.say(ONE, a_task(ONE))
        assert take_update(cloud, ONE) == worker.update


def test_time_that_passes_in_silence_brings_the_offer_again() -> None:
    worker = Worker(ONE)
    worker.may_end.set()
    seconds = itertools.count(0.0, 0.75)  # each look at the clock is later
    host, cloud = a_host(worker, clock=lambda: next(seconds))
    with running(host):
        greet(cloud, 1)
        cloud.say(ONE, a_task(ONE))
        first = cloud.hear(Offer)
        assert cloud.hear(Offer) == first


def test_a_connection_that_cannot_be_made_closes_those_that_were() -> None:
    closed: list[str] = []

    class Broken:
        """A network whose second connection fails."""

        def open(self, *, client_id: str, **_options: Any) -> Any:
            return Line(client_id)

    class Line:
        def __init__(self, client_id: str) -> None:
            self.client_id = client_id

        def start(self) -> None:
            if self.client_id.endswith(TWO):
                raise OSError("no route")

        def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
            del topic, payload, retain

        def close(self) -> None:
            closed.append(self.client_id)

    host = Host(Broken(), [Worker(ONE), Worker(TWO)], binding=BINDING)
    with pytest.raises(OSError, match="no route"):
        host.run()
    assert closed == [f"pwff-trial-{ONE}", f"pwff-trial-{TWO}"]
