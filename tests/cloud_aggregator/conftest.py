"""What the aggregator's tests share: a small run, updates made by hand, and two kinds of device.

A ``Teacher`` is a performer whose update is one constant, so that the global state is known by
hand; it sits in the device side's own agent and host. A ``Puppet`` is a device moved message by
message. Neither computes anything, and nobody waits without a limit.
"""

from __future__ import annotations

import contextlib
import hashlib
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest

from cloud_aggregator.methods import METHODS, ModuleShape, own_layout, stage_layout
from cloud_aggregator.records import DataRecord, ModelRecord, RunRecord
from cloud_aggregator.rounds import RoundRules
from cloud_aggregator.run_folder import RunFolder
from cloud_aggregator.server import Aggregator
from cloud_aggregator.settings import RunSettings
from cloud_aggregator.stages import StagePlan
from cloud_aggregator.store import Store
from device_profiles.modules import BaseShape
from edge_client.host import Host
from edge_client.local_client import Result, Setup
from edge_client.stage_work import GlobalStates
from messaging import topics
from messaging.chunks import Missing, chunk_count, make_chunk, parse_chunk
from messaging.codecs import BlobHeader, encode_blob
from messaging.layout import Layout, Vector
from messaging.memory import MemoryNetwork
from messaging.protocol import (
    Channel,
    Codec,
    Costs,
    DeviceRecord,
    Done,
    Grant,
    Hello,
    Message,
    Offer,
    Preference,
    Reject,
    Report,
    Task,
    decode,
    encode,
)

RUN = "trial"
BASE = BaseShape(layers=2, width=8, inner=32)
SIZE = 4
MODULES = ModuleShape(base=BASE, adapter_size=SIZE, placement="qkv", lora_rank=2)
#: Six adapters of 2*8*4 + 8 + 4 = 76 parameters: 456.
LAYOUT = stage_layout("instruction", METHODS["pwff"], MODULES)
NOTHING = Layout(())
BINDING = "b" * 64
SESSION = "0123456789abcdef"
CHUNK = 1024  # pieces of 960 bytes: an update has more than one
LIMIT = 20.0  # seconds after which a test gives up

M = TypeVar("M", bound=Message)


def device(
    client: str,
    *,
    examples: int = 1,
    held_out: int = 1,
    shared: int = 456,
    lora_count: int = 12,
) -> DeviceRecord:
    """Return what a client says of itself."""
    return DeviceRecord(
        id=client,
        profile="laptop-x86-cpu",
        lora_count=lora_count,
        lora_rank=2,
        lora_rank_rule="given",
        adapter_count=6,
        adapter_size=SIZE,
        placement="qkv",
        precision="fp32",
        threads=1,
        base_bytes=400,
        examples=examples,
        held_out_examples=held_out,
        categories={},
        trainable_parameters=100,
        shared_parameters=shared,
        preference=Preference(helpfulness=0.5, harmlessness=0.5),
        channel=Channel(
            snr_db=5.0,
            bandwidth_hz=1e6,
            transmit_watts=1.0,
            fading="rayleigh",
            coherence_seconds=0.01,
        ),
        costs="modelled",
    )


def header(client: str, **changes: Any) -> BlobHeader:
    """Return the header of a client's update of round 1, one example heavy."""
    fields: dict[str, Any] = {
        "run": RUN,
        "round": 1,
        "sender": client,
        "codec": "fp32",
        "layout": LAYOUT.sha256,
        "examples": 1,
    }
    return BlobHeader(**{**fields, **changes})


def constant(value: float, layout: Layout = LAYOUT) -> Vector:
    """Return a packed vector of one value. Shape (layout size,)."""
    return np.full(layout.size, value, np.float32)


def blob_of(client: str, value: float, **changes: Any) -> bytes:
    """Return a client's update of one value as bytes."""
    return encode_blob(constant(value), LAYOUT, header(client, **changes))


def offer_of(client: str, blob: bytes, **changes: Any) -> Offer:
    """Return the offer of a blob for round 1."""
    chunk_bytes = changes.get("chunk_bytes", CHUNK)
    fields: dict[str, Any] = {
        "run": RUN,
        "client": client,
        "session": SESSION,
        "round": 1,
        "blob": hashlib.sha256(blob).hexdigest(),
        "bytes": len(blob),
        "chunk_bytes": chunk_bytes,
        "chunks": chunk_count(len(blob), chunk_bytes),
        "binding": BINDING,
        "layout": LAYOUT.sha256,
        "codec": "fp32",
        "costs": Costs(),
    }
    return Offer(**{**fields, **changes})


