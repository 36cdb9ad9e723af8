"""One client's work: from a round task to an update, on a tuned model that it may share.

A client is its data, its device and its state on disk; the model is lent to it for one piece of
work at a time. Only what the layout allows is packed into an update.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from device_profiles.channel import Link
from device_profiles.errors import InputError
from device_profiles.methods import ModuleShape, find_method
from device_profiles.modules import first_lora_sites, initial_adapters, initial_lora
from device_profiles.pricing import CostBasis
from device_profiles.profile import Profile
from device_profiles.seeds import stream
from edge_client.costs import CostModel, own_layout
from edge_client.data.instructions import Example
from edge_client.data.prompts import Encoded, encode_example
from edge_client.peft.packed_model import PackedModel
from edge_client.state import ClientState, StateStore, settled
from edge_client.trainer import Training, evaluate, train
from messaging.codecs import BlobHeader, encode_blob, quantise_with_feedback
from messaging.layout import Layout, Tensors, Vector
from messaging.protocol import Costs, DeviceRecord, Task


@dataclass(frozen=True, kw_only=True)
class Result:
    """What came of a task: figures, and an update where the method shares something."""

    costs: Costs
    examples: int
    blob: bytes | None = None
    train_loss: float | None = None
    eval_loss: float | None = None
    eval_accuracy: float | None = None


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What every client of a run has in common."""

    run: str
    layout: Layout
    method: str = "pwff"
    placement: str
    adapter_size: int
    lora_rank: int
    chunk_bytes: int
    priced: CostBasis | None = None

    def own_layout(self, lora_count: int) -> Layout:
        """Return what a device with so many LoRA modules sends."""
        return own_layout(self.layout, lora_count)


