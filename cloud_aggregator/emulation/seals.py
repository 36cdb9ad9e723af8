"""The seals of an emulated fleet on a broker that is not its own.

A run's keys are made anew at every start and live in memory: the run hands them to its workers by
their environment, as it does the broker's address. Sealing costs a message 26 microseconds at each
end (measured), so there is no switch.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping

from cloud_aggregator.emulation.fleet import WorkerSpec
from edge_client.ledger import Ledger
from messaging.key_files import MASTER_VARIABLE, SIGNING_VARIABLE, RunKeys, run_keys
from messaging.security import DeviceSeal

_PREFIX = "PWFF_WORKER_"


def to_environment(keys: RunKeys | None) -> dict[str, str]:
    """Return the variables that hand a run's keys to a worker."""
    if keys is None:
        return {}
    return {
        _PREFIX + MASTER_VARIABLE: keys.master.hex(),
        _PREFIX + SIGNING_VARIABLE: keys.signing_key.seed.hex(),
    }


def from_environment(run: str, environment: Mapping[str, str]) -> RunKeys | None:
    """Return the keys that a worker was handed; none where its run is not sealed."""
    names = (MASTER_VARIABLE, SIGNING_VARIABLE)
    given = {name: environment[_PREFIX + name] for name in names if _PREFIX + name in environment}
    return run_keys(None, run, given)


def make_seals(
    spec: WorkerSpec, keys: RunKeys | None, ledgers: Mapping[str, Ledger]
) -> dict[str, DeviceSeal]:
    """Return the seals of a worker's clients, each in a session of its own."""
    if keys is None:
        return {}
    return {
        name: DeviceSeal(
            run=spec.run,
            client=name,
            key=keys.device(name).key,
            verify_key=keys.signing_key.verify_key,
            session=secrets.token_hex(8),
            epoch=ledger.epoch,
            highest=ledger.highest,
        )
        for name, ledger in ledgers.items()
    }