def pieces(offer: Offer, blob: bytes) -> list[bytes]:
    """Return every chunk of an offered blob, as it travels."""
    return [make_chunk(RUN, offer.blob, blob, i, offer.chunk_bytes) for i in range(offer.chunks)]


class Teacher:
    """A client whose update is a constant and whose results are read off the global state.

    Held-out accuracy is a hundredth of the state's last entry, which is zero at first; loss is
    ``worst`` minus that entry.

    Args:
        client: Its name.
        value: Every entry of its updates, or what it is in a round.
        seconds: What its training takes, modelled.
        examples: Its weight in the mean of updates.
        held_out: Its weight in the mean of results.
        worst: Its loss at first.
        layout: What the run shares.
        method: Of the run; by default one that shares that, without LoRA.
        lora_count: LoRA modules that it holds; where they are shared it sends those.
        before_work: Called with each task before it is done.
    """

    def __init__(
        self,
        client: str,
        value: float | Callable[[int], float] = 0.0,
        *,
        seconds: float = 1.0,
        examples: int = 1,
        held_out: int = 1,
        worst: float = 10.0,
        layout: Layout = LAYOUT,
        method: str = "",
        lora_count: int = 12,
        before_work: Callable[[Task], None] = lambda _task: None,
    ) -> None:
        self._own = own_layout(layout, lora_count)
        self.device = device(
            client,
            examples=examples,
            held_out=held_out,
            shared=self._own.size,
            lora_count=lora_count,
        )
        self.setup = Setup(
            run=RUN,
            method=method or ("pwff" if layout.specs else "local-only"),
            layouts={"instruction": layout},
            placement="qkv",
            adapter_size=SIZE,
            lora_rank=2,
            chunk_bytes=CHUNK,
        )
        self.outcomes: list[str] = []
        self._value = value
        self._seconds = seconds
        self._worst = worst
        self._before_work = before_work

    def perform(self, task: Task, states: GlobalStates, download_bytes: int) -> Result:
        """Do a task at once."""
        self._before_work(task)
        shared = states.shared
        costs = Costs(download_bytes=download_bytes, downlink_seconds=download_bytes / 1000)
        if task.work == "evaluate":
            self.outcomes.append(task.outcome)
            last = 0.0 if shared is None else float(shared[-1])
            return Result(
                costs=costs,
                examples=self.device.held_out_examples,
                eval_loss=self._worst - last,
                eval_accuracy=0.01 * last,
            )
        value = self._value(task.round) if callable(self._value) else self._value
        blob = None
        if shared is not None:
            blob = encode_blob(
                constant(value, self._own),
                self._own,
                header(
                    self.device.id,
                    round=task.round,
                    codec=task.codec,
                    layout=self._own.sha256,
                    examples=self.device.examples,
                    train_loss=2.0,
                ),
            )
        return Result(
            costs=costs.model_copy(
                update={
                    "compute_seconds": self._seconds,
                    "compute_joules": 3 * self._seconds,
                    "uplink_seconds": 0.5 if blob else 0.0,
                    "uplink_joules": 0.25 if blob else 0.0,
                }
            ),
            examples=self.device.examples,
            blob=blob,
            train_loss=2.0,
        )


