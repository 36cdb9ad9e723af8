"""What a round would take of a device: memory, seconds and joules, for one way of training.

Modelled from the profile: nothing is measured or drawn. Training, uplink and downlink stand apart.
SI units: bytes, bits, seconds, joules.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from device_profiles.airtime import expected_upload
from device_profiles.channel import Link
from device_profiles.errors import InputError
from device_profiles.modules import BaseShape, adapter_tensors
from device_profiles.profile import Precision, Profile
from device_profiles.step_memory import StepMemory, evaluation_memory, in_process, training_memory
from device_profiles.step_model import Pass, StepShape
from device_profiles.step_time import Machine, step_seconds

#: Bits of a number that is uploaded, by codec; int8 and int4 have a scale of 32 bits a row besides.
CODEC_BITS = {"fp32": 32, "fp16": 16, "int8": 8, "int4": 4}

#: Named shapes; their weights need not be at hand for a plan.
GPT2_SMALL = BaseShape(layers=12, width=768, inner=3072)


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a round asks of a device.

    Attributes:
        shape: Base and modules.
        samples: Examples to train on.
        tokens: Mean length of an example, end token included.
        response: How many of these are predicted, on average.
        max_length: Longest example that training takes; longer ones are cut.
        local_steps: Optimiser steps.
        batch_size: Examples a step.
    """

    shape: StepShape
    samples: int
    tokens: int
    response: int
    max_length: int
    local_steps: int
    batch_size: int

    def __post_init__(self) -> None:
        for name in ("samples", "local_steps", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} = {getattr(self, name)}; give 1 or more")
        if not 8 <= self.max_length <= self.shape.positions:
            raise InputError(
                f"max_length = {self.max_length}; give 8 to {self.shape.positions}, the positions "
                "of the base"
            )
        if not self.tokens >= 2 or not 1 <= self.response < self.tokens:
            raise InputError(
                f"tokens = {self.tokens}, response = {self.response}; give 2 tokens or more, and "
                "a response of 1 or more that is not all of them"
            )

    def typical(self, examples: int, max_length: int) -> Pass:
        """Return a pass of examples of mean length."""
        return self._pass(examples, min(self.tokens, max_length))

    def longest(self, examples: int, max_length: int) -> Pass:
        """Return a pass of examples of the greatest length, which memory must hold."""
        return self._pass(examples, max_length)

    def _pass(self, examples: int, tokens: int) -> Pass:
        response = max(1, round(self.response / self.tokens * tokens))
        return Pass(examples=examples, tokens=tokens, response=min(response, tokens - 1))


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One way of training.

    Attributes:
        precision: Of the frozen base.
        codec: Of the upload.
        checkpoint: Whether blocks are computed twice to keep less.
        micro_batch: Examples that go through at once; gradients are summed to the whole batch's.
        max_length: Longest example, tokens.
    """

    precision: Precision
    codec: str
    checkpoint: bool
    micro_batch: int
    max_length: int


@dataclass(frozen=True, kw_only=True)
class RoundEstimate:
    """What a round takes: modelled seconds and joules, each activity apart."""

    memory: StepMemory
    compute_seconds: float
    compute_joules: float
    uplink_seconds: float
    uplink_joules: float
    downlink_seconds: float
    downlink_joules: float

    @property
    def seconds(self) -> float:
        """From the download's beginning to the upload's end."""
        return self.downlink_seconds + self.compute_seconds + self.uplink_seconds

    @property
    def joules(self) -> float:
        """Of all activities; waiting for others is not part of a plan."""
        return self.downlink_joules + self.compute_joules + self.uplink_joules


@lru_cache(maxsize=256)
def upload_bits(shape: StepShape, codec: str) -> float:
    """Return the bits of the adapters in a codec, headers left out."""
    tensors = adapter_tensors(shape.base, shape.adapter_size) if shape.adapter_size else []
    bits = CODEC_BITS[codec]
    scales = 0
    if codec in ("int8", "int4"):
        axes = ((t.shape, t.bottleneck_axis) for t in tensors)
        scales = sum(1 if axis is None else size[axis] for size, axis in axes)
    return bits * sum(t.size for t in tensors) + 32 * scales


def round_estimate(
    profile: Profile, job: Job, link: Link, lora_count: int, setting: Setting
) -> RoundEstimate:
    """Return what a round takes with so many LoRA modules.

    Raises:
        InputError: If the base has fewer sites, or something of the job does not fit it.
    """
    shape, examples, length = job.shape, setting.micro_batch, setting.max_length
    way = {"precision": setting.precision, "checkpoint": setting.checkpoint}
    step = _step_seconds(
        shape,
        lora_count,
        job.typical(examples, length),
        Machine(flops=profile.compute.flops, bandwidth=profile.memory.bandwidth),
        passes=math.ceil(job.batch_size / examples),
        **way,
    ).total
    compute = job.local_steps * step
    up = _uplink(upload_bits(shape, setting.codec), link)
    down = upload_bits(shape, "fp32") / link.awgn_rate
    radio = profile.radio
    return RoundEstimate(
        memory=_memory(shape, lora_count, job.longest(examples, length), **way),
        compute_seconds=compute,
        compute_joules=compute * profile.compute.watts,
        uplink_seconds=up.seconds,
        uplink_joules=up.transmit_joules + up.seconds * link.share.time * radio.circuit_watts,
        downlink_seconds=down,
        downlink_joules=down * radio.receive_watts,
    )


_uplink = lru_cache(maxsize=1024)(expected_upload)
_step_seconds = lru_cache(maxsize=65_536)(step_seconds)


@lru_cache(maxsize=65_536)
def _memory(
    shape: StepShape, lora_count: int, pass_: Pass, *, precision: str, checkpoint: bool
) -> StepMemory:
    """Return the larger of what training and what held-out results take."""
    training = training_memory(shape, lora_count, pass_, precision=precision, checkpoint=checkpoint)
    held_out = evaluation_memory(shape, lora_count, pass_, precision=precision)
    return max(map(in_process, (training, held_out)), key=lambda memory: memory.total)
