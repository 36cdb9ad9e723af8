"""What ``docs/rewards.md`` says of uploads is what the project computes."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from device_profiles.airtime import expected_upload
from device_profiles.link import PAPER_LINK
from device_profiles.methods import METHODS, ModuleShape
from device_profiles.pricing import PRICED_SHAPES
from edge_client.costs import stage_layout
from messaging.chunks import CHUNK_BYTES, wire_bytes
from messaging.codecs import CODECS

PAGE = Path(__file__).parents[3] / "docs" / "rewards.md"


def test_bytes_and_airtime_of_every_choice_are_those_of_the_layout_and_the_papers_link() -> None:
    base, _ = PRICED_SHAPES["gpt2-small"]
    assert (PAPER_LINK.snr_db, PAPER_LINK.bandwidth_hz) == (5.0, 1e6)
    said, computed = [], []
    for line in PAGE.read_text().splitlines():
        cells = [cell.strip(" `") for cell in line.strip("|").split("|")]
        if len(cells) != 5 or cells[2] not in CODECS:
            continue
        said.append(cells)
        modules = ModuleShape(
            base=base,
            adapter_size=10,
            placement="qkv",
            lora_rank=96,
            reward_shares=cells[0],  # type: ignore[arg-type]  # of the page
        )
        layout = stage_layout("reward", METHODS["pwff"], modules)
        arrays = CODECS[cells[2]].arrays(layout).values()
        size = sum(np.dtype(kind).itemsize * math.prod(shape) for kind, shape in arrays)
        seconds = expected_upload(8 * wire_bytes(size, CHUNK_BYTES), PAPER_LINK).seconds
        computed.append([cells[0], f"{layout.size:,}", cells[2], f"{size:,}", f"{seconds:.1f} s"])
    assert len(said) == 6
    assert said == computed
