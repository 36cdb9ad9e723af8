"""A run before it starts: everything that follows from its experiment, looked up and drawn."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cloud_aggregator.cohort import CohortRule, least_there
from cloud_aggregator.emulation.fleet import (
    ClientSpec,
    FleetPlan,
    WorkerSpec,
    plan_fleet,
    preference_sources,
    stage_plans,
)
from cloud_aggregator.experiment import Experiment, stored
from cloud_aggregator.presence import Traced, presence_of
from cloud_aggregator.records import DataRecord, RunRecord, encoder_record, model_record
from cloud_aggregator.run_folder import RunFolder, read_record
from cloud_aggregator.settings import RunSettings
from device_profiles.errors import InputError
from device_profiles.methods import find_method
from edge_client.data.instructions import Dataset, load_instructions
from edge_client.data.own_data import Preferences, load_sources
from messaging.layout import joint_sha256
from quantization.encoder_identity import EncoderIdentity, identify_encoder
from quantization.identity import BaseIdentity, binding, identify, require_gpt2

_GATHER_SECONDS = 300.0
_PATIENCE_SECONDS = 3600.0


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A run before it starts; nothing of it is on disk yet."""

    experiment: Experiment
    identity: BaseIdentity
    encoder: EncoderIdentity | None
    dataset: Dataset
    preferences: Preferences
    fleet: FleetPlan
    presence: Traced | None
    binding: str
    workers: int
    folder: RunFolder


def plan_run(experiment: Experiment, folder: RunFolder) -> Planned:
    """Return a run's base, data and clients; nothing is trained or written.

    Raises:
        InputError: If fleet, modules, data or partition are not usable or do not fit each other.
        BaseModelError: If the base is not usable.
    """
    identity = identify(experiment.model)
    if experiment.stage_names != ["instruction"]:
        require_gpt2(identity, f"stages = '{experiment.stages}'")
    dataset = load_instructions(experiment.data)
    preferences = load_sources(
        preference_sources(experiment), experiment.prompts, seed=experiment.seed
    )
    reads = "reward" in experiment.stage_names and bool(find_method(experiment.method).objectives)
    encoder = identify_encoder(experiment.reward_trunk) if reads else None
    fleet = plan_fleet(experiment, identity, dataset, preferences, encoder)
    names = [client.device.id for client in fleet.clients]
    presence = presence_of(experiment, names, experiment.seed)
    if presence is not None:  # so many as a round needs have to be there at some time
        presence.moment(0.0, names, least_there(experiment.rules, _cohort(experiment)))
    return Planned(
        experiment=experiment,
        identity=identity,
        encoder=encoder,
        dataset=dataset,
        preferences=preferences,
        fleet=fleet,
        presence=presence,
        binding=binding(identity, experiment.placement),
        workers=_worker_count(experiment),
        folder=folder,
    )


def _check_unchanged(record: RunRecord, planned: Planned) -> None:
    """Refuse to resume on another base, tokenizer or data than the run began with."""
    pairs: dict[str, tuple[object, object]] = {
        "model": (record.model.sha256, planned.identity.sha256),
        "tokenizer": (record.model.tokenizer_sha256, planned.identity.tokenizer_sha256),
        "data": (record.data.sha256, planned.dataset.sha256),
        "preference data": (record.data.preferences, planned.preferences.hashes),
        "reward_trunk": (record.encoder, encoder_record(planned.encoder)),
    }
    for name, (then, now) in pairs.items():
        if then != now:
            raise InputError(
                f"the {name} is not what the run in {planned.folder.path} began with (its hash "
                "changed); put it back, or start a new run in another --out"
            )


