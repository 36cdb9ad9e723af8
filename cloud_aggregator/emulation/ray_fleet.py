"""A fleet on a Ray cluster: the agents are here, their work is done by tasks of the cluster.

Each client says HELLO, offers and reports from this process, over the run's own transport; what it
computes is a Ray task (``ray_turn``). Base, data and global states are in the object store, once a
node. A client's own state is on this machine's disk and travels with each of its turns, so the
nodes need no common disk, and a turn that is lost with its worker is done again elsewhere.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cloud_aggregator.emulation.bench import load_bases, make_setup
from cloud_aggregator.emulation.fleet import ClientSpec
from cloud_aggregator.emulation.plan import Planned, fleet_spec
from cloud_aggregator.emulation.ray_turn import STATES, Equipment, Taken, Turn, take_turn
from cloud_aggregator.emulation.seals import make_seals
from cloud_aggregator.errors import RunFailedError
from device_profiles.errors import InputError
from edge_client.disk import replace_file
from edge_client.host import Host
from edge_client.ledger import Ledger
from edge_client.local_client import Result, Setup
from edge_client.progress import Interruption, StoppedError
from edge_client.stage_work import GlobalStates
from messaging.key_files import RunKeys
from messaging.layout import Vector
from messaging.protocol import Task
from messaging.shared import SharedNetwork
from messaging.transport import Network
from quantization.identity import require_gpt2
from quantization.parts import take_apart

log = logging.getLogger(__name__)

_RETRIES = 8  # of a turn whose worker was lost; more often, it is the turn that ends workers
_LOOK_SECONDS = 0.5  # between two looks whether the run is to stop
_KEPT_STATES = 4


@contextlib.contextmanager
def ray_session(address: str | None, cpus: int) -> Iterator[None]:
    """Be connected to a cluster for as long as the block lasts; a connection that is there is kept.

    Args:
        address: ``HOST:PORT`` of its head, or ``auto``; None starts Ray on this machine.
        cpus: That a Ray of this machine's own has.

    Raises:
        InputError: If no cluster answers there.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # no notice of the future
    import ray

    if ray.is_initialized():
        yield
        return
    own: dict[str, Any] = {"num_cpus": cpus, "include_dashboard": False}
    try:
        ray.init(
            address=address or "local",
            log_to_driver=False,
            logging_level=logging.ERROR,
            **({} if address else own),
        )
    except (ConnectionError, ValueError, RuntimeError) as err:
        raise InputError(
            f"no Ray cluster answers at address = '{address or 'local'}' "
            f"({str(err).splitlines()[0][:200]}); correct --address, start one with "
            "`ray start --head`, or leave it out"
        ) from err
    try:
        yield
    finally:
        ray.shutdown()


def make_ray_host(planned: Planned, network: Network, keys: RunKeys | None = None) -> Host:
    """Return a host of all clients of a run, which work on the cluster that is connected.

    They seal what they say where there are keys, here: the cluster is given none.

    Raises:
        InputError: If the base is no GPT-2, or a precision does not run on this machine.
    """
    require_gpt2(planned.identity, "engine 'ray'")
    fleet = _Fleet(planned)
    places = {c.device.id: planned.folder.client_path(c.device.id) for c in planned.fleet.clients}
    ledgers = {name: Ledger(folder) for name, folder in places.items()}
    return Host(
        SharedNetwork(network, f"pwff-{planned.experiment.run_name}-{secrets.token_hex(4)}"),
        [_RayClient(fleet, client, places[client.device.id]) for client in planned.fleet.clients],
        binding=planned.binding,
        seals=make_seals(fleet.spec, keys, ledgers),
        ledgers=ledgers,
        interrupt=fleet.interruption.stop,
        work_threads=fleet.slots,
        keeps_results=False,
    )


class _Fleet:
    """What the clients of a run have in common here: the cluster, and what lies in its stores.

    Attributes:
        slots: Turns that are under way at once.
    """

    def __init__(self, planned: Planned) -> None:
        import ray

        spec = self.spec = fleet_spec(planned, planned.fleet.clients)
        self.interruption = Interruption()
        self.setup: Setup = make_setup(spec, planned.identity)
        self._ray = ray
        self._run = secrets.token_hex(8)
        bases = load_bases(spec, planned.identity)
        equipment = Equipment(
            spec=spec,
            identity=planned.identity,
            examples=planned.dataset.examples,
            preferences=planned.preferences,
            bases={precision: take_apart(base) for precision, base in bases.items()},
        )
        self._equipment = ray.put(equipment)
        room = int(ray.cluster_resources().get("CPU", 1)) // spec.threads
        if room < 1:
            raise InputError(
                f"threads = {spec.threads}: no client fits on the cluster, which has "
                f"{ray.cluster_resources().get('CPU', 0):g} processors; give fewer"
            )
        self.slots = min(room, planned.experiment.workers or room)
        self._turn = ray.remote(take_turn).options(num_cpus=spec.threads, max_retries=_RETRIES)
        self._states: dict[int, tuple[Vector, Any]] = {}
        self._lock = threading.Lock()

    def do(self, turn: Turn, states: GlobalStates) -> Taken:
        """Have a turn taken somewhere on the cluster, and wait for it.

        Raises:
            StoppedError: If the run is to stop.
            RunFailedError: If the turn's workers are lost again and again.
        """
        ray = self._ray
        taken = self._turn.remote(
            self._run,
            [self._equipment],  # in a list Ray hands it on as it is
            turn,
            shared=self._stored(states.shared),
            reward=self._stored(states.reward),
            reference=self._stored(states.reference),
        )
        try:
            while not ray.wait([taken], timeout=_LOOK_SECONDS)[0]:
                if self.interruption.wanted:
                    ray.cancel(taken, force=True)
                    raise StoppedError
            done: Taken = ray.get(taken)
        except ray.exceptions.RayError as err:
            raise RunFailedError(
                f"'{turn.client.device.id}': Ray gave up its turn: {str(err)[:300]}"
            ) from err
        return done

    def _stored(self, vector: Vector | None) -> Any:
        """Return a reference to a global state: many clients are given the same one."""
        if vector is None:
            return None
        with self._lock:
            if id(vector) not in self._states:
                self._states[id(vector)] = vector, self._ray.put(vector)
                for old in list(self._states)[:-_KEPT_STATES]:
                    del self._states[old]
            return self._states[id(vector)][1]


class _RayClient:
    """A client whose work is done on the cluster; its state is in its folder here."""

    def __init__(self, fleet: _Fleet, spec: ClientSpec, folder: Path) -> None:
        self.setup, self.device = fleet.setup, spec.device
        self._fleet, self._spec, self._folder = fleet, spec, folder

    def perform(self, task: Task, states: GlobalStates, download_bytes: int) -> Result:
        """Do what a task asks and return what came of it.

        Raises:
            InputError: If the client's input is bad.
            DiskError: If the disk does not take its new state.
            StoppedError: If the run is to stop.
            RunFailedError: If its workers are lost again and again.
        """
        taken = self._fleet.do(
            Turn(
                client=self._spec,
                task=task,
                taken_back=states.taken_back,
                download_bytes=download_bytes,
                files={path.name: path.read_bytes() for path in self._folder.glob(STATES)},
            ),
            states,
        )
        for name, content in taken.files.items():
            replace_file(self._folder / name, _writer(content))
        for name in taken.gone:
            (self._folder / name).unlink(missing_ok=True)
        if taken.result is None:
            raise InputError(taken.wrong)
        return taken.result


def _writer(content: bytes) -> Any:
    return lambda path: path.write_bytes(content)
