"""A run of all stages whose reward models have adapters on their trunks: same bits, and no LoRA.

On a base of twelve blocks of width 16: a head holds 64 * (2*16 + 1) + 2*64 + 1 parameters, and 36
adapters of size 4 hold 36 * (2*16*4 + 16 + 4).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from cloud_aggregator.emulation.emulate import emulate
from cloud_aggregator.records import RunRecord
from cloud_aggregator.server import Aggregator
from device_profiles.config_files import read_toml
from device_profiles.errors import InputError
from device_profiles.modules import base_tensors
from edge_client.state import StateStore
from messaging.broker import embedded_kind
from quantization.identity import identify
from tests.end_to_end.conftest import comparable, read_run
from tests.end_to_end.rewards import STAGES, Made, maker

HEAD, ADAPTERS = 64 * 33 + 2 * 64 + 1, 36 * 148


@pytest.fixture(scope="module")
def made(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Return what makes the experiment of two clients with a few rows and pairs of their own."""
    folder = tmp_path_factory.mktemp("data")
    return maker(folder, model=str(tiny_checkpoint), reward_shares="adapters")


@pytest.fixture(scope="module")
def alone(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the run in this process, without a socket."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    assert emulate(made(), folder).status == "done"
    return folder


def test_heads_and_adapters_travel_in_reward_learning_and_score_in_alignment(alone: Path) -> None:
    run = read_run(alone)
    assert (run["reward_shares"], [r["stage"] for r in run["rounds"]]) == ("adapters", STAGES)
    assert all(len(r["accepted"]) == 2 for r in run["rounds"])
    sent = {r["stage"]: {c["upload_parameters"] for c in r["clients"]} for r in run["rounds"]}
    assert sent == {
        "instruction": {ADAPTERS}, "reward": {2 * (HEAD + ADAPTERS)}, "alignment": {ADAPTERS}
    }  # fmt: skip
    for round_ in run["rounds"]:
        for client in round_["clients"]:
            # four bytes a parameter and headers: one of some 600 bytes, and 64 a chunk
            assert 0 < client["uplink_bits"] - 32 * client["upload_parameters"] < 8 * 1000
            assert client["compute_seconds"] > 0  # of either round of reward learning too
    names = load_file(alone / "global" / "3" / "shared.safetensors")
    assert all(name.startswith("reward.") for name in names)
    assert sum(".trunk.adapters." in name for name in names) == 2 * 36 * 4
    assert not any("lora" in name for name in names)
    moved = [t for name, t in names.items() if name.endswith(".up.weight")]
    assert all(abs(t).max() > 0 for t in moved)
    aligned = run["rounds"][-1]["clients"]
    assert all(c["reward_helpfulness"] is not None for c in aligned)


def test_critics_and_moments_of_reward_models_stay_on_the_device(alone: Path) -> None:
    for client in (alone / "clients").iterdir():
        kept = StateStore(client).load(4)
        critics = [name for name in kept.extra if name.startswith("critic/")]
        assert critics
        assert not any(".trunk." in name for name in critics)  # the trunk's adapters are frozen


@pytest.mark.skipif(embedded_kind() is None, reason="no MQTT broker is installed")
def test_the_bits_are_the_same_over_mqtt_with_two_workers(
    made: Made, alone: Path, tmp_path: Path
) -> None:
    emulate(made(transport="mqtt", workers=2), tmp_path / "run")
    assert comparable(tmp_path / "run") == comparable(alone)


@pytest.mark.parametrize("round_", [2, 4])
def test_stopped_in_a_later_stage_and_resumed_it_ends_with_the_same_bits(
    round_: int, made: Made, alone: Path, tmp_path: Path
) -> None:
    aggregators: list[Aggregator] = []

    def stop(event: str, **fields: Any) -> None:
        if event == "update" and fields["round"] == round_:
            aggregators[0].stop()

    out = tmp_path / "run"
    stopped = emulate(made(), out, notify=stop, on_start=aggregators.append)
    assert (stopped.status, len(stopped.rounds)) == ("stopped", round_ - 1)
    done: RunRecord = emulate(made(), out, resume=True)
    assert done.status == "done"
    assert comparable(out) == comparable(alone)


def test_a_run_is_named_by_its_choice_and_not_resumed_with_another(made: Made, alone: Path) -> None:
    other = made(reward_shares="head")
    assert other.run_name != made().run_name
    assert read_toml(alone / "config.toml")["experiment"]["reward_shares"] == "adapters"
    with pytest.raises(InputError, match="reward_shares = 'head', but the run to resume has 'ad"):
        emulate(other, alone, resume=True)


def test_whole_trunks_learn_travel_as_changes_and_score_with_the_same_bits_everywhere(
    made: Made, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    how = {"reward_shares": "all", "trunk_precision": "fp32"}
    assert emulate(made(**how), tmp_path / "run").status == "done"
    run = read_run(tmp_path / "run")
    weights = sum(t.size for t in base_tensors(identify(str(tiny_checkpoint)).shape))
    sent = {c["upload_parameters"] for r in run["rounds"][1:3] for c in r["clients"]}
    assert sent == {2 * (HEAD + weights)}
    names = load_file(tmp_path / "run" / "global" / "3" / "shared.safetensors")
    changes = {n: t for n, t in names.items() if ".trunk." in n}
    assert len(changes) == 2 * len(base_tensors(identify(str(tiny_checkpoint)).shape))
    assert all(abs(t).max() > 0 for n, t in changes.items())
    assert all(c["reward_helpfulness"] is not None for c in run["rounds"][-1]["clients"])
    if embedded_kind() is None:
        pytest.skip("no MQTT broker is installed")
    emulate(made(**how, transport="mqtt", workers=2), tmp_path / "again")
    assert comparable(tmp_path / "again") == comparable(tmp_path / "run")


def test_weights_that_learn_are_held_in_fp32(made: Made, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="give trunk_precision = 'fp32'"):
        emulate(made(reward_shares="all", trunk_precision="int8"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
