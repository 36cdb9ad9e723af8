"""From an experiment to its clients: who they are, what they train, and which data each holds."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict

from cloud_aggregator.experiment import Experiment
from cloud_aggregator.methods import Method, find_method, shared_layout
from device_profiles.channel import PAPER_LINK, Link, profile_link
from device_profiles.fleet import Device, check_lora_count, draw_fleet, find_fleet
from device_profiles.modules import (
    BaseShape,
    adapter_sites,
    adapter_tensors,
    first_lora_sites,
    lora_rank,
    lora_sites,
    lora_tensors,
)
from device_profiles.profile import Profile
from edge_client.data.instructions import Dataset
from edge_client.data.partition import Part, partition
from messaging.layout import Layout
from messaging.protocol import Channel, DeviceRecord, Preference
from quantization.identity import BaseIdentity


class ClientSpec(BaseModel):
    """One emulated client as its worker needs it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    device: DeviceRecord
    profile: Profile
    train: list[int]
    held_out: list[int]


class WorkerSpec(BaseModel):
    """One worker process: its share of the clients and what they have in common."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run: str
    run_folder: str
    model: str
    binding: str
    data: str
    data_sha256: str
    placement: str
    adapter_size: int
    lora_rank: int
    threads: int
    chunk_bytes: int
    method: str
    broker: str | None
    clients: list[ClientSpec]


@dataclass(frozen=True, kw_only=True)
class FleetPlan:
    """The clients of a run and the tensors that they share."""

    clients: list[ClientSpec]
    layout: Layout
    lora_rank: int


def plan_fleet(experiment: Experiment, identity: BaseIdentity, dataset: Dataset) -> FleetPlan:
    """Return the clients that an experiment draws.

    Raises:
        InputError: If fleet, modules or partition do not fit base, data or each other.
    """
    method = find_method(experiment.method)
    shape = identity.shape
    adapter_sites(shape, experiment.adapter_count)
    rank, rule = lora_rank(shape, experiment.lora_rank)
    if experiment.lora_count is not None:
        check_lora_count(experiment.lora_count, "lora_count")
    devices = draw_fleet(find_fleet(experiment.fleet), experiment.clients, experiment.seed)
    parts = partition(
        dataset.examples,
        clients=experiment.clients,
        kind=experiment.partition,
        alpha=experiment.alpha,
        skew=experiment.skew,
        held_out_share=experiment.held_out_share,
        seed=experiment.seed,
    )
    layout = shared_layout(method, shape, experiment.adapter_size)
    common = _Common(
        experiment=experiment, method=method, identity=identity, layout=layout, rank=rank, rule=rule
    )
    clients = [
        ClientSpec(
            device=_record(common, device, part),
            profile=device.profile,
            train=list(part.train),
            held_out=list(part.held_out),
        )
        for device, part in zip(devices, parts, strict=True)
    ]
    return FleetPlan(clients=clients, layout=layout, lora_rank=rank)


def link_of(device: DeviceRecord) -> Link:
    """Return the uplink that a client's record states."""
    channel = device.channel
    return Link(
        snr_db=channel.snr_db,
        bandwidth_hz=channel.bandwidth_hz,
        transmit_watts=channel.transmit_watts,
        fading=channel.fading,
        coherence_seconds=channel.coherence_seconds,
    )


def _lora_count(experiment: Experiment, shape: BaseShape, device: Device) -> int:
    """Return how many LoRA modules a device trains: what it affords, of the sites there are."""
    if experiment.lora_count is not None:
        return len(first_lora_sites(shape, experiment.placement, experiment.lora_count))
    return min(device.lora_count, len(lora_sites(shape, experiment.placement)))


@dataclass(frozen=True, kw_only=True)
class _Common:
    """What the records of all clients of a run are made from."""

    experiment: Experiment
    method: Method
    identity: BaseIdentity
    layout: Layout
    rank: int
    rule: str


def _record(common: _Common, device: Device, part: Part) -> DeviceRecord:
    experiment, identity, rank = common.experiment, common.identity, common.rank
    shape = identity.shape
    count = _lora_count(experiment, shape, device) if "lora" in common.method.trained else 0
    trainable = 0
    if count:
        sites = first_lora_sites(shape, experiment.placement, count)
        trainable += sum(t.size for t in lora_tensors(sites, rank))
    adapters = 0
    if "adapters" in common.method.trained:
        adapters = len(adapter_sites(shape))
        trainable += sum(t.size for t in adapter_tensors(shape, experiment.adapter_size))
    link = PAPER_LINK if experiment.channel == "paper" else profile_link(device.profile.radio)
    return DeviceRecord.model_validate(
        {
            "id": device.id,
            "profile": device.profile.name,
            "lora_count": count,
            "lora_rank": rank if count else 0,
            "lora_rank_rule": common.rule if count else "none",
            "adapter_count": adapters,
            "adapter_size": experiment.adapter_size if adapters else 0,
            "placement": experiment.placement,
            "precision": "fp32",
            "threads": experiment.threads,
            "base_bytes": identity.base_bytes,
            "examples": len(part.train),
            "held_out_examples": len(part.held_out),
            "categories": part.groups,
            "trainable_parameters": trainable,
            "shared_parameters": common.layout.size,
            "preference": Preference(
                helpfulness=device.preference, harmlessness=round(1 - device.preference, 3)
            ),
            "channel": Channel(
                snr_db=link.snr_db,
                bandwidth_hz=link.bandwidth_hz,
                transmit_watts=link.transmit_watts,
                fading=link.fading,
                coherence_seconds=link.coherence_seconds,
            ),
            "costs": "modelled",
        }
    )
