"""Bad input gets one clear sentence, exit code 2 (or 1 where the run failed), and loses nothing."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from tests.end_to_end.conftest import pwff


def refused(*arguments: str) -> str:
    """Run ``pwff emulate`` with bad input and return its sentence."""
    done = pwff("emulate", "--transport", "memory", *arguments)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def test_a_missing_data_file_is_named(tmp_path: Path) -> None:
    assert "nowhere.json" in refused("--data", str(tmp_path / "nowhere.json"))


def test_a_malformed_data_file_is_named_with_its_first_broken_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [json.dumps({"instruction": "Say it", "output": "it"})] * 3 + ["{broken"] * 7
    path.write_text("\n".join(rows))
    said = refused("--data", str(path))
    assert "7 of 10" in said
    assert "line 4" in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--method", "pwf"], ["pwf", "pwff"]),
        (["--fleet", "mixd"], ["mixd", "mixed"]),
        (["--lora-count", "11"], ["11", "12", "36"]),
        (["--lora-count", "37"], ["37", "12", "36"]),
        (["--adapter-count", "35"], ["35", "36"]),
        (["--lora-rank", "129"], ["129", "128"]),
        (["--codec", "int5"], ["int5", "int8"]),
        (["--partition", "dirichle"], ["dirichle", "dirichlet"]),
        (["--alpha", "0"], ["alpha"]),
        (["--quorum", "0"], ["quorum"]),
        (["--precision", "int5"], ["precision", "int5", "int8"]),
        (["--model", "./nowhere"], ["nowhere"]),
        (["--priced-at", "gpt2"], ["priced_at", "gpt2", "gpt2-small"]),
        (["--priced-lora-rank", "8"], ["priced_lora_rank", "8", "priced_at"]),
        (["--priced-at", "gpt2-small", "--priced-lora-rank", "769"], ["769", "768"]),
        (["--stages", "instruction,alignment"], ["stages", "alignment", "reward"]),
        (["--stages", "rewards"], ["stages", "rewards", "instruction"]),
        (["--rounds", "6,4"], ["rounds", "6,4", "instruction"]),
        (
            ["--stages", "instruction,reward", "--helpfulness", "nowhere.jsonl"],
            ["nowhere.jsonl", "kit"],
        ),
        (["--resume"], ["--out"]),
    ],
)
def test_a_wrong_value_is_told_with_what_would_do(arguments: list[str], words: list[str]) -> None:
    said = refused(*arguments)
    assert all(word in said for word in words), said


def test_an_unknown_key_of_an_experiment_is_told_with_the_nearest(tmp_path: Path) -> None:
    path = tmp_path / "experiment.toml"
    path.write_text("roundz = 3\n")
    said = refused(str(path))
    assert "roundz" in said
    assert "rounds" in said


def test_an_unknown_profile_of_a_fleet_is_told_with_the_nearest(tmp_path: Path) -> None:
    path = tmp_path / "fleet.toml"
    path.write_text('[[member]]\nprofile = "raspberry-pi-5"\nshare = 1.0\n')
    said = refused("--fleet", str(path))
    assert "raspberry-pi-5-8gb" in said


def test_a_partition_that_leaves_a_client_empty_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"instruction": f"Say {i}", "output": f"word {i}"} for i in range(12)]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    assert "10" in refused("--data", str(path), "--partition", "iid", "--clients", "10")


def test_a_broker_that_is_not_there_ends_the_run_after_its_wait(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: nobody answers there
        url = f"mqtt://127.0.0.1:{taken.getsockname()[1]}"
        done = pwff(
            "emulate", "--broker", url, "--broker-wait-seconds", "1", "--out", str(tmp_path / "r")
        )
    assert done.returncode == 1, done.stdout + done.stderr
    assert url in done.stderr
    assert "1 s" in done.stderr


def test_a_broker_address_that_is_none_is_refused() -> None:
    done = pwff("emulate", "--broker", "http://127.0.0.1:1883")
    assert done.returncode == 2
    assert "mqtt://" in done.stderr


def test_a_folder_that_holds_a_run_is_not_written_over(undisturbed: Path) -> None:
    before = (undisturbed / "run.json").read_bytes()
    assert "--resume" in refused("--out", str(undisturbed))
    assert (undisturbed / "run.json").read_bytes() == before


def test_a_run_is_not_resumed_with_another_seed(undisturbed: Path) -> None:
    assert "seed" in refused("--resume", "--out", str(undisturbed), "--seed", "5")


def test_a_report_of_no_run_is_refused(tmp_path: Path) -> None:
    done = pwff("report", str(tmp_path))
    assert done.returncode == 2
    assert "run" in done.stderr


def test_a_port_that_is_taken_is_told_with_another_way(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = pwff("emulate", "--broker-port", str(port), "--out", str(tmp_path / "r"))
    assert done.returncode == 2, done.stdout + done.stderr
    assert f"port {port}" in done.stderr
    assert "--broker" in done.stderr


def test_a_run_is_not_resumed_on_data_that_changed(tmp_path: Path) -> None:
    data, out = tmp_path / "rows.jsonl", tmp_path / "run"
    rows = [{"instruction": f"Say {i}", "output": f"word {i}"} for i in range(12)]
    data.write_text("\n".join(json.dumps(row) for row in rows))
    arguments = ["--transport", "memory", "--out", str(out)]
    small = ["--clients", "2", "--rounds", "1", "--local-steps", "1", "--partition", "iid"]
    done = pwff("emulate", *small, "--data", str(data), *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    kept = (out / "config.toml").read_bytes()
    data.write_text("\n".join(json.dumps(row) for row in rows[::-1]))
    assert "data" in refused("--resume", "--out", str(out))
    assert (out / "config.toml").read_bytes() == kept
