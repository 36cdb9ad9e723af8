"""Instruction tuning, reward learning and alignment in one run: emulated, deployed, disturbed."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from edge_client.data.instructions import kit_file
from edge_client.state import StateStore
from tests.end_to_end.conftest import await_line, comparable, pwff, read_run, start
from tests.end_to_end.test_deployment import (
    _no_process_is_left,
    a_client,
    a_cloud,
    finish,
    processes,
)

__all__ = ["_no_process_is_left", "processes"]  # fixtures

pytestmark = pytest.mark.broker

STAGES = "instruction,reward,alignment"
SMALL = [
    "--stages", STAGES, "--clients", "2", "--rounds", "1,2,2", "--local-steps", "1,5,1",
    "--batch-size", "2", "--max-length", "96", "--rollouts", "4", "--max-new-tokens", "8",
    "--held-out-prompts", "2",
]  # fmt: skip

CLOUD_SECTIONS = """
[reward]
rounds = 1
local_steps = 5

[alignment]
rounds = 1
local_steps = 1

[alignment.settings]
rollouts = 4
max_new_tokens = 8
held_out_prompts = 2
"""


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return files of a few of the kit's pairs, by objective."""
    folder = tmp_path_factory.mktemp("pairs")
    files = {}
    for objective in ("helpfulness", "harmlessness"):
        lines = kit_file(f"{objective}_preferences.jsonl").read_text().splitlines()
        sides: dict[str, list[str]] = {"train": [], "held_out": []}
        for line in lines:
            sides[json.loads(line)["split"]].append(line)
        path = folder / f"{objective}.jsonl"
        path.write_text("\n".join([*sides["train"][:16], *sides["held_out"][:6]]) + "\n")
        files[objective] = str(path)
    return files


@pytest.fixture(scope="module")
def small(pairs: dict[str, str]) -> list[str]:
    """Return what makes a small run of all stages."""
    return [*SMALL, "--helpfulness", pairs["helpfulness"], "--harmlessness", pairs["harmlessness"]]


@pytest.fixture(scope="module")
def three_stages(small: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a small run of all stages without a socket."""
    folder = tmp_path_factory.mktemp("stages") / "run"
    done = pwff("emulate", *small, "--transport", "memory", "--out", str(folder))
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_one_command_runs_all_three_stages(three_stages: Path) -> None:
    run = read_run(three_stages)
    assert (run["status"], run["stages"]) == ("done", STAGES.split(","))
    assert [(r["round"], r["stage"]) for r in run["rounds"]] == [
        (1, "instruction"), (2, "reward"), (3, "reward"), (4, "alignment"), (5, "alignment"),
    ]  # fmt: skip
    assert all(len(r["accepted"]) == 2 for r in run["rounds"])
    # two heads on width 128: 64 units on 2*128 + 1 features, a bias each, and an output
    heads = 2 * (64 * 257 + 64 + 64 + 1)
    sent = {r["stage"]: {c["upload_parameters"] for c in r["clients"]} for r in run["rounds"]}
    assert sent == {"instruction": {97_128}, "reward": {heads}, "alignment": {97_128}}
    learned, aligned = run["rounds"][2], run["rounds"][4]
    assert all(set(c["pairs"]) == {"helpfulness", "harmlessness"} for c in learned["clients"])
    assert all(c["reward_accuracy"] is not None for c in learned["clients"])
    for key in ("reward_helpfulness", "reward_harmlessness", "kl", "eval_accuracy"):
        assert all(c[key] is not None for c in aligned["clients"])
    assert run["summary"]["weighted_reward_after"] is not None


def test_critics_lora_and_the_stage_1_policy_stay_on_the_device(three_stages: Path) -> None:
    for client in (three_stages / "clients").iterdir():
        kept = StateStore(client).load(5)
        assert any("lora_A" in name for name in kept.personal)
        assert any(name.startswith("critic/") for name in kept.extra)
        assert (client / "stage-1.safetensors").exists()
    for path in three_stages.glob("global/*/shared.safetensors"):
        names = load_file(path)
        assert not any("lora" in name or "critic" in name for name in names)


def test_the_bits_are_the_same_over_mqtt_with_two_workers(
    broker: str, small: list[str], three_stages: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    done = pwff("emulate", *small, "--broker", broker, "--workers", "2", "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    assert comparable(out) == comparable(three_stages)


@pytest.mark.parametrize("line", ["round 2/5", "round 4/5"])
def test_interrupted_in_a_later_stage_it_ends_with_the_same_bits(
    line: str, small: list[str], three_stages: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    process = start("emulate", *small, "--out", str(out))
    await_line(process, lambda said: said.startswith(line))
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 130, said
    done = pwff("emulate", "--resume", "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    assert comparable(out) == comparable(three_stages)


def deployed(
    folder: Path,
    url: str,
    pairs: dict[str, str],
    processes: list[subprocess.Popen[str]],
    killed_at: list[str],
) -> dict[str, str]:
    """Do a run of one device, which is killed and started again at these lines of the cloud.

    Returns:
        The hash of each global state.
    """
    folder.mkdir()
    config = Path(
        a_cloud(folder, url, clients=1, minimum_clients=1, rounds=1, stages=STAGES, run=folder.name)
    )
    config.write_text(config.read_text() + CLOUD_SECTIONS)
    own = a_client(
        "laptop.toml", folder, url, "laptop-1", stages=STAGES, run=folder.name,
        helpfulness_data=pairs["helpfulness"], harmlessness_data=pairs["harmlessness"],
    )  # fmt: skip
    cloud, device = start("aggregator", "--config", str(config)), start("client", "--config", own)
    processes += [cloud, device]
    for line in killed_at:
        await_line(cloud, lambda said, wanted=line: said.startswith(wanted))  # type: ignore[misc]
        device.send_signal(signal.SIGKILL)
        device.wait(60)
        device = start("client", "--config", own)
        processes.append(device)
    finish(cloud)
    finish(device)
    run = read_run(folder / "run")
    assert [(r["stage"], r["accepted"]) for r in run["rounds"]] == [
        (stage, ["laptop-1"]) for stage in STAGES.split(",")
    ]
    return {
        path.parent.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in (folder / "run").glob("global/*/shared.safetensors")
    }


def test_a_device_killed_in_each_stage_goes_on_to_the_same_bits(
    broker: str, pairs: dict[str, str], tmp_path: Path, processes: list[subprocess.Popen[str]]
) -> None:
    undisturbed = deployed(tmp_path / "one", broker, pairs, processes, [])
    stages = ["before: held-out acc", "before: held-out pair", "before: weighted"]
    assert deployed(tmp_path / "two", broker, pairs, processes, stages) == undisturbed
