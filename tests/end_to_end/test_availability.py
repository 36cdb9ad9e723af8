"""An emulated fleet whose devices come and go: the same bits wherever and however it is run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cloud_aggregator.emulation.emulate import emulate
from cloud_aggregator.experiment import Experiment
from cloud_aggregator.server import Aggregator
from messaging.broker import embedded_kind
from tests.end_to_end.conftest import comparable, read_run

#: Five devices that stay for a minute and are away for twelve, where a round takes half a minute.
CHURN: dict[str, Any] = {
    "clients": 5, "partition": "iid", "rounds": 6, "local_steps": 1, "batch_size": 1,
    "max_length": 48, "lora_count": 12, "priced_at": "gpt2-small", "availability": "churn",
    "on_hours": 0.02, "off_hours": 0.2, "deadline_seconds": 60.0, "transport": "memory",
    "patience": 0, "seed": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone") / "run"
    assert emulate(Experiment(**CHURN), folder).status == "done"
    return folder


def test_rounds_ask_who_is_there_wait_for_the_first_and_lose_who_leaves(alone: Path) -> None:
    run = read_run(alone)
    statuses = [[c["status"] for c in r["clients"]] for r in run["rounds"]]
    assert any("skipped" in each for each in statuses)
    assert all({"aggregated", "lost"} & set(each) for each in statuses)
    reasons = {c["reason"].split(":")[0] for r in run["rounds"] for c in r["clients"]}
    assert "away" in reasons
    waits = [r["waited_seconds"] for r in run["rounds"]]
    assert min(waits) == 0
    assert max(waits) > 60


@pytest.mark.skipif(embedded_kind() is None, reason="no MQTT broker is installed")
def test_the_bits_are_the_same_over_mqtt_with_two_workers(alone: Path, tmp_path: Path) -> None:
    emulate(Experiment(**{**CHURN, "transport": "mqtt", "workers": 2}), tmp_path / "run")
    assert comparable(tmp_path / "run") == comparable(alone)


def test_stopped_in_the_middle_of_a_round_and_resumed_it_asks_the_same(
    alone: Path, tmp_path: Path
) -> None:
    aggregators: list[Aggregator] = []

    def stop(event: str, **fields: Any) -> None:
        if event == "update" and fields["round"] == 4:
            aggregators[0].stop()

    out = tmp_path / "run"
    stopped = emulate(Experiment(**CHURN), out, notify=stop, on_start=aggregators.append)
    assert (stopped.status, len(stopped.rounds)) == ("stopped", 3)
    assert emulate(Experiment(**CHURN), out, resume=True).status == "done"
    assert comparable(out) == comparable(alone)
