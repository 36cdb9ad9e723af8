"""What a device says of itself: the record that HELLO carries, for real and emulated devices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from device_profiles.channel import Link
from device_profiles.methods import Method, shared_tensors
from device_profiles.modules import (
    adapter_sites,
    adapter_tensors,
    first_lora_sites,
    lora_rank,
    lora_tensors,
)
from edge_client.data.partition import Part
from messaging.layout import Layout
from messaging.protocol import Channel, DeviceRecord, Preference
from quantization.identity import BaseIdentity


@dataclass(frozen=True, kw_only=True)
class Modules:
    """The small modules that a run puts on its base.

    Attributes:
        adapter_size: Bottleneck size M.
        placement: Row of the placements table.
        rank: R of every LoRA module, as given; none for the proportional one.
    """

    method: Method
    identity: BaseIdentity
    adapter_size: int
    placement: str
    rank: int | None

    def layout(self) -> Layout:
        """Return the allow-list: the tensors that may travel, in order."""
        shared = shared_tensors(self.method, self.identity.shape, self.adapter_size)
        return Layout.of((t.name, t.shape, t.bottleneck_axis) for t in shared)

    def lora_rank(self) -> tuple[int, str]:
        """Return the rank and whether it was given or is in proportion to the width."""
        return lora_rank(self.identity.shape, self.rank)


def describe_device(
    modules: Modules,
    part: Part,
    link: Link,
    *,
    client: str,
    profile: str,
    lora_count: int,
    threads: int,
    helpfulness: float,
    costs: Literal["modelled", "measured"],
) -> DeviceRecord:
    """Return the record of a device that trains ``lora_count`` LoRA modules, if its method has any.

    Raises:
        InputError: If rank, adapter size or count do not fit the base.
    """
    shape, trained = modules.identity.shape, modules.method.trained
    rank, rule = modules.lora_rank()
    sites = first_lora_sites(shape, modules.placement, lora_count) if "lora" in trained else []
    adapters = adapter_tensors(shape, modules.adapter_size) if "adapters" in trained else []
    tensors = [*adapters, *lora_tensors(sites, rank)]
    return DeviceRecord.model_validate(
        {
            "id": client,
            "profile": profile,
            "lora_count": len(sites),
            "lora_rank": rank if sites else 0,
            "lora_rank_rule": rule if sites else "none",
            "adapter_count": len(adapter_sites(shape)) if adapters else 0,
            "adapter_size": modules.adapter_size if adapters else 0,
            "placement": modules.placement,
            "precision": "fp32",
            "threads": threads,
            "base_bytes": modules.identity.base_bytes,
            "examples": len(part.train),
            "held_out_examples": len(part.held_out),
            "categories": part.groups,
            "trainable_parameters": sum(t.size for t in tensors),
            "shared_parameters": modules.layout().size,
            "preference": Preference(
                helpfulness=helpfulness, harmlessness=round(1 - helpfulness, 6)
            ),
            "channel": Channel(
                snr_db=link.snr_db,
                bandwidth_hz=link.bandwidth_hz,
                transmit_watts=link.transmit_watts,
                fading=link.fading,
                coherence_seconds=link.coherence_seconds,
            ),
            "costs": costs,
        }
    )