class LocalClient:
    """One client.

    Args:
        device: What it says of itself.
        profile: What it is, for the model of compute time and energy.
        link: Its uplink.
        train_examples: Its own data, to learn from.
        held_out: Its own data, to measure on.
        folder: Where its state is kept.
        clock: Seconds, for the compute time of a real client.
    """

    def __init__(
        self,
        setup: Setup,
        model: PackedModel,
        *,
        device: DeviceRecord,
        profile: Profile,
        link: Link,
        train_examples: list[Example],
        held_out: list[Example],
        folder: Path,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.setup = setup
        self.device = device
        self._model = model
        self._layout = setup.own_layout(device.lora_count)
        self._profile = profile
        self._costs = CostModel(
            method=find_method(setup.method),
            modules=ModuleShape(
                base=model.base.identity.shape,
                adapter_size=setup.adapter_size,
                placement=setup.placement,
                lora_rank=setup.lora_rank,
            ),
            parameters=model.base.identity.parameters,
            lora_count=device.lora_count,
            priced=setup.priced,
            profile=profile,
            link=link,
            chunk_bytes=setup.chunk_bytes,
        )
        self._train_examples = train_examples
        self._held_out = held_out
        self._store = StateStore(folder)
        self._clock = clock
        self._encoded: dict[tuple[str, int], list[Encoded]] = {}

    def perform(self, task: Task, shared: Vector | None, download_bytes: int) -> Result:
        """Do what a task asks and return what came of it.

        Args:
            task: Train or evaluate.
            shared: The global state, packed. Shape (layout size,). None where nothing is shared.
            download_bytes: What it took to get it, counted in the costs.

        Raises:
            InputError: If the state on disk is damaged or of other modules, or training diverges.
        """
        if task.work == "evaluate":
            return self._evaluate(task, shared, download_bytes)
        return self._train(task, shared, download_bytes)

    def _state_before(self, task: Task) -> ClientState:
        state = self._store.newest(before=task.round)
        if state is not None:
            return settled(state, task.outcome)
        return self._initial(task.seed)

    def _initial(self, seed: int) -> ClientState:
        shape = self._model.base.identity.shape
        tensors: Tensors = {}
        if self.device.lora_count:
            sites = first_lora_sites(shape, self.setup.placement, self.device.lora_count)
            tensors = initial_lora(sites, self.setup.lora_rank, seed)
        if self.device.adapter_count:
            tensors |= initial_adapters(shape, self.setup.adapter_size, seed)
        return ClientState(round=0, personal=self._personal(tensors))

    def _personal(self, tensors: Tensors) -> Tensors:
        return {n: t for n, t in tensors.items() if n not in self._layout.names}

    def _install(self, state: ClientState, shared: Vector | None) -> None:
        """Put every tensor that trains on the model: what another client left there is gone."""
        self._model.activate(self.device.lora_count)
        tensors = dict(state.personal)
        if shared is not None:
            tensors |= self._layout.unpack(shared[: self._layout.size])
        wanted = {n: tuple(p.shape) for n, p in self._model.trainable().items()}
        moments = state.first_moments or tensors  # where LoRA is shared they alone tell its count
        if any({n: t.shape for n, t in kept.items()} != wanted for kept in (tensors, moments)):
            raise InputError(
                f"the state of '{self.device.id}' in {self._store.folder} is of other LoRA modules "
                f"than lora_count = {self.device.lora_count} of rank {self.setup.lora_rank}; give "
                "the device the settings it began with, or another folder to begin anew"
            )
        self._model.put(tensors)

    def _examples(self, part: str, max_length: int) -> list[Encoded]:
        key = (part, min(max_length, self._model.base.identity.positions))
        if key not in self._encoded:
            tokenizer: Any = self._model.base.tokenizer
            chosen = self._train_examples if part == "train" else self._held_out
            self._encoded[key] = [encode_example(e, tokenizer, key[1]) for e in chosen]
        return self._encoded[key]

    def _evaluate(self, task: Task, shared: Vector | None, download_bytes: int) -> Result:
        state = self._store.newest(before=task.round + 1)
        if state is None:
            state = self._initial(task.seed)
        elif state.round == task.round and state.pending is not None:
            state = settled(state, task.outcome)
            self._store.save(state)
        self._install(state, shared)
        held_out = self._examples("held_out", task.max_length)
        result = evaluate(self._model, held_out)
        down = self._costs.downlink(download_bytes)
        return Result(
            costs=Costs(
                download_bytes=download_bytes,
                downlink_seconds=down.seconds,
                downlink_joules=down.joules,
            ),
            examples=len(held_out),
            eval_loss=result.loss,
            eval_accuracy=result.accuracy,
        )

    def _train(self, task: Task, shared: Vector | None, download_bytes: int) -> Result:
        started = self._clock()
        before = self._state_before(task)
        self._install(before, shared)
        examples = self._examples("train", task.max_length)
        done = train(
            self._model,
            before,
            examples,
            steps=task.local_steps,
            batch_size=task.batch_size,
            learning_rate=task.learning_rate,
            seed=task.seed,
            words=(self.device.id, task.round),
        )
        state = replace(
            before,
            round=task.round,
            personal=self._personal(done.tensors),
            first_moments=done.first_moments,
            second_moments=done.second_moments,
            steps=done.steps,
        )
        blob = None
        if shared is not None:
            state, blob = self._pack(task, state, done, shared)
        self._store.save(state)
        return Result(
            costs=self._training_costs(task, done, self._clock() - started, download_bytes, blob),
            examples=len(examples),
            blob=blob,
            train_loss=done.loss,
        )

    def _pack(
        self, task: Task, state: ClientState, done: Training, shared: Vector
    ) -> tuple[ClientState, bytes]:
        """Return the state with its pending residual, and the update as bytes."""
        layout = self._layout
        after = layout.pack({n: t for n, t in done.tensors.items() if n in layout.names})
        difference, residual = quantise_with_feedback(
            after - shared[: layout.size], state.residual, layout, task.codec
        )
        header = BlobHeader(
            run=self.setup.run,
            round=task.round,
            sender=self.device.id,
            codec=task.codec,
            layout=layout.sha256,
            examples=len(self._train_examples),
            train_loss=done.loss,
        )
        lossless = task.codec == "fp32" and state.residual is None
        pending = None if lossless else residual
        return replace(state, pending=pending), encode_blob(difference, layout, header)

    def _training_costs(
        self, task: Task, done: Training, measured: float, download_bytes: int, blob: bytes | None
    ) -> Costs:
        """Return the costs of a training; ``measured`` seconds count on a real device."""
        compute = self._costs.compute(done.tokens, done.rows)
        if self.device.costs == "measured":
            compute = self._costs.measured(measured)
        down = self._costs.downlink(download_bytes)
        costs = Costs(
            download_bytes=download_bytes,
            downlink_seconds=down.seconds,
            downlink_joules=down.joules,
            compute_seconds=compute.seconds,
            compute_joules=compute.joules,
        )
        if blob is None:
            return costs
        up = self._costs.uplink(
            len(blob),
            task.codec,
            generator=stream(task.seed, "channel", task.round, self.device.id),
            wait_until=max(0.0, task.upload_within_seconds - compute.seconds),
        )
        return costs.model_copy(
            update={
                "uplink_bits": up.bits,
                "uplink_seconds": up.seconds,
                "uplink_air_seconds": up.air_seconds,
                "uplink_joules": up.transmit_joules,
                "uplink_circuit_joules": up.circuit_joules,
                "uplink_joules_saved": up.joules_saved,
                "lost": not up.delivered,
            }
        )
