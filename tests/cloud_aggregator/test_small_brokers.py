"""Whole rounds over a real mosquitto that takes little: small packets, a queue of ten messages."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from cloud_aggregator.methods import METHODS, ModuleShape, stage_layout
from cloud_aggregator.run_folder import RunFolder
from cloud_aggregator.server import Aggregator
from cloud_aggregator.store import Store
from device_profiles.modules import BaseShape, initial_adapters
from edge_client.host import Host
from messaging.broker import HOST, find_mosquitto, free_port
from messaging.chunks import CHUNK_BYTES
from messaging.mqtt import MqttNetwork
from messaging.transfer import UploadLimits
from tests.cloud_aggregator.conftest import (
    BINDING,
    LIMIT,
    RUN,
    Events,
    Teacher,
    record_of,
    settings_of,
)

pytestmark = [
    pytest.mark.broker,
    pytest.mark.skipif(find_mosquitto() is None, reason="mosquitto is not installed here"),
]

#: Twelve adapters of 2*256*16 + 16 + 256 parameters: 101,568, or 406,272 bytes.
BASE = BaseShape(layers=4, width=256, inner=1024)
LARGE = ModuleShape(base=BASE, adapter_size=16, placement="qkv", lora_rank=2)
LAYOUT = stage_layout("instruction", METHODS["pwff"], LARGE)


@contextmanager
def mosquitto(folder: Path, *settings: str) -> Iterator[MqttNetwork]:
    """Run a mosquitto with its defaults but for these lines of configuration."""
    port, config = free_port(), folder / "mosquitto.conf"
    config.write_text("\n".join([f"listener {port} {HOST}", "allow_anonymous true", *settings]))
    with subprocess.Popen(
        [find_mosquitto() or "mosquitto", "-c", str(config)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as broker:
        try:
            network = MqttNetwork(f"mqtt://{HOST}:{port}")
            network.require(LIMIT)
            yield network
        finally:
            broker.terminate()


@pytest.mark.parametrize(
    "lines",
    [
        ("max_packet_size 65536",),
        ("max_queued_messages 10", "max_inflight_messages 4"),
    ],
    ids=["packets of 64 KB", "a queue of ten"],
)
def test_rounds_on_a_broker_that_takes_little_lose_nothing(
    lines: tuple[str, ...], tmp_path: Path
) -> None:
    assert LAYOUT.size == 101_568
    teachers = [Teacher(name, 1.0, layout=LAYOUT) for name in "abc"]
    for teacher in teachers:
        teacher.setup = replace(teacher.setup, chunk_bytes=CHUNK_BYTES)
    with (
        mosquitto(tmp_path, *lines) as network,
        ThreadPoolExecutor(1) as thread,
        Store(tmp_path / "run", RUN) as store,
    ):
        host = Host(network, teachers, binding=BINDING)
        running = thread.submit(host.run)
        try:
            record = Aggregator(
                settings_of(
                    layout=LAYOUT,
                    modules=LARGE,
                    chunk_bytes=CHUNK_BYTES,
                    limits=UploadLimits(grants=2, window=4),
                ),
                record_of(),
                RunFolder(tmp_path / "run"),
                network,
                store=store,
                notify=Events(),
                memory=lambda: 1,
            ).run()
        finally:
            host.stop()
            running.result(LIMIT)
    assert [r.accepted for r in record.rounds] == [["a", "b", "c"]] * 2
    assert [r.observed.refused for r in record.rounds] == [{}, {}]
    once = LAYOUT.pack(initial_adapters(BASE, 16, 7)) + np.float32(1)
    path = tmp_path / "run" / "global" / "2" / "shared.safetensors"
    assert LAYOUT.pack(load_file(path)).tobytes() == (once + np.float32(1)).tobytes()