def _worker_count(experiment: Experiment) -> int:
    if experiment.engine == "local" and experiment.transport == "memory":
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    wanted = experiment.workers or max(1, (cores or 1) // experiment.threads)
    return min(wanted, experiment.clients)


def run_record(planned: Planned, *, resume: bool) -> RunRecord:
    """Return a run's record so far.

    Raises:
        InputError: If it is damaged, or base or data are not what the run began with.
    """
    experiment, dataset = planned.experiment, planned.dataset
    if resume:
        record = read_record(planned.folder.path)
        _check_unchanged(record, planned)
        record.engine, record.workers = experiment.engine, planned.workers
        record.transport = experiment.transport
        return record
    return RunRecord(
        version=version("pwff"),
        run=experiment.run_name,
        seed=experiment.seed,
        method=experiment.method,
        stages=experiment.stage_names,
        engine=experiment.engine,
        workers=planned.workers,
        transport=experiment.transport,
        codec=experiment.codec,
        aggregation=experiment.aggregation,
        reward_shares=experiment.reward_shares,
        encoder=encoder_record(planned.encoder),
        model=model_record(planned.identity, planned.fleet.priced),
        data=DataRecord(
            source=experiment.data,
            sha256=dataset.sha256,
            examples=len(dataset.examples),
            held_out_examples=sum(c.device.held_out_examples for c in planned.fleet.clients),
            broken_rows=len(dataset.broken),
            preferences=planned.preferences.hashes,
            partition=experiment.partition,
            alpha=experiment.alpha if experiment.partition == "dirichlet" else None,
            skew=experiment.skew,
        ),
    )


def run_config(planned: Planned) -> dict[str, Any]:
    """Return what ``config.toml`` holds of the run itself."""
    return {
        "experiment": stored(planned.experiment),
        "hashes": {
            "base": planned.identity.sha256,
            "tokenizer": planned.identity.tokenizer_sha256,
            "data": planned.dataset.sha256,
            "binding": planned.binding,
            "layout": joint_sha256(planned.fleet.layouts.values()),
            **planned.preferences.hashes,
        },
        "threads_a_client": planned.experiment.threads,
    }


def run_settings(planned: Planned) -> RunSettings:
    """Return what the aggregator needs."""
    experiment = planned.experiment
    return RunSettings(
        run=experiment.run_name,
        method=experiment.method,
        seed=experiment.seed,
        modules=planned.fleet.modules,
        stages=stage_plans(experiment, planned.fleet.layouts),
        binding=planned.binding,
        clients=experiment.clients,
        minimum_clients=experiment.clients,
        gather_seconds=_GATHER_SECONDS,
        codec=experiment.codec,
        max_length=experiment.max_length,
        chunk_bytes=experiment.chunk_bytes,
        rules=experiment.rules,
        counting=experiment.counting(experiment.rules, experiment.wanted),
        keep_states=experiment.keep_states,
        virtual_time=True,
        known_clients=frozenset(c.device.id for c in planned.fleet.clients),
        cohort=_cohort(experiment),
        refuses_hopeless_deadline=True,
        waits_for_channel=experiment.upload_policy == "wait",
        presence=planned.presence,
        patience_seconds=_PATIENCE_SECONDS,
    )


def _cohort(experiment: Experiment) -> CohortRule | None:
    if experiment.cohort is None:
        return None
    return CohortRule(size=experiment.cohort, selection=experiment.selection, seed=experiment.seed)


def worker_specs(planned: Planned) -> list[WorkerSpec]:
    """Deal the clients out, those with the most to do first, to the worker with the least."""
    shares: list[list[ClientSpec]] = [[] for _ in range(planned.workers)]
    load = [0.0] * planned.workers
    weights = {c.device.id: turn_weight(planned, c) for c in planned.fleet.clients}
    for client in sorted(planned.fleet.clients, key=lambda c: (-weights[c.device.id], c.device.id)):
        least = load.index(min(load))
        shares[least].append(client)
        load[least] += weights[client.device.id]
    return [fleet_spec(planned, sorted(share, key=lambda c: c.device.id)) for share in shares]


def turn_weight(planned: Planned, client: ClientSpec) -> float:
    """Return about how long a client's turn takes, beside another's: rows through the model.

    A row that is trained on counts for three that are read; what trains counts with the base.
    """
    experiment, device = planned.experiment, client.device
    steps = experiment.steps_of(experiment.stage_names[0])
    trained = 3 * steps * min(experiment.batch_size, device.examples)
    size = planned.identity.parameters + device.trainable_parameters
    return (trained + device.held_out_examples) * size / planned.identity.parameters


def fleet_spec(planned: Planned, clients: list[ClientSpec]) -> WorkerSpec:
    """Return what a worker is told that hosts these clients."""
    experiment = planned.experiment
    return WorkerSpec(
        run=experiment.run_name,
        run_folder=str(planned.folder.path.resolve()),
        features=str(Path(experiment.features or planned.folder.path / "features").resolve()),
        model=experiment.model,
        binding=planned.binding,
        stages=experiment.stage_names,
        seed=experiment.seed,
        data=experiment.data,
        data_sha256=planned.dataset.sha256,
        preferences=preference_sources(experiment),
        prompts=experiment.prompts,
        hashes=planned.preferences.hashes,
        trunk_precision=experiment.trunk_precision,
        reward_trunk=_resolved(experiment.reward_trunk),
        encoder_sha256=planned.encoder.sha256 if planned.encoder else None,
        reward_shares=experiment.reward_shares,
        placement=experiment.placement,
        adapter_size=experiment.adapter_size,
        lora_rank=planned.fleet.modules.lora_rank,
        threads=experiment.threads,
        chunk_bytes=experiment.chunk_bytes,
        method=experiment.method,
        priced=planned.fleet.priced,
        private=experiment.privacy is not None,
        clients=clients,
    )


def _resolved(name: str) -> str:
    """Return a folder's whole path, for workers that stand elsewhere; other names as they are."""
    path = Path(name).expanduser()
    return str(path.resolve()) if path.is_dir() else name
