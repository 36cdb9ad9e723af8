"""Shipped experiments by name, and a sweep from one command."""

from __future__ import annotations

from pathlib import Path

from tests.end_to_end.conftest import pwff, read_run


def test_the_shipped_experiments_are_listed() -> None:
    done = pwff("emulate", "--list")
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == [
        "bad-links", "jetson-and-phones", "paper-consistent", "paper-literal", "straggler-storm",
        "thousand-devices",
    ]  # fmt: skip


def test_a_shipped_experiment_runs_by_its_name_over_a_sweep(tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    done = pwff(
        "emulate", "paper-literal", "--clients", "2", "--rounds", "1", "--local-steps", "1",
        "--transport", "memory", "--sweep", "codec=fp32,int8", "--out", str(out),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    runs = [read_run(path.parent) for path in sorted(out.glob("runs/*/run.json"))]
    assert [run["codec"] for run in runs] == ["fp32", "int8"]
    assert (out / "comparison.html").exists()


def test_a_wrong_sweep_is_refused_before_anything_starts(tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    done = pwff("emulate", "--sweep", "alhpa=1", "--out", str(out))
    assert done.returncode == 2, done.stdout + done.stderr
    assert "alpha" in done.stderr
    assert not out.exists()