class Puppet:
    """A device moved by hand over a network."""

    def __init__(self, network: MemoryNetwork, client: str, session: str = SESSION) -> None:
        self.client = client
        self.session = session
        self._heard: queue.Queue[bytes] = queue.Queue()
        self._transport = network.open(
            client_id=client,
            filters=[topics.down(RUN, client)],
            deliver=lambda _topic, payload: self._heard.put(payload),
            connected=lambda: None,
        )
        self._transport.start()

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """Publish anything anywhere."""
        self._transport.publish(topic, payload, retain=retain)

    def say(self, message: Message) -> None:
        """Send a control message on the device's own topic."""
        self.publish(topics.control(RUN, self.client), encode(message))

    def hello(self, *, online: bool = True, **changes: Any) -> None:
        """Say that the device is there, or that it left."""
        fields: dict[str, Any] = {
            "run": RUN,
            "client": self.client,
            "session": self.session,
            "online": online,
            "binding": BINDING,
            "layout": LAYOUT.sha256,
            "device": device(self.client) if online else None,
        }
        hello = Hello(**{**fields, **changes})
        self.publish(topics.state(RUN, self.client), encode(hello), retain=True)

    def expect(self, kind: type[M]) -> M:
        """Return the next message of this kind; what came before it is passed over."""
        while True:
            payload = self._heard.get(timeout=LIMIT)
            message = decode(payload) if payload.startswith(b"{") else None
            if isinstance(message, kind):
                return message

    def expect_chunk(self) -> int:
        """Return the index of the next chunk of a global state."""
        while True:
            payload = self._heard.get(timeout=LIMIT)
            if not payload.startswith(b"{"):
                return parse_chunk(RUN, payload).index

    def expect_task(self, work: str, round_: int) -> Task:
        """Return the task to do this work in this round."""
        while True:
            task = self.expect(Task)
            if (task.work, task.round) == (work, round_):
                return task

    def report(self, task: Task, *, loss: float = 1.0, **changes: Any) -> None:
        """Answer a task with figures."""
        fields: dict[str, Any] = {
            "run": RUN,
            "client": self.client,
            "session": self.session,
            "stage": task.stage,
            "round": task.round,
            "phase": task.work,
            "examples": 1,
            "eval_loss": loss,
            "eval_accuracy": 0.5,
            "costs": Costs(),
        }
        self.say(Report(**{**fields, **changes}))

    def offer(self, value: float, **changes: Any) -> tuple[Offer, bytes]:
        """Offer an update of one value; return the offer and the blob."""
        round_ = changes.get("round", 1)
        blob = blob_of(self.client, value, round=round_)
        offer = offer_of(self.client, blob, **{"session": self.session, **changes})
        self.say(offer)
        return offer, blob

    def send(self, offer: Offer, blob: bytes, indices: Sequence[int] | None = None) -> None:
        """Send chunks of an offered blob, all by default."""
        packets = pieces(offer, blob)
        for index in range(len(packets)) if indices is None else indices:
            self.publish(topics.data(RUN, self.client, offer.blob), packets[index])

    def answer(self, blob: str) -> Done | Reject:
        """Return the answer to an update."""
        while True:
            payload = self._heard.get(timeout=LIMIT)
            message = decode(payload) if payload.startswith(b"{") else None
            if isinstance(message, Done | Reject) and message.blob == blob:
                return message

    def upload(self, value: float, round_: int) -> Done | Reject:
        """Offer an update, send what is granted, and return the answer."""
        offer, blob = self.offer(value, round=round_)
        grant = self.expect(Grant)
        missing = Missing.from_bitmap(grant.missing, offer.chunks)
        self.send(offer, blob, sorted(missing.indices))
        return self.answer(offer.blob)


class Events:
    """Everything that an aggregator told, in order, to wait for and to look at."""

    def __init__(self) -> None:
        self.told: list[tuple[str, dict[str, Any]]] = []
        self._changed = threading.Condition()
        self.on: Callable[[str, dict[str, Any]], None] = lambda _event, _fields: None

    def __call__(self, event: str, **fields: Any) -> None:
        """Take one event."""
        with self._changed:
            self.told.append((event, fields))
            self._changed.notify_all()
        self.on(event, fields)

    def _count(self, event: str, wanted: dict[str, Any]) -> int:
        return sum(name == event and wanted.items() <= f.items() for name, f in self.told)

    def wait_for(self, event: str, *, times: int = 1, **fields: Any) -> None:
        """Return once an event with these fields was told so many times."""
        with self._changed:
            came = self._changed.wait_for(lambda: self._count(event, fields) >= times, LIMIT)
        assert came, f"no {event} {fields} among {self.told}"

    def all(self, event: str) -> list[dict[str, Any]]:
        """Return the fields of every event of this name."""
        with self._changed:
            return [fields for name, fields in self.told if name == event]


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        """Return the time."""
        return self.now


PLAN = ("layout", "rounds", "local_steps", "epsilon", "patience")


