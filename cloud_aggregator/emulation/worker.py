"""One worker of an emulated fleet: a process that lends one base to its clients in turn.

A nursery forks it, or it is started as ``python -m cloud_aggregator.emulation.worker SPEC.json``.
It leaves when its clients are told that the run is over, on SIGTERM, and when its standard input
closes (its parent is gone).
"""

from __future__ import annotations

import logging
import os
import secrets
import signal
import sys
import threading
from pathlib import Path

from cloud_aggregator.emulation.bench import Bench, load_bases
from cloud_aggregator.emulation.fleet import BROKER_VARIABLE, WorkerSpec
from cloud_aggregator.emulation.seals import from_environment, make_seals
from cloud_aggregator.run_folder import RunFolder
from device_profiles.errors import InputError
from edge_client.data.instructions import Example, load_instructions
from edge_client.data.own_data import Preferences, load_sources
from edge_client.host import Host
from edge_client.ledger import Ledger
from edge_client.progress import Interruption, Progress
from messaging.key_files import RunKeys
from messaging.mqtt import MqttNetwork
from messaging.shared import SharedNetwork
from messaging.transport import Network
from quantization.base_model import set_threads
from quantization.frozen_gpt2 import FrozenBase
from quantization.identity import BaseIdentity, identify


class Stock:
    """What the workers of a run only read: data, and a base for each precision. It is read once."""

    def __init__(self) -> None:
        self._data: tuple[list[Example], Preferences] | None = None
        self._bases: dict[str, FrozenBase] = {}

    def take(
        self, spec: WorkerSpec
    ) -> tuple[BaseIdentity, list[Example], Preferences, dict[str, FrozenBase]]:
        """Return base, instruction data, preference data, and the base at the worker's precisions.

        Raises:
            InputError: If base or data are not what the run was planned on.
        """
        identity = identify(spec.model)
        if self._data is None:
            self._data = load_data(spec)
        bases = load_bases(spec, identity, self._bases)
        self._bases |= bases
        return identity, *self._data, bases


def load_data(spec: WorkerSpec) -> tuple[list[Example], Preferences]:
    """Return the data that a run divides among its clients.

    Raises:
        InputError: If it is not what the run was planned on.
    """
    dataset = load_instructions(spec.data)
    if dataset.sha256 != spec.data_sha256:
        raise InputError(f"data {spec.data} changed since the run was planned; start a new run")
    preferences = load_sources(spec.preferences, spec.prompts, seed=spec.seed)
    if preferences.hashes != spec.hashes:
        raise InputError("preference data changed since the run was planned; start a new run")
    return dataset.examples, preferences


def make_host(
    spec: WorkerSpec, network: Network, keys: RunKeys | None = None, stock: Stock | None = None
) -> Host:
    """Return a host of this worker's clients.

    They seal what they say where there are keys.

    Raises:
        InputError: If base or data are not what the run was planned on.
    """
    set_threads(spec.threads)
    identity, examples, preferences, bases = (stock or Stock()).take(spec)
    bench = Bench(spec, identity, bases=bases, examples=examples, preferences=preferences)
    interruption = Interruption()
    places = {
        c.device.id: RunFolder(Path(spec.run_folder)).client_path(c.device.id) for c in spec.clients
    }
    ledgers = {name: Ledger(folder) for name, folder in places.items()}
    return Host(
        SharedNetwork(network, f"pwff-{spec.run}-{secrets.token_hex(4)}"),
        [
            bench.client(c, folder, Progress(folder, interruption))
            for c, folder in zip(spec.clients, places.values(), strict=True)
        ],
        binding=spec.binding,
        seals=make_seals(spec, keys, ledgers),
        ledgers=ledgers,
        interrupt=interruption.stop,
        keeps_results=False,
    )


def work(path: Path, stock: Stock | None = None) -> int:
    """Run the worker that a file describes, and return its exit code.

    Args:
        path: Of a ``WorkerSpec``.
        stock: What was read for it already.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    spec = WorkerSpec.model_validate_json(path.read_bytes())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the run, which stops its workers
    try:
        return _host(spec, os.environ[BROKER_VARIABLE], stock)
    except InputError as err:
        sys.stderr.write(f"{err}\n")  # the last line of the log: the run says it again
        return err.exit_code


def _host(spec: WorkerSpec, broker: str, stock: Stock | None) -> int:
    keys = from_environment(spec.run, os.environ)
    host = make_host(spec, MqttNetwork(broker), keys, stock)
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
    sys.exit(work(Path(sys.argv[1])))
