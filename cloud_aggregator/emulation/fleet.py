"""From an experiment to its clients: who they are, what they train, and which data each holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict

from cloud_aggregator.experiment import Experiment
from cloud_aggregator.restraint import RestraintSettings
from cloud_aggregator.stages import StagePlan
from device_profiles.fleet import Device, check_lora_count, draw_fleet, find_fleet
from device_profiles.methods import ModuleShape, Objective, RewardShares, find_method
from device_profiles.modules import adapter_sites, lora_rank
from device_profiles.pricing import PRICED_SHAPES, CostBasis, cost_basis
from device_profiles.profile import Profile
from device_profiles.reward_heads import BASE_TRUNK
from device_profiles.seeds import stream
from edge_client.data.instructions import Dataset
from edge_client.data.own_data import Places, Preferences
from edge_client.data.partition import Part, partition
from edge_client.device_record import Modules, base_precision, describe_device
from edge_client.reward.reference import scoring
from messaging.layout import Layout
from messaging.protocol import DeviceRecord, Stage
from quantization.encoder_identity import EncoderIdentity
from quantization.identity import BaseIdentity

#: The broker's address reaches a worker through its environment: it may hold a password.
BROKER_VARIABLE = "PWFF_WORKER_BROKER"


class ClientSpec(BaseModel):
    """One emulated client as its worker needs it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    device: DeviceRecord
    profile: Profile
    train: list[int]
    held_out: list[int]
    others: list[int] = []
    own: Places


class WorkerSpec(BaseModel):
    """One worker process: its share of the clients and what they have in common."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run: str
    run_folder: str
    features: str
    model: str
    binding: str
    stages: list[Stage]
    seed: int
    data: str
    data_sha256: str
    preferences: dict[Objective, str]
    prompts: str | None
    hashes: dict[str, str]
    trunk_precision: str
    reward_trunk: str = BASE_TRUNK
    encoder_sha256: str | None = None
    reward_shares: RewardShares = "head"
    placement: str
    adapter_size: int
    lora_rank: int
    threads: int
    chunk_bytes: int
    method: str
    priced: CostBasis | None
    private: bool = False
    clients: list[ClientSpec]


@dataclass(frozen=True, kw_only=True)
class FleetPlan:
    """The clients of a run and the tensors that they share."""

    clients: list[ClientSpec]
    layouts: dict[Stage, Layout]
    modules: ModuleShape
    priced: CostBasis | None


def preference_sources(experiment: Experiment) -> dict[Objective, str]:
    """Return where the pairs of each objective come from that the run learns."""
    if "reward" not in experiment.stage_names:
        return {}
    sources = {"helpfulness": experiment.helpfulness, "harmlessness": experiment.harmlessness}
    return {name: sources[name] for name in find_method(experiment.method).objectives}


def stage_plans(experiment: Experiment, layouts: Mapping[Stage, Layout]) -> tuple[StagePlan, ...]:
    """Return what each stage of an experiment is."""
    sizes = {"reward": experiment.reward_batch_size}
    rates = {
        "instruction": experiment.learning_rate,
        "reward": experiment.reward_learning_rate,
        "alignment": experiment.alignment_learning_rate,
    }
    return tuple(
        StagePlan(
            stage=stage,
            layout=layout,
            rounds=experiment.rounds_of(stage),
            local_steps=experiment.steps_of(stage),
            batch_size=sizes.get(stage, experiment.batch_size),
            learning_rate=rates[stage],
            epsilon=experiment.epsilon,
            patience=experiment.patience,
            margin=experiment.margin if stage == "reward" else 0.0,
            alignment=experiment.alignment if stage == "alignment" else None,
            reward_drop=experiment.reward_drop,
            restraint=experiment.restraint if stage == "instruction" else RestraintSettings(),
        )
        for stage, layout in layouts.items()
    )


def plan_fleet(
    experiment: Experiment,
    identity: BaseIdentity,
    dataset: Dataset,
    preferences: Preferences,
    encoder: EncoderIdentity | None = None,
) -> FleetPlan:
    """Return the clients that an experiment draws.

    Raises:
        InputError: If fleet, modules or partition do not fit base, data or each other.
    """
    modules = Modules(
        method=find_method(experiment.method),
        identity=identity,
        adapter_size=experiment.adapter_size,
        placement=experiment.placement,
        rank=experiment.lora_rank,
        reward_shares=experiment.reward_shares,
        encoder=encoder,
    )
    adapter_sites(identity.shape, experiment.adapter_count)
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
    places = preferences.divide(
        clients=experiment.clients,
        held_out_share=experiment.held_out_share,
        seed=experiment.seed,
    )
    clients = [
        ClientSpec(
            device=_describe(experiment, modules, device, part, own),
            profile=device.profile,
            train=list(part.train),
            held_out=list(part.held_out),
            others=_others(experiment, i, parts),
            own=own,
        )
        for i, (device, part, own) in enumerate(zip(devices, parts, places, strict=True))
    ]
    return FleetPlan(
        clients=clients,
        layouts={stage: modules.layout(stage) for stage in experiment.stage_names},
        modules=modules.shape(),
        priced=_priced(experiment, identity),
    )


def _others(experiment: Experiment, client: int, parts: Sequence[Part]) -> list[int]:
    """Return held-out examples of other clients that one client is measured on, too."""
    there = [i for n, part in enumerate(parts) if n != client for i in part.held_out]
    size = min(experiment.others_sample, len(there))
    places = stream(experiment.seed, "others", client).permutation(len(there))[:size]
    return sorted(there[int(place)] for place in places)


def _priced(experiment: Experiment, identity: BaseIdentity) -> CostBasis | None:
    if experiment.priced_at == "base":
        return None
    base, _ = PRICED_SHAPES[experiment.priced_at]
    rank, _ = lora_rank(base, experiment.priced_lora_rank)
    return cost_basis(experiment.priced_at, identity.shape, rank)


def _scoring(experiment: Experiment, modules: Modules) -> str:
    return scoring(experiment.trunk_precision, modules.encoder.sha256 if modules.encoder else None)


def _describe(
    experiment: Experiment, modules: Modules, device: Device, part: Part, own: Places
) -> DeviceRecord:
    """Return a client's record; by itself it trains what it affords, of the sites there are."""
    afforded = modules.lora_count(device.lora_count)
    return describe_device(
        modules,
        part,
        experiment.link(device.profile.radio),
        client=device.id,
        profile=device.profile,
        lora_count=experiment.lora_count or afforded,
        threads=experiment.threads,
        helpfulness=device.preference if experiment.preference is None else experiment.preference,
        preference_pairs=own.training_pairs,
        scoring=_scoring(experiment, modules) if own.train else "",
        precision=base_precision(modules.identity, experiment.precision, device.profile),
        costs="modelled",
        private=experiment.privacy is not None,
    )
