"""One outcome, whoever computes it: engine, workers, transport and lost workers change no bit."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from cloud_aggregator import Experiment, emulate
from messaging.broker import embedded_kind
from tests.end_to_end.conftest import comparable, workers_of

Listener = Callable[..., None]


def outcome(folder: Path, listener: Listener = lambda _event, **_fields: None, **how: Any) -> str:
    """Return the hash of all that a run came to: its record and its global states."""
    experiment = Experiment(
        clients=4, rounds=2, local_steps=2, batch_size=2, max_length=96, codec="int8", **how
    )
    record = emulate(experiment, folder, notify=listener)
    assert (record.status, len(record.rounds)) == ("done", 2)
    return hashlib.sha256(json.dumps(comparable(folder), sort_keys=True).encode()).hexdigest()


def at_first_update(act: Callable[[], None]) -> Listener:
    """Return a listener that does something once, in the middle of the first round."""
    left = [act]

    def listen(event: str, **_fields: Any) -> None:
        if event == "update" and left:
            left.pop()()

    return listen


def kill_a_worker() -> None:
    """Kill one of this process's workers, as the system does that is out of memory."""
    workers_of(psutil.Process())[-1].send_signal(signal.SIGKILL)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the outcome in one process, without a socket."""
    return outcome(tmp_path_factory.mktemp("alone") / "run", transport="memory")


@pytest.mark.skipif(embedded_kind() is None, reason="no MQTT broker is installed")
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_workers_over_mqtt_give_the_same_bits_and_one_that_is_killed_too(
    workers: int, alone: str, tmp_path: Path
) -> None:
    listener = at_first_update(kill_a_worker if workers == 2 else lambda: None)
    assert outcome(tmp_path / "run", listener, transport="mqtt", workers=workers) == alone


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Yield a Ray cluster of two nodes with a processor each; this process is connected to it."""
    if importlib.util.find_spec("ray") is None:
        pytest.skip("ray is not installed")
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        cluster.add_node(num_cpus=1)
        ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def test_two_nodes_of_ray_give_the_same_bits_and_so_does_one_when_the_other_is_lost(
    cluster: Any, alone: str, tmp_path: Path
) -> None:
    if embedded_kind() is not None:
        assert outcome(tmp_path / "mqtt", engine="ray", transport="mqtt") == alone
    second = next(node for node in cluster.list_all_nodes() if not node.head)
    lose = at_first_update(lambda: cluster.remove_node(second, allow_graceful=False))
    assert outcome(tmp_path / "memory", lose, engine="ray", transport="memory") == alone
    assert len(cluster.list_all_nodes()) == 1
