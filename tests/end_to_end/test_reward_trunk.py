"""A run of all stages whose reward models read an encoder: same bits, critics on the base.

On a base of twelve blocks of width 16 and an encoder of width 8, whose head holds
64 * (2*8 + 1) + 2*64 + 1 parameters.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from cloud_aggregator.emulation.emulate import emulate
from cloud_aggregator.server import Aggregator
from device_profiles.errors import InputError
from edge_client.state import StateStore
from messaging.broker import embedded_kind
from quantization.errors import BaseModelError
from tests.edge_client.reward.encoders import write_encoder
from tests.end_to_end.conftest import comparable, read_run
from tests.end_to_end.rewards import STAGES, Made, maker

HEAD = 64 * 17 + 2 * 64 + 1


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("encoders") / "bert", positions=128, letters=True)


@pytest.fixture(scope="module")
def made(tiny_checkpoint: Path, encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Return what makes the experiment of two clients with a few rows and pairs of their own."""
    folder = tmp_path_factory.mktemp("data")
    return maker(folder, model=str(tiny_checkpoint), reward_trunk=str(encoder))


@pytest.fixture(scope="module")
def alone(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the run in this process, without a socket."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    assert emulate(made(), folder).status == "done"
    return folder


def test_heads_on_the_encoder_travel_and_score_and_critics_read_the_base(
    alone: Path, encoder: Path
) -> None:
    run = read_run(alone)
    assert [r["stage"] for r in run["rounds"]] == STAGES
    assert (run["encoder"]["name"], run["encoder"]["width"]) == (encoder.name, 8)
    sent = {r["stage"]: {c["upload_parameters"] for c in r["clients"]} for r in run["rounds"]}
    assert sent["reward"] == {2 * HEAD}
    assert run["rounds"][-1]["global"]["weighted_reward"] is not None
    for client in run["clients"]:
        assert client["scoring"].startswith(f"int8+{run['encoder']['sha256'][:24]}:")
        state = StateStore(alone / "clients" / client["id"]).load(4)
        critics = {n: t.shape for n, t in state.extra.items() if n.endswith("inner.weight")}
        assert critics
        assert set(critics.values()) == {(64, 2 * 16 + 1)}


def test_reading_the_encoder_is_paid_for_once_a_run(alone: Path) -> None:
    """The second round of reward learning reads nothing; with the base both cost nothing else."""
    first, second = (
        [c["compute_seconds"] for c in r["clients"]] for r in read_run(alone)["rounds"][1:3]
    )
    assert all(seconds > 0 for seconds in first)
    assert second == [0.0, 0.0]


@pytest.mark.skipif(embedded_kind() is None, reason="no MQTT broker is installed")
def test_the_bits_are_the_same_over_mqtt_with_two_workers(
    made: Made, alone: Path, tmp_path: Path
) -> None:
    emulate(made(transport="mqtt", workers=2), tmp_path / "run")
    assert comparable(tmp_path / "run") == comparable(alone)


def test_stopped_and_resumed_it_ends_with_the_same_bits_and_only_with_its_encoder(
    made: Made, alone: Path, encoder: Path, tmp_path: Path
) -> None:
    aggregators: list[Aggregator] = []

    def stop(event: str, **fields: Any) -> None:
        if event == "update" and fields["round"] == 3:
            aggregators[0].stop()

    out, moved = tmp_path / "run", tmp_path / "bert"
    shutil.copytree(encoder, moved)
    experiment = made(reward_trunk=str(moved))
    stopped = emulate(experiment, out, notify=stop, on_start=aggregators.append)
    assert (stopped.status, len(stopped.rounds)) == ("stopped", 2)
    shutil.rmtree(moved)
    write_encoder(moved, positions=128, letters=True, seed=3)
    with pytest.raises(InputError, match="the reward_trunk is not what the run in"):
        emulate(experiment, out, resume=True)
    shutil.rmtree(moved)
    shutil.copytree(encoder, moved)
    assert emulate(experiment, out, resume=True).status == "done"
    (record, states), (wanted, wanted_states) = comparable(out), comparable(alone)
    assert (record["rounds"], states) == (wanted["rounds"], wanted_states)


def test_a_run_is_named_by_its_trunk(made: Made) -> None:
    assert made(reward_trunk="base").run_name != made().run_name


@pytest.mark.parametrize(
    ("how", "error", "said"),
    [
        ({"reward_trunk": "./nowhere"}, BaseModelError, "no such folder"),
        ({"reward_shares": "adapters"}, InputError, "only the base changes"),
    ],
)
def test_what_cannot_be_the_trunk_is_refused_before_anything_is_written(
    how: dict[str, str], error: type[Exception], said: str, made: Made, tmp_path: Path
) -> None:
    with pytest.raises(error, match=said):
        emulate(made(**how), tmp_path / "run")
    assert not (tmp_path / "run").exists()
