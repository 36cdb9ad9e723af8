"""The true GPT-2-small shape, with random weights, through a whole round."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.end_to_end.conftest import pwff, read_run

pytestmark = [pytest.mark.broker, pytest.mark.slow]

ADAPTERS = 580_968  # 36 * (2*768*10 + 768 + 10)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a GPT-2-small checkpoint folder without a tokenizer."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("gpt2") / "small"
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config()).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("codec", "transport"), [("fp32", "mqtt"), ("int8", "memory")])
def test_one_round_of_two_clients_runs_end_to_end(
    codec: str, transport: str, checkpoint: Path, tmp_path: Path
) -> None:
    data, out = tmp_path / "rows.jsonl", tmp_path / "run"
    rows = [{"instruction": f"Count to {i}.", "output": f"One to {i}."} for i in range(8)]
    data.write_text("\n".join(json.dumps(row) for row in rows))
    done = pwff(
        "emulate", "--model", str(checkpoint), "--data", str(data), "--partition", "iid",
        "--clients", "2", "--rounds", "1", "--local-steps", "1", "--batch-size", "1",
        "--max-length", "48", "--workers", "1", "--codec", codec, "--transport", transport,
        "--out", str(out),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    run = read_run(out)
    assert run["model"]["parameters"] == 124_439_808
    assert {c["lora_rank"] for c in run["clients"]} == {96}
    assert {c["shared_parameters"] for c in run["clients"]} == {ADAPTERS}
    for client in run["rounds"][0]["clients"]:
        assert client["status"] == "aggregated"
        assert client["upload_parameters"] == ADAPTERS
        ratio = client["upload_bytes"] / (4 * ADAPTERS)
        assert ratio <= 0.26 if codec == "int8" else abs(ratio - 1) <= 0.01
    assert run["rounds"][0]["observed"]["peak_memory_bytes"] > run["clients"][0]["base_bytes"]
