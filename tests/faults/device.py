"""A device without a model: the real host, agent, outbox and states on disk; its lesson is made up.

What it learns in a step is a function of seed, client, round and step, of the global state, and of
what it kept from earlier rounds: an optimiser's moment, a tensor that never leaves it and, with a
lossy codec, the error that its uploads left. A state that was lost, restored twice or taken from
the wrong round shows in the bits of the global state.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cloud_aggregator.methods import METHODS, ModuleShape
from device_profiles.channel import PAPER_LINK
from device_profiles.modules import adapter_tensors
from device_profiles.profile import find_profile
from device_profiles.seeds import stream
from edge_client.costs import stage_layout
from edge_client.host import Host
from edge_client.ledger import Ledger
from edge_client.local_client import LocalClient, Setup
from edge_client.outbox import Outbox
from edge_client.progress import Interruption, Progress, Standing
from edge_client.stage_work import GlobalStates, Measured, Trained
from edge_client.state import ClientState
from messaging.key_files import device_keys
from messaging.mqtt import MqttNetwork
from messaging.protocol import Channel, DeviceRecord, Preference, Task
from messaging.security import DeviceSeal
from messaging.transport import Connected, Deliver, Transport, Will
from quantization.identity import BaseIdentity, binding, identify
from tests.faults.base import ADAPTER_SIZE, CHUNK_BYTES, LAYERS, LORA_RANK, PLACEMENT, RUN
from tests.faults.processes import Line, on_terminate, set_calendar

_OWN = "lesson.own"
_MOMENT = "lesson.moment"
_EXAMPLES = 3


def modules(identity: BaseIdentity) -> ModuleShape:
    """Return the small modules of the run."""
    return ModuleShape(
        base=identity.shape, adapter_size=ADAPTER_SIZE, placement=PLACEMENT, lora_rank=LORA_RANK
    )


def describe(client: str, identity: BaseIdentity) -> DeviceRecord:
    """Return what a device says of itself; no two weigh the same."""
    shared = sum(int(np.prod(t.shape)) for t in adapter_tensors(identity.shape, ADAPTER_SIZE))
    return DeviceRecord(
        id=client,
        profile="laptop-x86-cpu",
        lora_count=LAYERS,
        lora_rank=LORA_RANK,
        lora_rank_rule="given",
        adapter_count=3 * identity.shape.layers,
        adapter_size=ADAPTER_SIZE,
        placement=PLACEMENT,
        precision="fp32",
        threads=1,
        base_bytes=identity.base_bytes,
        examples=_EXAMPLES + client.encode()[-1] % 10,
        held_out_examples=1,
        categories={},
        trainable_parameters=shared,
        shared_parameters=shared,
        preference=Preference(helpfulness=0.5, harmlessness=0.5),
        channel=Channel(
            snr_db=5.0,
            bandwidth_hz=1e6,
            transmit_watts=1.0,
            fading="rayleigh",
            coherence_seconds=0.01,
        ),
        costs="measured",
    )


class Lesson:
    """Instruction tuning that is arithmetic.

    Args:
        device: Whose it is.
        progress: Where it is written down how far it is.
        tell: Told of each step (``step``), and of each measurement (``measured``).
        poison: What every entry of an update is replaced by, for a device that means ill.
        remembers: Whether what it learns depends on what it kept of earlier rounds.
    """

    def __init__(
        self,
        device: DeviceRecord,
        progress: Progress,
        tell: Callable[..., None],
        *,
        poison: float | None = None,
        remembers: bool = True,
    ) -> None:
        self._device, self._progress, self._tell = device, progress, tell
        self._poison, self._remembers = poison, remembers

    def begin(self, seed: int) -> ClientState:
        """Return the state of a device that has not trained yet."""
        own = stream(seed, "own", self._device.id).standard_normal(4).astype(np.float32)
        return ClientState(round=0, personal={_OWN: own})

    def train(self, task: Task, state: ClientState, states: GlobalStates) -> Trained:
        """Take the task's steps."""
        assert states.shared is not None
        if not self._remembers:
            state = replace(self.begin(task.seed), round=state.round, stage=state.stage)
        shared = states.shared
        values = shared.copy()
        own = state.personal[_OWN].copy()
        moment = state.first_moments.get(_MOMENT, np.zeros_like(values)).copy()
        fingerprint = hashlib.sha256(
            f"{task.round}".encode() + shared.tobytes() + own.tobytes() + moment.tobytes()
        ).hexdigest()
        done: list[float] = []
        if begun := self._progress.begun(fingerprint):
            done = list(begun.losses)
            values, moment = begun.values[0].copy(), begun.values[1].copy()
            own = begun.values[2, :4].copy()
            self._tell("resumed", round=task.round, step=len(done))
        for step in range(len(done) + 1, task.local_steps + 1):
            drawn = stream(task.seed, "step", self._device.id, task.round, step)
            slope = drawn.standard_normal(values.size, dtype=np.float32)
            moment = np.float32(0.9) * moment + np.float32(0.1) * slope
            own = np.float32(0.5) * own + slope[:4]
            pull = moment + np.float32(0.1) * values + own.mean(dtype=np.float32)
            values = values - np.float32(task.learning_rate) * pull
            done.append(float(step))
            self._tell("step", round=task.round, step=step)
            standing = _standing(done, values, moment, own)
            self._progress.stepped(fingerprint, step, partial(_same, standing))
        if self._poison is not None:
            values = np.full_like(values, self._poison)
        return Trained(
            state=replace(state, personal={_OWN: own}, first_moments={_MOMENT: moment}),
            after=values,
            loss=1.0,
            weight=self._device.examples,
        )

    def evaluate(self, task: Task, state: ClientState, states: GlobalStates) -> Measured:
        """Return figures that are functions of the global state."""
        assert states.shared is not None
        del state
        size = float(np.abs(states.shared).mean(dtype=np.float64))
        self._tell("measured", round=task.round, outcome=task.outcome)
        return Measured(examples=1, eval_loss=size, eval_accuracy=1 / (1 + size))


