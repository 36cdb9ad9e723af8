"""One emulated run from an experiment: broker, aggregator and workers, started and stopped."""

from __future__ import annotations

import contextlib
import datetime
import importlib.util
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from cloud_aggregator.emulation.airtime import airtime_lines
from cloud_aggregator.emulation.broker_watch import watch_broker
from cloud_aggregator.emulation.nursery import dismiss, take
from cloud_aggregator.emulation.plan import (
    plan_run,
    run_config,
    run_record,
    run_settings,
    worker_specs,
)
from cloud_aggregator.emulation.pool import WorkerPool
from cloud_aggregator.emulation.room import check_room
from cloud_aggregator.experiment import Experiment, check_experiment, check_same
from cloud_aggregator.records import RunRecord
from cloud_aggregator.run_folder import RunFolder
from cloud_aggregator.server import Aggregator
from cloud_aggregator.store import Store
from cloud_aggregator.trackers import check_trackers, open_trackers
from device_profiles.config_files import read_toml
from device_profiles.errors import InputError
from messaging.broker import embedded_broker
from messaging.key_files import RunKeys
from messaging.memory import MemoryNetwork
from messaging.mqtt import MqttNetwork
from messaging.transport import Network
from quantization.errors import MissingExtraError

if TYPE_CHECKING:
    from edge_client.host import Host

Notify = Callable[..., None]


def emulate(
    experiment: Experiment,
    out: Path | None = None,
    *,
    resume: bool = False,
    track: Sequence[str] = (),
    notify: Notify = lambda _event, **_fields: None,
    on_start: Callable[[Aggregator], None] = lambda _aggregator: None,
) -> RunRecord:
    """Run an experiment (or go on with one) in the folder ``out`` and return its record.

    Args:
        experiment: What to run.
        out: The run's folder; by default one below ``runs``, named by method, seed and time.
        resume: Go on with the run in ``out``.
        track: Names in ``cloud_aggregator.trackers.TRACKERS`` that follow the run.
        notify: Told of everything that happens (event, fields).
        on_start: Given the aggregator before it runs, so that a signal handler can stop it.

    Raises:
        InputError: If the experiment, its data or the folder are not usable.
        MissingExtraError: If the packages that train or track are not installed.
        BrokerUnavailableError: If the broker does not answer.
        RunFailedError: If the run cannot go on.
        StoreError: If its store cannot be read or written.
    """
    require_edge()
    if experiment.engine == "ray":
        require("ray", "engine 'ray' emulates on a cluster of it", extra="ray")
    check_experiment(experiment, "experiment")
    check_trackers(track)  # before there is a folder
    folder = RunFolder(new_place(experiment) if out is None else out)
    _check_folder(folder, experiment, resume=resume)
    with contextlib.ExitStack() as stack:
        nursery = None
        if experiment.engine == "local" and experiment.transport == "mqtt":
            nursery = stack.enter_context(take())  # it is ready when the run is planned
        else:
            dismiss()
        planned = plan_run(experiment, folder)
        check_room(planned)
        record = run_record(planned, resume=resume)
        store = stack.enter_context(Store(folder.path, experiment.run_name))
        tracked = stack.enter_context(open_trackers(track, folder))

        def tell(event: str, **fields: Any) -> None:
            folder.append_event(event, **fields)
            tracked(event, **fields)
            notify(event, **fields)

        folder.write_config(run_config(planned))
        devices = [client.device for client in planned.fleet.clients]
        for listener in (tracked, notify):
            listener("plan", record=record, clients=devices, broken=planned.dataset.broken)
        notify("airtime", lines=airtime_lines(experiment, planned.fleet))
        if experiment.engine == "ray":
            from cloud_aggregator.emulation.ray_fleet import ray_session

            # before on_start: Ray takes signals for itself
            stack.enter_context(
                ray_session(experiment.address, planned.workers * experiment.threads)
            )
        network, url = stack.enter_context(_network(experiment))
        pool: list[WorkerPool] = []
        keys = _keys(experiment, record.run)
        aggregator = Aggregator(
            run_settings(planned),
            record,
            folder,
            network,
            store=store,
            notify=tell,
            memory=lambda: pool[0].memory() if pool else psutil.Process().memory_info().rss,
            keys=keys,
        )
        on_start(aggregator)
        if url is not None and experiment.broker is None:
            stack.enter_context(watch_broker(url, aggregator.fail))
        if experiment.engine == "ray":
            from cloud_aggregator.emulation.ray_fleet import make_ray_host

            stack.enter_context(_in_this_process(make_ray_host(planned, network, keys), aggregator))
        elif url is None:
            from cloud_aggregator.emulation.worker import make_host

            host = make_host(worker_specs(planned)[0], network, keys)
            stack.enter_context(_in_this_process(host, aggregator))
        elif nursery is not None:
            specs, place = worker_specs(planned), folder.path / "workers"
            failed = aggregator.fail
            pool.append(WorkerPool(nursery, specs, place, broker=url, failed=failed, keys=keys))
            stack.callback(pool[0].close)
        return aggregator.run()


def _keys(experiment: Experiment, run: str) -> RunKeys | None:
    """Return keys for a run over a broker that others may reach too."""
    return None if experiment.broker is None else RunKeys.generate(run)


def new_place(experiment: Experiment) -> Path:
    """Return the folder of a run that is given none: by method, seed and the time."""
    now = datetime.datetime.now().astimezone()
    return Path("runs") / f"{experiment.method}-{experiment.seed}-{now:%Y%m%d-%H%M%S}"


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


def require_edge() -> None:
    """Say what to install where the packages that train are not there.

    Raises:
        MissingExtraError: Naming the extra.
    """
    for name in ("torch", "transformers", "peft"):
        require(name, "emulated devices train with it", extra="edge")


def require(package: str, why: str, *, extra: str) -> None:
    """Say what to install where a package is not there.

    Raises:
        MissingExtraError: Naming the extra.
    """
    if importlib.util.find_spec(package) is None:
        raise MissingExtraError(
            f"{package} is not installed, and {why}: `pip install 'pwff[{extra}]'`"
        )


@contextlib.contextmanager
def _in_this_process(host: Host, aggregator: Aggregator) -> Iterator[None]:
    """Host the clients on a thread of this process."""

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
