"""Aggregation takes the same memory whatever the number of clients."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest

from cloud_aggregator.aggregation import aggregate
from cloud_aggregator.aggregation.robust import RobustSettings
from messaging.codecs import BlobHeader, encode_blob
from messaging.layout import Layout, TensorSpec
from tests.cloud_aggregator.conftest import RUN, constant, offer_of
from tests.cloud_aggregator.notes import a_spool

ENTRIES = 50_000
LAYOUT = Layout((TensorSpec(name="w", shape=(ENTRIES,)),))


def peak_bytes(folder: Path, clients: int, rule: str, robust: RobustSettings) -> int:
    """Return what aggregating so many updates of a spool takes at most."""
    spool = a_spool(folder)
    names = [f"c{i:03}" for i in range(clients)]
    for name in names:
        head = BlobHeader(
            run=RUN, round=1, sender=name, codec="fp32", layout=LAYOUT.sha256, examples=1
        )
        blob = encode_blob(constant(1.0, LAYOUT), LAYOUT, head)
        spool.partial_path(name).write_bytes(blob)
        spool.keep(offer_of(name, blob))
    state = constant(0.0, LAYOUT)
    tracemalloc.start()
    after = aggregate(
        rule,
        state,
        lambda: ((spool.update(name, LAYOUT)[1], 1) for name in names),
        LAYOUT,
        robust,
    )
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert after.tolist() == [1.0] * ENTRIES
    return peak


@pytest.mark.parametrize(
    ("rule", "robust"),
    [("mean", RobustSettings()), ("norm-clipped", RobustSettings(clip_norm=1e6))],
)
def test_one_update_is_in_memory_at_a_time(
    rule: str, robust: RobustSettings, tmp_path: Path
) -> None:
    few = peak_bytes(tmp_path / "few", 4, rule, robust)
    many = peak_bytes(tmp_path / "many", 40, rule, robust)
    assert many - few < 4 * ENTRIES  # less than one more update
