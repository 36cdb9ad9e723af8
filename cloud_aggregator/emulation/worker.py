"""One worker of an emulated fleet: a process that lends one base to its clients in turn.

Started as ``python -m cloud_aggregator.emulation.worker SPEC.json``. It leaves when its clients are
told that the run is over, on SIGTERM, and when its standard input closes (its parent is gone).
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from pathlib import Path

from cloud_aggregator.emulation.fleet import BROKER_VARIABLE, WorkerSpec
from cloud_aggregator.emulation.seals import from_environment, make_seals
from cloud_aggregator.methods import ModuleShape, find_method, stage_layout
from cloud_aggregator.run_folder import RunFolder
from device_profiles.errors import InputError
from edge_client.data.instructions import load_instructions
from edge_client.data.own_data import load_sources
from edge_client.device_record import link_of
from edge_client.host import Host
from edge_client.ledger import Ledger
from edge_client.local_client import LocalClient, Setup
from edge_client.peft.build import build_model
from edge_client.peft.packed_model import PackedModel
from edge_client.progress import Interruption, Progress
from edge_client.works import build_works, load_judging
from messaging.key_files import RunKeys
from messaging.mqtt import MqttNetwork
from messaging.transport import Network
from quantization.base_model import set_threads
from quantization.identity import identify


def build_clients(spec: WorkerSpec, interruption: Interruption | None = None) -> list[LocalClient]:
    """Load data once and a base for each precision, and return this worker's clients on them.

    Args:
        spec: What they are.
        interruption: Stops a training between two steps; where it stands is on the client's disk.

    Raises:
        InputError: If base or data are not what the run was planned on.
    """
    set_threads(spec.threads)
    identity = identify(spec.model)
    method = find_method(spec.method)
    adapters = "adapters" in method.trained
    counts: dict[str, int] = {}
    for client in spec.clients:
        precision = client.device.precision
        counts[precision] = max(counts.get(precision, 0), client.device.lora_count)
    models = {
        precision: build_model(
            identity,
            precision,
            adapter_size=spec.adapter_size if adapters else 0,
            placement=spec.placement,
            lora_count=count,
            lora_rank=spec.lora_rank,
        )
        for precision, count in sorted(counts.items())
    }
    modules = ModuleShape(
        base=identity.shape,
        adapter_size=spec.adapter_size,
        placement=spec.placement,
        lora_rank=spec.lora_rank,
    )
    setup = Setup(
        run=spec.run,
        method=spec.method,
        layouts={stage: stage_layout(stage, method, modules) for stage in spec.stages},
        placement=spec.placement,
        adapter_size=spec.adapter_size,
        lora_rank=spec.lora_rank,
        chunk_bytes=spec.chunk_bytes,
        priced=spec.priced,
    )
    dataset = load_instructions(spec.data)
    if dataset.sha256 != spec.data_sha256:
        raise InputError(f"data {spec.data} changed since the run was planned; start a new run")
    preferences = load_sources(spec.preferences, spec.prompts, seed=spec.seed)
    if preferences.hashes != spec.hashes:
        raise InputError("preference data changed since the run was planned; start a new run")
    interruption = interruption or Interruption()
    bases = [model.base for model in models.values() if isinstance(model, PackedModel)]
    judging = load_judging(identity, spec.trunk_precision, *bases) if spec.preferences else None
    examples = dataset.examples
    folder = RunFolder(Path(spec.run_folder))
    return [
        LocalClient(
            setup,
            build_works(
                setup,
                models[client.device.precision],
                client.device,
                preferences.own(
                    client.own,
                    [examples[i] for i in client.train],
                    [examples[i] for i in client.held_out],
                    [examples[i] for i in client.others],
                ),
                judging=judging,
                folder=folder.client_path(client.device.id),
                progress=Progress(folder.client_path(client.device.id), interruption),
            ),
            base=identity,
            device=client.device,
            profile=client.profile,
            link=link_of(client.device),
            folder=folder.client_path(client.device.id),
            private=spec.private,
        )
        for client in spec.clients
    ]


def make_host(spec: WorkerSpec, network: Network, keys: RunKeys | None = None) -> Host:
    """Return a host of this worker's clients, which seal what they say where there are keys."""
    interruption = Interruption()
    folder = RunFolder(Path(spec.run_folder))
    ledgers = {c.device.id: Ledger(folder.client_path(c.device.id)) for c in spec.clients}
    return Host(
        network,
        build_clients(spec, interruption),
        binding=spec.binding,
        seals=make_seals(spec, keys, ledgers),
        ledgers=ledgers,
        interrupt=interruption.stop,
    )


def main() -> int:
    """Run the worker that the first argument's file describes; return the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    spec = WorkerSpec.model_validate_json(Path(sys.argv[1]).read_bytes())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the run, which stops its workers
    try:
        return _work(spec, os.environ[BROKER_VARIABLE])
    except InputError as err:
        sys.stderr.write(f"{err}\n")  # the last line of the log: the run says it again
        return err.exit_code


def _work(spec: WorkerSpec, broker: str) -> int:
    host = make_host(spec, MqttNetwork(broker), from_environment(spec.run, os.environ))
    signal.signal(signal.SIGTERM, lambda _signal, _frame: host.stop())
    threading.Thread(target=_leave_with_parent, args=(host,), daemon=True).start()
    host.run()
    for failure in host.failures:
        logging.error(failure)
    return 1 if host.failures else 0


def _leave_with_parent(host: Host) -> None:
    while os.read(sys.stdin.fileno(), 1):  # empty when the parent's end of the pipe closes
        pass
    host.stop()


if __name__ == "__main__":
    sys.exit(main())
