"""What a device says of itself: the record that HELLO carries, for real and emulated devices."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

from device_profiles.channel import Link
from device_profiles.families import GPT2
from device_profiles.methods import Method, ModuleShape, RewardShares
from device_profiles.modules import (
    adapter_sites,
    adapter_tensors,
    first_lora_sites,
    lora_rank,
    lora_sites,
    lora_tensors,
)
from device_profiles.planning import planned_precision
from device_profiles.profile import Profile
from device_profiles.step_memory import base_bytes
from device_profiles.step_model import StepShape
from edge_client.costs import own_layout, stage_layout
from edge_client.data.partition import Part
from edge_client.privacy import withheld_record
from messaging.layout import Layout
from messaging.protocol import Channel, DeviceRecord, Power, Precision, Preference, Stage
from quantization.encoder_identity import EncoderIdentity
from quantization.identity import BaseIdentity, require_gpt2


@dataclass(frozen=True, kw_only=True)
class Modules:
    """The small modules that a run puts on its base.

    Attributes:
        adapter_size: Bottleneck size M.
        placement: Row of the placements table.
        rank: R of every LoRA module, as given; none for the proportional one.
        reward_shares: What a reward model is made of, beside the frozen trunk.
        encoder: That reward models read; none where they read the base.
    """

    method: Method
    identity: BaseIdentity
    adapter_size: int
    placement: str
    rank: int | None
    reward_shares: RewardShares = "head"
    encoder: EncoderIdentity | None = None

    def layout(self, stage: Stage = "instruction") -> Layout:
        """Return the allow-list of a stage: the tensors that may travel, in order."""
        return stage_layout(stage, self.method, self.shape())

    def shape(self) -> ModuleShape:
        """Return the modules as plain values."""
        return ModuleShape(
            base=self.identity.shape,
            adapter_size=self.adapter_size,
            placement=self.placement,
            lora_rank=self.lora_rank()[0],
            reward_shares=self.reward_shares,
            encoder_width=self.encoder.width if self.encoder else None,
        )

    def lora_count(self, afforded: int) -> int:
        """Return how many LoRA modules a device that affords so many holds under this method."""
        sites = len(lora_sites(self.identity.shape, self.placement))
        return sites if self.method.lora == "all" else min(afforded, sites)

    def lora_rank(self) -> tuple[int, str]:
        """Return the rank and whether it was given or is in proportion to the width."""
        return lora_rank(self.identity.shape, self.rank)


def base_precision(identity: BaseIdentity, asked: str, profile: Profile) -> Precision:
    """Return what a device holds its base in: as asked, or for ``auto`` as its plan says.

    Raises:
        BaseModelError: If the base is of a family that is held in fp32 alone, and another is asked.
    """
    if identity.shape.family != GPT2:
        if asked not in {"auto", "fp32"}:
            require_gpt2(identity, f"precision = '{asked}'")
        return "fp32"
    if asked == "auto":
        return planned_precision(profile)
    precision: Precision = asked  # type: ignore[assignment]  # a file's schema has checked it
    return precision


def held_bytes(identity: BaseIdentity, precision: Precision) -> int:
    """Return what a base takes in memory at a precision."""
    if identity.shape.family != GPT2:
        return identity.base_bytes
    shape = StepShape(
        base=identity.shape,
        heads=1,  # of which the size does not depend
        vocabulary=identity.vocabulary,
        positions=identity.positions,
        adapter_size=0,
        placement="qkv",
        lora_rank=0,
    )
    return base_bytes(shape, precision.removesuffix("-dynamic"))


def link_of(device: DeviceRecord) -> Link:
    """Return the uplink that a device's record states."""
    return Link(**device.channel.model_dump())


def describe_device(
    modules: Modules,
    part: Part,
    link: Link,
    *,
    client: str,
    profile: Profile,
    lora_count: int,
    threads: int,
    helpfulness: float,
    preference_pairs: int = 0,
    scoring: str = "",
    precision: Precision = "fp32",
    costs: Literal["modelled", "measured"],
    private: bool = False,
) -> DeviceRecord:
    """Return the record of a device that trains ``lora_count`` LoRA modules, if its method has any.

    A ``private`` one says nothing of how much data it has, or of what.

    Raises:
        InputError: If rank, adapter size or count do not fit the base.
    """
    shape, trained = modules.identity.shape, modules.method.trained
    rank, rule = modules.lora_rank()
    sites = first_lora_sites(shape, modules.placement, lora_count) if "lora" in trained else []
    adapters = adapter_tensors(shape, modules.adapter_size) if "adapters" in trained else []
    tensors = [*adapters, *lora_tensors(sites, rank)]
    device = DeviceRecord.model_validate(
        {
            "id": client,
            "profile": profile.name,
            "lora_count": len(sites),
            "lora_rank": rank if sites else 0,
            "lora_rank_rule": rule if sites else "none",
            "adapter_count": len(adapter_sites(shape)) if adapters else 0,
            "adapter_size": modules.adapter_size if adapters else 0,
            "placement": modules.placement,
            "precision": precision,
            "threads": threads,
            "base_bytes": held_bytes(modules.identity, precision),
            "examples": len(part.train),
            "held_out_examples": len(part.held_out),
            "preference_pairs": preference_pairs,
            "scoring": scoring,
            "categories": part.groups,
            "trainable_parameters": sum(t.size for t in tensors),
            "shared_parameters": own_layout(modules.layout(), len(sites)).size,
            "preference": Preference(
                helpfulness=helpfulness, harmlessness=round(1 - helpfulness, 6)
            ),
            "channel": Channel(**asdict(link)),
            "power": Power(
                idle_watts=profile.compute.idle_watts,
                receive_watts=profile.radio.receive_watts,
                circuit_watts=profile.radio.circuit_watts,
                battery_joules=profile.battery_joules,
            ),
            "costs": costs,
        }
    )
    return withheld_record(device) if private else device
