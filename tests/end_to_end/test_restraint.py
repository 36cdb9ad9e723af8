"""Whole runs that hold back overfitting, on a base of twelve blocks of width 16."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cloud_aggregator.emulation.emulate import emulate
from cloud_aggregator.experiment import load_experiment
from cloud_aggregator.records import RunRecord

Run = Callable[..., tuple[RunRecord, bytes]]


@pytest.fixture(scope="module")
def run(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Return what runs two rounds of three clients; gives the record and the last global state."""
    data = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [{"instruction": f"Say {i}", "output": f"The number {i}."} for i in range(24)]
    data.write_text("\n".join(json.dumps(row) for row in rows))

    def make(**options: Any) -> tuple[RunRecord, bytes]:
        folder = tmp_path_factory.mktemp("runs") / "run"
        fields = {
            "model": str(tiny_checkpoint), "data": str(data), "partition": "iid", "clients": 3,
            "rounds": 2, "local_steps": 3, "batch_size": 2, "learning_rate": 0.01,
            "max_length": 64, "adapter_size": 4, "transport": "memory", "precision": "fp32",
            **options,
        }  # fmt: skip
        record = emulate(load_experiment(None, fields), folder, notify=lambda *_, **__: None)
        assert record.status == "done"
        return record, (folder / "global" / "2" / "shared.safetensors").read_bytes()

    return make


def test_a_personal_copy_changes_what_is_measured_and_no_bit_of_the_global_state(run: Run) -> None:
    plain, state = run()
    held, same = run(proximal=0.1)
    assert same == state
    assert [r.accepted for r in held.rounds] == [r.accepted for r in plain.rounds]
    assert held.rounds[-1].global_.eval_loss != plain.rounds[-1].global_.eval_loss


def test_all_of_it_together_is_in_the_record(run: Run) -> None:
    record, _ = run(
        proximal=0.1, lora_dropout=0.1, weight_decay=0.01, stopping_patience=1,
        validation_every=1, others_sample=4,
    )  # fmt: skip
    for round_ in record.rounds:
        assert round_.global_.others_loss is not None
        for client in round_.clients:
            assert client.kept_steps is not None
            assert 0 <= client.kept_steps <= 3
            assert client.others_loss is not None
    assert record.summary.others_accuracy_before is not None
    assert record.summary.others_accuracy_after is not None
    assert record.summary.worst_decile_accuracy is not None
