"""The aggregator as a service: a run that its configuration describes, and that resumes."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from typing import Any

import psutil

from cloud_aggregator.health import monitor
from cloud_aggregator.metrics import CountedNetwork, Metrics
from cloud_aggregator.records import RunRecord
from cloud_aggregator.run_folder import RunFolder
from cloud_aggregator.server import Aggregator
from cloud_aggregator.service_config import Service, store_url
from cloud_aggregator.service_plan import encoder_of, run_record, run_settings, written_config
from cloud_aggregator.store import Store
from messaging.key_files import run_keys
from messaging.mqtt import MqttNetwork
from quantization.identity import identify

log = logging.getLogger(__name__)


def serve(
    service: Service,
    *,
    notify: Callable[..., None],
    on_start: Callable[[Aggregator], None],
    clock: Callable[[], float] = time.monotonic,
) -> RunRecord:
    """Run the aggregator until the run is done or stopped; return its record.

    A missing broker is tried again and again, with back-off. ``clock`` gives monotonic seconds.

    Raises:
        InputError: If base, folder, store or broker address are not usable, or another aggregator
            is at work on the run.
        SecretError: If a key, certificate or password is not usable.
        SpoolFullError: If the spool's disk is full.
        StoreError: If the run's store cannot be read or written.
    """
    keys = run_keys(service.security.keys, service.run)
    network = MqttNetwork(service.broker, service.security)
    if keys is None and not network.address.is_local:
        log.warning(
            "this run has no keys: whoever may publish at %s can speak for its devices; "
            "make keys with `pwff certs` and give security.keys",
            network.address,
        )
    metrics = Metrics(service.run, service.method)
    if service.broker_log is not None:
        metrics.watch_broker(service.broker_log)
    url = store_url(service)
    identity = identify(service.model)
    encoder = encoder_of(service)
    folder = RunFolder(service.out)
    record = run_record(service, identity, folder, encoder)
    settings = run_settings(service, identity, encoder)

    def tell(event: str, **fields: Any) -> None:
        folder.append_event(event, **fields)
        metrics(event, **fields)
        notify(event, **fields)

    with contextlib.ExitStack() as stack:
        store = stack.enter_context(Store(folder.path, service.run, url))
        log.info("the run's state is in %s (start %d)", store.name, store.epoch)
        folder.write_config(written_config(service, identity, settings, network, url))
        server = Aggregator(
            settings,
            record,
            folder,
            CountedNetwork(network, metrics),
            store=store,
            notify=tell,
            memory=lambda: psutil.Process().memory_info().rss,
            clock=clock,
            keys=keys,
            door=service.limits.door,
        )
        server.watch(metrics)
        if service.monitor is not None:
            stack.enter_context(monitor(service.monitor, server.vitals(), metrics.page))
        on_start(server)
        return server.run()
