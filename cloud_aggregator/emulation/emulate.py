"""One emulated run from an experiment: broker, aggregator and workers, started and stopped."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from cloud_aggregator.cohort import CohortRule
from cloud_aggregator.emulation.fleet import (
    ClientSpec,
    FleetPlan,
    WorkerSpec,
    plan_fleet,
    preference_sources,
    stage_plans,
)
from cloud_aggregator.emulation.pool import WorkerPool
from cloud_aggregator.experiment import Experiment, check_same, stored
from cloud_aggregator.records import DataRecord, RunRecord
from cloud_aggregator.rounds import RoundRules
from cloud_aggregator.run_folder import RunFolder, read_record
from cloud_aggregator.server import Aggregator
from cloud_aggregator.service import model_record
from cloud_aggregator.settings import RunSettings
from device_profiles.config_files import read_toml
from device_profiles.errors import InputError
from edge_client.data.instructions import Dataset, load_instructions
from edge_client.data.own_data import Preferences, load_sources
from edge_client.device_record import held_bytes
from edge_client.preflight import (
    check_memory,
    client_memory,
    fleet_bytes,
    free_memory,
    step_shape,
)
from messaging.broker import embedded_broker
from messaging.layout import joint_sha256
from messaging.memory import MemoryNetwork
from messaging.mqtt import MqttNetwork
from messaging.transport import Network
from quantization.errors import MissingExtraError
from quantization.identity import BaseIdentity, binding, identify

_GATHER_SECONDS = 300.0
_PATIENCE_SECONDS = 3600.0

Notify = Callable[..., None]


def emulate(
    experiment: Experiment,
    out: Path,
    *,
    resume: bool = False,
    notify: Notify = lambda _event, **_fields: None,
    on_start: Callable[[Aggregator], None] = lambda _aggregator: None,
) -> RunRecord:
    """Run an experiment (or go on with one) in the folder ``out`` and return its record.

    Args:
        experiment: What to run.
        out: The run's folder.
        resume: Go on with the run in ``out``.
        notify: Told of everything that happens (event, fields).
        on_start: Given the aggregator before it runs, so that a signal handler can stop it.

    Raises:
        InputError: If the experiment, its data or the folder are not usable.
        BrokerUnavailableError: If the broker does not answer.
        RunFailedError: If the run cannot go on.
    """
    require_edge()
    folder = RunFolder(out)
    _check_folder(folder, experiment, resume=resume)
    planned = _plan(experiment, folder)
    _check_memory(planned)
    record = _record(planned, resume=resume)
    folder.write_config(_config(planned))
    devices = [client.device for client in planned.fleet.clients]
    notify("plan", record=record, clients=devices, broken=planned.dataset.broken)

    def tell(event: str, **fields: Any) -> None:
        folder.append_event(event, **fields)
        notify(event, **fields)

    with contextlib.ExitStack() as stack:
        network, url = stack.enter_context(_network(experiment))
        pool: list[WorkerPool] = []
        aggregator = Aggregator(
            _settings(planned),
            record,
            folder,
            network,
            notify=tell,
            memory=lambda: pool[0].memory() if pool else psutil.Process().memory_info().rss,
        )
        on_start(aggregator)
        specs = _worker_specs(planned)
        if url is None:
            stack.enter_context(_in_this_process(specs[0], network, aggregator))
        else:
            pool.append(WorkerPool(specs, url, folder.path / "workers", aggregator.fail))
            stack.callback(pool[0].close)
        return aggregator.run()


@dataclass(frozen=True, kw_only=True)
class _Planned:
    """A run before it starts: everything that was looked up and drawn."""

    experiment: Experiment
    identity: BaseIdentity
    dataset: Dataset
    preferences: Preferences
    fleet: FleetPlan
    binding: str
    workers: int
    folder: RunFolder


def _plan(experiment: Experiment, folder: RunFolder) -> _Planned:
    identity = identify(experiment.model)
    dataset = load_instructions(experiment.data)
    preferences = load_sources(
        preference_sources(experiment), experiment.prompts, seed=experiment.seed
    )
    return _Planned(
        experiment=experiment,
        identity=identity,
        dataset=dataset,
        preferences=preferences,
        fleet=plan_fleet(experiment, identity, dataset, preferences),
        binding=binding(identity, experiment.placement),
        workers=_worker_count(experiment),
        folder=folder,
    )


def _check_memory(planned: _Planned) -> None:
    """Refuse, before any worker starts, a run that the system would stop for its memory.

    Raises:
        NotEnoughMemoryError: If the workers would take more than is free.
    """
    from quantization.checkpoint import look_through  # needs torch

    experiment, fleet, workers = planned.experiment, planned.fleet, planned.workers
    shape = step_shape(
        planned.identity,
        look_through(planned.identity).heads,
        adapter_size=fleet.modules.adapter_size,
        placement=fleet.modules.placement,
        lora_rank=fleet.modules.lora_rank,
    )
    devices = [client.device for client in fleet.clients]
    worst = max(devices, key=lambda device: (device.lora_count, device.base_bytes))
    precision = worst.precision.removesuffix("-dynamic")
    one = client_memory(
        shape,
        worst.lora_count,
        batch_size=experiment.batch_size,
        max_length=experiment.max_length,
        precision=precision,
    )
    bases = {device.precision for device in devices}
    if fleet.clients[0].own.train:
        bases.add(experiment.trunk_precision)
    others = sum(held_bytes(planned.identity, p) for p in bases - {worst.precision})
    check_memory(
        fleet_bytes(one, workers, precision) + workers * others,
        free_memory(),
        what=f"{workers} worker(s) on {planned.identity.name}",
        remedies=[
            "give --workers 1",
            "--precision int8 or nf4",
            "a smaller --batch-size or --max-length",
        ],
    )


def _check_folder(folder: RunFolder, experiment: Experiment, *, resume: bool) -> None:
    if not resume:
        if folder.record_path.exists():
            raise InputError(
                f"{folder.path} already holds a run; give --resume to go on with it, "
                "or another --out"
            )
        return
    if not folder.record_path.exists():
        raise InputError(f"{folder.path} holds no run to resume; leave --resume out to start one")
    check_same(read_toml(folder.path / "config.toml").get("experiment", {}), experiment)


def _check_unchanged(record: RunRecord, planned: _Planned) -> None:
    """Refuse to resume on another base, tokenizer or data than the run began with."""
    pairs: dict[str, tuple[object, object]] = {
        "model": (record.model.sha256, planned.identity.sha256),
        "tokenizer": (record.model.tokenizer_sha256, planned.identity.tokenizer_sha256),
        "data": (record.data.sha256, planned.dataset.sha256),
        "preference data": (record.data.preferences, planned.preferences.hashes),
    }
    for name, (then, now) in pairs.items():
        if then != now:
            raise InputError(
                f"the {name} is not what the run in {planned.folder.path} began with (its hash "
                "changed); put it back, or start a new run in another --out"
            )


def _worker_count(experiment: Experiment) -> int:
    if experiment.transport == "memory":
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    wanted = experiment.workers or max(1, (cores or 1) // experiment.threads)
    return min(wanted, experiment.clients)


def _record(planned: _Planned, *, resume: bool) -> RunRecord:
    experiment, dataset = planned.experiment, planned.dataset
    if resume:
        record = read_record(planned.folder.path)
        _check_unchanged(record, planned)
        record.workers, record.transport = planned.workers, experiment.transport
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


def _config(planned: _Planned) -> dict[str, Any]:
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


def _settings(planned: _Planned) -> RunSettings:
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
        rules=RoundRules(quorum=experiment.quorum, deadline_seconds=experiment.deadline_seconds),
        virtual_time=True,
        known_clients=frozenset(c.device.id for c in planned.fleet.clients),
        cohort=_cohort(experiment),
        refuses_hopeless_deadline=True,
        waits_for_channel=experiment.upload_policy == "wait",
        patience_seconds=_PATIENCE_SECONDS,
    )


def _cohort(experiment: Experiment) -> CohortRule | None:
    if experiment.cohort is None:
        return None
    return CohortRule(size=experiment.cohort, selection=experiment.selection, seed=experiment.seed)


@contextlib.contextmanager
def _network(experiment: Experiment) -> Iterator[tuple[Network, str | None]]:
    """Yield the run's network, and the broker's address where there is one."""
    if experiment.transport == "memory":
        yield MemoryNetwork(), None
    elif experiment.broker is not None:
        network = MqttNetwork(experiment.broker)
        network.require(experiment.broker_wait_seconds)
        yield network, experiment.broker
    else:
        with embedded_broker(port=experiment.broker_port) as url:
            yield MqttNetwork(url), url


def _worker_specs(planned: _Planned) -> list[WorkerSpec]:
    """Deal the clients out, heaviest first, to the worker with the least to do."""
    experiment = planned.experiment
    shares: list[list[ClientSpec]] = [[] for _ in range(planned.workers)]
    load = [0] * planned.workers
    heavy = sorted(
        planned.fleet.clients, key=lambda c: (-c.device.trainable_parameters, c.device.id)
    )
    for client in heavy:
        least = load.index(min(load))
        shares[least].append(client)
        load[least] += client.device.base_bytes // 4 + client.device.trainable_parameters
    return [
        WorkerSpec(
            run=experiment.run_name,
            run_folder=str(planned.folder.path.resolve()),
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
            placement=experiment.placement,
            adapter_size=experiment.adapter_size,
            lora_rank=planned.fleet.modules.lora_rank,
            threads=experiment.threads,
            chunk_bytes=experiment.chunk_bytes,
            method=experiment.method,
            priced=planned.fleet.priced,
            clients=sorted(share, key=lambda c: c.device.id),
        )
        for share in shares
    ]


def require_edge() -> None:
    """Say what to install where the packages that train are not there.

    Raises:
        MissingExtraError: Naming the extra.
    """
    for name in ("torch", "transformers", "peft"):
        if importlib.util.find_spec(name) is None:
            raise MissingExtraError(
                f"emulated devices train with {name}, which is not installed: "
                "`pip install 'pwff[edge]'`"
            )


@contextlib.contextmanager
def _in_this_process(spec: WorkerSpec, network: Network, aggregator: Aggregator) -> Iterator[None]:
    """Host the clients on a thread of this process (transport ``memory``)."""
    from cloud_aggregator.emulation.worker import make_host

    host = make_host(spec, network)

    def run() -> None:
        try:
            host.run()
        except Exception as err:
            aggregator.fail(err)

    thread = threading.Thread(target=run, name="pwff-clients")
    thread.start()
    try:
        yield
    finally:
        host.stop()
        thread.join()
