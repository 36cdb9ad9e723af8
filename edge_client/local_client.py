"""One client's work: from a round task to an update, on a tuned model that it may share.

A client is its data, its device and its state on disk; the model is lent to it for one piece of
work at a time. Only what the layout allows is packed into an update.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol

from pydantic import ValidationError

from device_profiles.channel import Link
from device_profiles.errors import InputError
from device_profiles.methods import ModuleShape, RewardShares, find_method
from device_profiles.pricing import CostBasis
from device_profiles.profile import Profile
from device_profiles.seeds import stream
from edge_client.costs import CostModel, own_layout
from edge_client.data.instructions import what_is_wrong
from edge_client.privacy import withheld, withheld_training, withholds
from edge_client.stage_work import NO_STATES, GlobalStates, Measured, StageWork, Trained
from edge_client.state import ClientState, StateStore, entering, outcome_for, settled
from edge_client.stopwatch import Stopwatch, timed
from messaging.codecs import BlobHeader, encode_blob, quantise_with_feedback
from messaging.layout import Layout, Vector, joint_sha256
from messaging.protocol import (
    Costs,
    DeviceRecord,
    Objective,
    PairFigures,
    Part,
    ResponseFigures,
    Stage,
    Task,
)
from quantization.encoder_identity import EncoderIdentity
from quantization.identity import BaseIdentity


@dataclass(frozen=True, kw_only=True)
class Result:
    """What came of a task: figures, and an update where the method shares something.

    ``url`` is where the update lies, if it is large and was put into a store. ``spent`` is where
    this machine's seconds went: no part of what the work came to, so it is not compared.
    """

    costs: Costs
    examples: int
    blob: bytes | None = None
    train_loss: float | None = None
    eval_loss: float | None = None
    eval_accuracy: float | None = None
    pairs: dict[Objective, PairFigures] = field(default_factory=dict)
    responses: ResponseFigures | None = None
    url: str | None = None
    others_loss: float | None = None
    others_accuracy: float | None = None
    kept_steps: int | None = None
    spent: dict[Part, float] = field(default_factory=dict, compare=False)


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What every client of a run has in common.

    Attributes:
        layouts: What travels, by stage, in the order of the stages.
        reward_shares: What a reward model is made of, beside the frozen trunk.
        encoder: That the reward models read; none where they read the base.
    """

    run: str
    layouts: Mapping[Stage, Layout]
    method: str = "pwff"
    placement: str
    adapter_size: int
    lora_rank: int
    chunk_bytes: int
    priced: CostBasis | None = None
    reward_shares: RewardShares = "head"
    encoder: EncoderIdentity | None = None

    def own_layout(self, stage: Stage, lora_count: int) -> Layout:
        """Return what a device with so many LoRA modules sends."""
        return own_layout(self.layouts[stage], lora_count)

    @cached_property
    def layouts_sha256(self) -> str:
        """Hash of what the run shares in its stages."""
        return joint_sha256(self.layouts.values())


class Performer(Protocol):
    """Whoever does a device's work."""

    setup: Setup
    device: DeviceRecord

    def perform(self, task: Task, states: GlobalStates, download_bytes: int) -> Result:
        """Train, evaluate or restore."""