def _same(standing: Standing) -> Standing:
    return standing


def _standing(done: list[float], *arrays: np.ndarray[Any, np.dtype[np.float32]]) -> Standing:
    """Return where a lesson stands; the short array is filled up with zeros."""
    values = np.zeros((len(arrays), arrays[0].size), np.float32)
    for row, array in zip(values, arrays, strict=True):
        row[: array.size] = array
    return Standing(losses=list(done), rows=0, tokens=0, values=values)


class WatchedNetwork:
    """A network that tells what a device publishes: its offers, and the chunks of its updates."""

    def __init__(self, network: MqttNetwork, tell: Callable[..., None]) -> None:
        self._network, self._tell = network, tell

    def open(
        self,
        *,
        client_id: str,
        filters: list[str],
        deliver: Deliver,
        connected: Connected,
        will: Will | None = None,
    ) -> Transport:
        """Return a connection of that network."""

        def told() -> None:
            self._tell("connected")
            connected()

        line = self._network.open(
            client_id=client_id, filters=filters, deliver=deliver, connected=told, will=will
        )
        return _WatchedTransport(line, self._tell)


class _WatchedTransport:
    def __init__(self, line: Transport, tell: Callable[..., None]) -> None:
        self._line, self._tell = line, tell
        self._chunks = 0

    def start(self) -> None:
        self._line.start()

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        self._line.publish(topic, payload, retain=retain)
        if "/up/" in topic and not topic.endswith("/control"):
            self._chunks += 1
            self._tell("sent", chunk=self._chunks)
        elif b'"OFFER"' in payload:  # sealed or not: a seal stands before what it seals
            self._tell("offered")

    def close(self) -> None:
        self._line.close()

    def spread(self, seconds: float) -> None:
        """Return to a broker that comes back within this window, where the network can."""
        narrow = getattr(self._line, "spread", None)
        if narrow is not None:
            narrow(seconds)


def take_part(
    line: Line,
    *,
    client: str,
    broker: str,
    base: Path,
    folder: Path,
    key: Path | None,
    clock: Callable[[], float] = time.monotonic,
    calendar_ahead: float = 0.0,
    chunk_bytes: int = CHUNK_BYTES,
    poison: float | None = None,
    remembers: bool = True,
) -> dict[str, Any]:
    """Take part in the run until it is over.

    Args:
        line: Told of what happens.
        client: The device's name.
        broker: Its address.
        base: Folder of the run's base.
        folder: Where the device keeps what it has.
        key: Its key file, where the run seals its messages.
        clock: Monotonic seconds.
        calendar_ahead: Seconds by which the device's date is wrong.
        chunk_bytes: Of its uploads.
        poison: See ``Lesson``.
        remembers: See ``Lesson``.
    """
    set_calendar(calendar_ahead)
    identity = identify(str(base))
    shape, device = modules(identity), describe(client, identity)
    interruption = Interruption()
    progress = Progress(folder, interruption, every_steps=1)
    local = LocalClient(
        Setup(
            run=RUN,
            layouts={"instruction": stage_layout("instruction", METHODS["pwff"], shape)},
            placement=PLACEMENT,
            adapter_size=ADAPTER_SIZE,
            lora_rank=LORA_RANK,
            chunk_bytes=chunk_bytes,
        ),
        {"instruction": Lesson(device, progress, line.tell, poison=poison, remembers=remembers)},
        base=identity,
        device=device,
        profile=find_profile(device.profile),
        link=PAPER_LINK,
        folder=folder,
        clock=lambda: 0.0,
    )
    ledger = Ledger(folder)
    host = Host(
        WatchedNetwork(MqttNetwork(broker), line.tell),
        [local],
        binding=binding(identity, PLACEMENT),
        clock=clock,
        seals={} if key is None else {client: _seal(key, client, ledger)},
        ledgers={client: ledger},
        outboxes={client: Outbox(folder)},
        heartbeat_seconds=30.0,
        interrupt=interruption.stop,
    )
    on_terminate(line, host.stop)
    host.run()
    return {"failures": host.failures}


def _seal(key: Path, client: str, ledger: Ledger) -> DeviceSeal:
    keys = device_keys(key, RUN, client)
    assert keys is not None
    return DeviceSeal(
        run=RUN,
        client=client,
        key=keys.key,
        verify_key=keys.verify_key,
        session=secrets.token_hex(8),
        epoch=ledger.epoch,
        highest=ledger.highest,
    )