def plan_of(**changes: Any) -> StagePlan:
    """Return two rounds of instruction tuning."""
    fields: dict[str, Any] = {
        "stage": "instruction",
        "layout": LAYOUT,
        "rounds": 2,
        "local_steps": 1,
        "batch_size": 1,
        "learning_rate": 0.1,
        "epsilon": 0.0,
        "patience": 0,
    }
    return StagePlan(**{**fields, **changes})


def settings_of(**changes: Any) -> RunSettings:
    """Return a run of two rounds of three clients in virtual time.

    What changes is of the run, or of its one stage.
    """
    part = {name: changes.pop(name) for name in PLAN if name in changes}
    fields: dict[str, Any] = {
        "run": RUN,
        "method": "pwff",
        "seed": 7,
        "modules": MODULES,
        "stages": (plan_of(**part),),
        "binding": BINDING,
        "clients": 3,
        "minimum_clients": 3,
        "gather_seconds": LIMIT,
        "codec": "fp32",
        "max_length": 8,
        "chunk_bytes": CHUNK,
        "rules": RoundRules(quorum=1.0, deadline_seconds=1000.0),
        "virtual_time": True,
        "patience_seconds": LIMIT,
    }
    return RunSettings(**{**fields, **changes})


def record_of(**changes: Any) -> RunRecord:
    """Return the record of a run that has not begun."""
    codec: Codec = "fp32"
    fields: dict[str, Any] = {
        "version": "0.1.0",
        "run": RUN,
        "seed": 7,
        "method": "pwff",
        "stages": ["instruction"],
        "engine": "local",
        "workers": 1,
        "transport": "memory",
        "codec": codec,
        "model": ModelRecord(
            name="tiny",
            parameters=100,
            layers=2,
            width=8,
            sha256="a" * 64,
            tokenizer_sha256="c" * 64,
        ),
        "data": DataRecord(source="kit", sha256="d" * 64, examples=3),
    }
    return RunRecord(**{**fields, **changes})


@dataclass
class Stage:
    """A network with devices on it, and aggregators that run on the test's or another thread."""

    path: Path
    network: MemoryNetwork = field(default_factory=MemoryNetwork)
    _hosts: list[tuple[Host, threading.Thread]] = field(default_factory=list)
    _servers: list[tuple[Aggregator, threading.Thread]] = field(default_factory=list)
    _errors: list[BaseException] = field(default_factory=list)
    _stores: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def host(self, *teachers: Teacher, binding: str = BINDING, **changes: Any) -> Host:
        """Start a host of these clients on a thread."""
        host = Host(self.network, teachers, binding=binding, **changes)
        thread = threading.Thread(target=self._guarded, args=(host.run,), daemon=True)
        self._hosts.append((host, thread))
        thread.start()
        return host

    def aggregator(
        self,
        settings: RunSettings | None = None,
        record: RunRecord | None = None,
        events: Events | None = None,
        **changes: Any,
    ) -> Aggregator:
        """Return an aggregator on this stage's network and folder; the one before it is over."""
        if "store" not in changes:
            self._stores.close()
            changes["store"] = self._stores.enter_context(Store(self.path, RUN))
        return Aggregator(
            settings or settings_of(),
            record or record_of(),
            RunFolder(self.path),
            self.network,
            notify=events or Events(),
            memory=lambda: 1,
            **changes,
        )

    def start(self, server: Aggregator) -> threading.Thread:
        """Run an aggregator on a thread."""
        thread = threading.Thread(target=self._guarded, args=(server.run,), daemon=True)
        self._servers.append((server, thread))
        thread.start()
        return thread

    def _guarded(self, run: Callable[[], object]) -> None:
        try:
            run()
        except BaseException as err:
            self._errors.append(err)

    def leave(self) -> None:
        """Make every host leave, and see that it does."""
        for host, thread in self._hosts:
            host.stop()
            join(thread)
        self._hosts.clear()

    def close(self) -> None:
        """Stop whatever still runs; what failed on a thread fails the test."""
        for server, thread in self._servers:
            server.stop()
            join(thread)
        self.leave()
        self._stores.close()
        if self._errors:
            raise self._errors[0]


def join(thread: threading.Thread) -> None:
    """Wait for a thread that must end."""
    thread.join(LIMIT)
    assert not thread.is_alive(), "the thread did not end"


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    """Yield a stage that is cleared after the test."""
    with Stage(tmp_path / "run") as stage:
        yield stage
