"""An emulated run's keys on their way to its workers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cloud_aggregator.emulation import emulate
from cloud_aggregator.emulation.seals import from_environment, make_seals, to_environment
from cloud_aggregator.experiment import Experiment
from edge_client.ledger import Ledger
from messaging.errors import SecretError
from messaging.key_files import MASTER_VARIABLE, SIGNING_VARIABLE, RunKeys
from messaging.security import CloudSeal

KEYS = RunKeys.generate("trial")


def test_a_worker_has_the_keys_that_its_run_made_and_none_where_it_made_none() -> None:
    assert from_environment("trial", to_environment(KEYS)) == KEYS
    assert to_environment(None) == {}
    assert from_environment("trial", {}) is None


@pytest.mark.parametrize("engine", ["local", "ray"])
def test_a_fleet_on_a_broker_that_is_given_has_keys_and_on_its_own_none(engine: Any) -> None:
    given = Experiment(engine=engine, broker="mqtt://broker.lan")
    first, second = emulate._keys(given, "trial"), emulate._keys(given, "trial")
    assert first is not None
    assert first != second  # of each start
    assert emulate._keys(Experiment(engine=engine), "trial") is None


def test_keys_of_a_service_in_the_environment_are_none_of_a_workers() -> None:
    mine = {MASTER_VARIABLE: KEYS.master.hex(), SIGNING_VARIABLE: KEYS.signing_key.seed.hex()}
    assert from_environment("trial", mine) is None


def test_half_of_the_keys_is_refused() -> None:
    half = dict(list(to_environment(KEYS).items())[:1])
    with pytest.raises(SecretError, match="set both"):
        from_environment("trial", half)


def test_each_client_of_a_worker_has_a_seal_of_its_own(tmp_path: Path) -> None:
    spec: Any = SimpleNamespace(run="trial")
    ledgers = {name: Ledger(tmp_path / name) for name in ("a", "b")}
    assert make_seals(spec, None, ledgers) == {}
    seals = make_seals(spec, KEYS, ledgers)
    cloud = CloudSeal("trial", KEYS.master, KEYS.signing_key, "c" * 16, 1)
    manifest = cloud.sign_manifest(b"manifest")
    for name, seal in seals.items():
        assert (seal.client, seal.epoch) == (name, 1)
        seal.open_manifest(manifest)
        assert cloud.open(name, seal.seal(b"hello")) == b"hello"
        cloud.greeted(name, seal.session, 1)
        assert seal.open(cloud.seal(name, b"task")) == b"task"
    assert seals["a"].session != seals["b"].session
    assert seals["a"].key != seals["b"].key
