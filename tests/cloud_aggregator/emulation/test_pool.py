"""Worker processes: what becomes of one that cannot work."""

from __future__ import annotations

import queue
from pathlib import Path

from cloud_aggregator.emulation.fleet import WorkerSpec
from cloud_aggregator.emulation.pool import WorkerPool
from device_profiles.errors import InputError


def test_a_workers_bad_input_ends_the_run_with_its_sentence_and_is_not_tried_again(
    tmp_path: Path,
) -> None:
    spec = WorkerSpec(
        run="trial",
        run_folder=str(tmp_path),
        model=str(tmp_path / "nowhere"),
        binding="0" * 64,
        data="kit",
        data_sha256="0" * 64,
        stages=["instruction"],
        seed=0,
        preferences={},
        prompts=None,
        hashes={},
        trunk_precision="int8",
        placement="qkv",
        adapter_size=10,
        lora_rank=16,
        threads=1,
        chunk_bytes=122_880,
        method="pwff",
        priced=None,
        clients=[],
    )
    failures: queue.Queue[Exception] = queue.Queue()
    pool = WorkerPool([spec], "mqtt://someone:secret@127.0.0.1:1", tmp_path, failures.put)
    try:
        failure = failures.get(timeout=120)
    finally:
        pool.close()
    assert isinstance(failure, InputError)
    assert str(tmp_path / "nowhere") in str(failure)
    assert "secret" not in (tmp_path / "0.json").read_text() + (tmp_path / "0.log").read_text()
    assert failures.empty()
