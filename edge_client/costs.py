"""What a device's part of a round costs: compute, uplink and downlink, each apart.

Costs are computed on the run's own shape or priced at another one with the same sites (see
``device_profiles.pricing``); the layouts of both are kept, so that an update of the one is counted
with the bits of the other.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from device_profiles.channel import Link
from device_profiles.energy import (
    NOTHING,
    TimeAndEnergy,
    compute_cost,
    downlink_cost,
    power_cost,
    training_flops_per_token,
    uplink_cost,
)
from device_profiles.methods import Method, ModuleShape, held_tensors, stage_tensors
from device_profiles.modules import BaseShape, adapter_tensors, first_lora_sites, lora_tensors
from device_profiles.pricing import CostBasis
from device_profiles.profile import Profile
from device_profiles.reward_heads import reward_tensors
from device_profiles.upload_policy import patient_upload
from messaging.chunks import wire_bytes
from messaging.codecs import max_blob_bytes
from messaging.layout import Layout
from messaging.protocol import Codec, Stage


def stage_layout(stage: Stage, method: Method, modules: ModuleShape) -> Layout:
    """Return the allow-list of a stage: the tensors that may travel, in order."""
    return Layout.of(stage_tensors(stage, method, modules))


def own_layout(layout: Layout, lora_count: int) -> Layout:
    """Return what of a run's layout a device with so many LoRA modules sends: its first tensors."""
    return layout.first(held_tensors([spec.name for spec in layout.specs], lora_count))


@dataclass(frozen=True, kw_only=True)
class Uplink:
    """One upload, modelled.

    Attributes:
        bits: On the air.
        seconds: The delay.
        air_seconds: Of these, how long the device radiated.
        transmit_joules: Radiated.
        circuit_joules: Taken by the radio's electronics.
        delivered: Whether it arrived.
        joules_saved: By waiting for good blocks, against sending at once over the same channel.
    """

    bits: float
    seconds: float
    air_seconds: float
    transmit_joules: float
    circuit_joules: float
    delivered: bool = True
    joules_saved: float = 0.0


class CostModel:
    """The costs of one device of a run.

    Args:
        method: What is trained and what travels.
        modules: The small modules on the base that learns.
        parameters: Weights of that base.
        lora_count: LoRA modules on the device.
        priced: The shape that costs are computed on, where it is another one.
        encoder_parameters: Weights of the encoder that reward models read; 0 where they read the
            base.
    """

    def __init__(
        self,
        *,
        method: Method,
        modules: ModuleShape,
        parameters: int,
        lora_count: int,
        priced: CostBasis | None,
        profile: Profile,
        link: Link,
        chunk_bytes: int,
        encoder_parameters: int = 0,
    ) -> None:
        self._encoder_parameters = encoder_parameters
        self._method, self._learned = method, modules
        self._base, self._parameters, self._priced = modules.base, parameters, modules
        if priced is not None:
            modules = replace(modules, base=priced.base, lora_rank=priced.lora_rank)
            self._base, self._parameters = priced.base, priced.parameters
            self._priced = modules
        self._trainable = trained_parameters(method, modules, lora_count)
        # its head counts for every token, though only a response goes through it
        self._of_a_reward = sum(
            t.size for name in method.objectives[:1] for t in reward_tensors(name, modules.trunk)
        )
        self._lora_count = lora_count
        self._profile = profile
        self._link = link
        self._chunk_bytes = chunk_bytes

    def compute(
        self,
        tokens: int,
        rows: int,
        read_tokens: int = 0,
        encoder_tokens: int = 0,
        *,
        stage: Stage = "instruction",
    ) -> TimeAndEnergy:
        """Return what a piece of training takes, modelled by its operations.

        Args:
            tokens: That were trained on; of reward learning, through the trunk of a reward model.
            rows: In so many examples.
            read_tokens: That went forward only: drawn, scored, or looked at by a reward model.
            encoder_tokens: That went through the encoder, counted as the base's tokens.
            stage: That trains: says what is trained.
        """
        flops = 2.0 * self._parameters * read_tokens
        flops += 2.0 * self._encoder_parameters * encoder_tokens
        if tokens:
            trained = self._of_a_reward if stage == "reward" else self._trainable
            whole = stage == "reward" and self._priced.trunk.whole
            frozen = 0 if whole else self._parameters
            flops += tokens * training_flops_per_token(frozen, trained, self._base, tokens // rows)
        return compute_cost(flops, self._profile.compute)

    def measured(self, seconds: float) -> TimeAndEnergy:
        """Return what a training took that was timed on the device itself."""
        return power_cost(seconds, self._profile.compute.watts, basis="measured")

    def _layouts(self, stage: Stage) -> tuple[Layout, Layout]:
        """Return what is sent at the shape that learns, and at the one that is priced."""
        learned = stage_layout(stage, self._method, self._learned)
        return learned, stage_layout(stage, self._method, self._priced)

    def uplink(
        self,
        stage: Stage,
        blob_bytes: int,
        codec: Codec,
        *,
        generator: np.random.Generator,
        wait_until: float,
    ) -> Uplink:
        """Return what sending an update takes, modelled.

        Args:
            stage: That it is of.
            blob_bytes: Of the update as it is sent here; priced, with the bits of the other shape.
            codec: It is in.
            generator: Of the channel.
            wait_until: Seconds that an upload may take which waits for good coherence blocks; 0
                to send at once.
        """
        learned, priced = (own_layout(x, self._lora_count) for x in self._layouts(stage))
        size = blob_bytes + max_blob_bytes(priced, codec) - max_blob_bytes(learned, codec)
        bits = 8 * wire_bytes(size, self._chunk_bytes)
        circuit_watts = self._profile.radio.circuit_watts
        if wait_until > 0:
            patient = patient_upload(bits, self._link, wait_until, generator, circuit_watts)
            sent = patient.sent
            return Uplink(
                bits=bits,
                seconds=sent.seconds,
                air_seconds=sent.air_seconds,
                transmit_joules=sent.transmit_joules,
                circuit_joules=sent.circuit_joules,
                joules_saved=patient.joules_saved,
            )
        cost = uplink_cost(bits, self._link, generator, circuit_watts)
        return Uplink(
            bits=bits,
            seconds=cost.seconds,
            air_seconds=cost.transmit.seconds,
            transmit_joules=cost.transmit.joules,
            circuit_joules=cost.circuit.joules,
            delivered=cost.delivered,
        )

    def downlink(self, stage: Stage, download_bytes: int) -> TimeAndEnergy:
        """Return what receiving takes, in proportion at a priced shape, modelled."""
        if not download_bytes:
            return NOTHING
        learned, priced = self._layouts(stage)
        ratio = priced.size / learned.size
        return downlink_cost(
            8 * download_bytes * ratio, self._link, self._profile.radio.receive_watts
        )


def trained_parameters(method: Method, modules: ModuleShape, lora_count: int) -> int:
    """Return how many parameters a device with so many LoRA modules trains."""
    base: BaseShape = modules.base
    tensors = []
    if "adapters" in method.trained:
        tensors += adapter_tensors(base, modules.adapter_size)
    if "lora" in method.trained:
        sites = first_lora_sites(base, modules.placement, lora_count)
        tensors += lora_tensors(sites, modules.lora_rank)
    return sum(t.size for t in tensors)