class LocalClient:
    """One client.

    Args:
        works: What it does in each stage.
        base: That its models are built on.
        device: What it says of itself.
        profile: What it is, for the model of compute time and energy.
        link: Its uplink.
        folder: Where its state is kept.
        clock: Seconds, for the compute time of a real client.
        private: Whether nothing leaves the device but updates and costs: no loss, count or figure.
    """

    def __init__(
        self,
        setup: Setup,
        works: Mapping[Stage, StageWork],
        *,
        base: BaseIdentity,
        device: DeviceRecord,
        profile: Profile,
        link: Link,
        folder: Path,
        clock: Callable[[], float] = time.perf_counter,
        private: bool = False,
    ) -> None:
        self.setup = setup
        self.device = device
        self._works = works
        self._costs = CostModel(
            method=find_method(setup.method),
            modules=ModuleShape(
                base=base.shape,
                adapter_size=setup.adapter_size,
                placement=setup.placement,
                lora_rank=setup.lora_rank,
                reward_shares=setup.reward_shares,
                encoder_width=setup.encoder.width if setup.encoder else None,
            ),
            parameters=base.parameters,
            lora_count=device.lora_count,
            priced=setup.priced,
            profile=profile,
            link=link,
            chunk_bytes=setup.chunk_bytes,
            encoder_parameters=setup.encoder.parameters if setup.encoder else 0,
        )
        self._store = StateStore(folder)
        self._clock = clock
        self._private = private

    def perform(
        self, task: Task, states: GlobalStates = NO_STATES, download_bytes: int = 0
    ) -> Result:
        """Do what a task asks and return what came of it.

        Args:
            task: Train, evaluate or restore.
            states: The global states that it names.
            download_bytes: What it took to get them, counted in the costs.

        Raises:
            InputError: If the stage is not this client's, the state on disk is damaged or of other
                modules, or training diverges, here or on the others.
            DiskError: If the disk does not take the new state; the old one is as it was.
            StoppedError: If the device is to leave in the middle of it.
        """
        watch = Stopwatch()
        try:
            with watch.running():
                result = self._do(task, states, download_bytes)
            return replace(result, spent={} if task.private or self._private else watch.seconds)
        except ValidationError as err:
            raise InputError(
                f"'{self.device.id}': a figure of round {task.round} ({task.stage}) is beyond what "
                f"a report holds ({what_is_wrong(err)}): training diverged; give the run a lower "
                "learning rate"
            ) from err

    def _do(self, task: Task, states: GlobalStates, download_bytes: int) -> Result:
        if task.stage not in self._works:
            raise InputError(
                f"'{self.device.id}' is asked for the stage '{task.stage}', and takes part in "
                f"{', '.join(self._works)}; give it the stages of the run, and the data they need"
            )
        withholds(task, private=self._private, client=self.device.id)
        for round_ in states.taken_back:
            self._store.take_back(round_)
        if task.work == "train":
            return self._train(task, states, download_bytes)
        if task.work == "restore":
            self._store.take_back(task.round)
        return self._evaluate(task, states, download_bytes)

    def _state(self, task: Task, *, before: int) -> ClientState:
        """Return the newest state of an earlier round, as this task's stage begins with it."""
        with timed("disk"):
            state = self._store.newest(before=before)
        if state is None:
            state = self._works[task.stage].begin(task.seed)
        return entering(state, task.stage)

    def _evaluate(self, task: Task, states: GlobalStates, download_bytes: int) -> Result:
        state = self._state(task, before=task.round + 1)
        outcome = outcome_for(state, task)
        if state.pending is not None and outcome is not None:
            state = settled(state, outcome)
            with timed("disk"):
                self._store.save(state)
        with timed("evaluation"):
            measured = self._works[task.stage].evaluate(task, state, states)
        return self._told(_result(measured, self._downlink(task, download_bytes)))

    def _told(self, result: Result) -> Result:
        """Return what of a result leaves the device."""
        return withheld(result) if self._private else result

    def _downlink(self, task: Task, download_bytes: int) -> Costs:
        down = self._costs.downlink(task.stage, download_bytes)
        return Costs(
            download_bytes=download_bytes,
            downlink_seconds=down.seconds,
            downlink_joules=down.joules,
        )

    def _train(self, task: Task, states: GlobalStates, download_bytes: int) -> Result:
        started = self._clock()
        before = self._state(task, before=task.round)
        # Of an update that nobody speaks of any more, nothing is known to have arrived.
        before = settled(before, outcome_for(before, task) or "none")
        with timed("training"):
            done = self._works[task.stage].train(task, before, states)
        if self._private:
            done = withheld_training(
                done,
                task,
                rewards=len(find_method(self.setup.method).objectives),
                adapted=self.setup.reward_shares != "head",
                encoded=self.setup.encoder is not None,
            )
        state, blob = replace(done.state, round=task.round), None
        if states.shared is not None and done.after is not None:
            layout = self.setup.own_layout(task.stage, self.device.lora_count)
            change = done.after - states.shared[: layout.size]
            with timed("codec"):
                state, blob = self._pack(task, state, done, change)
        with timed("disk"):
            self._store.save(state)
        return Result(
            costs=self._training_costs(task, done, self._clock() - started, download_bytes, blob),
            examples=done.weight,
            blob=blob,
            train_loss=done.loss,
        )

    def _pack(
        self, task: Task, state: ClientState, done: Trained, change: Vector
    ) -> tuple[ClientState, bytes]:
        """Return the state with its pending residual, and the update as bytes."""
        layout = self.setup.own_layout(task.stage, self.device.lora_count)
        difference, residual = quantise_with_feedback(change, state.residual, layout, task.codec)
        header = BlobHeader(
            run=self.setup.run,
            round=task.round,
            sender=self.device.id,
            codec=task.codec,
            layout=layout.sha256,
            examples=done.weight,
            train_loss=done.loss,
        )
        lossless = task.codec == "fp32" and state.residual is None
        pending = None if lossless else residual
        return replace(state, pending=pending), encode_blob(difference, layout, header)

    def _training_costs(
        self, task: Task, done: Trained, measured: float, download_bytes: int, blob: bytes | None
    ) -> Costs:
        """Return the costs of a training; ``measured`` seconds count on a real device."""
        compute = self._costs.compute(
            done.tokens, done.rows, done.read_tokens, done.encoder_tokens, stage=task.stage
        )
        if self.device.costs == "measured":
            compute = self._costs.measured(measured)
        costs = self._downlink(task, download_bytes).model_copy(
            update={"compute_seconds": compute.seconds, "compute_joules": compute.joules}
        )
        if blob is None:
            return costs
        up = self._costs.uplink(
            task.stage,
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


def _result(measured: Measured, costs: Costs) -> Result:
    return Result(
        costs=costs,
        examples=measured.examples,
        eval_loss=measured.eval_loss,
        eval_accuracy=measured.eval_accuracy,
        pairs=measured.pairs,
        responses=measured.responses,
        others_loss=measured.others_loss,
        others_accuracy=measured.others_accuracy,
        kept_steps=measured.kept_steps,
    )
