"""A sweep: which runs it has, what is refused before any begins, and what comes of them."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cloud_aggregator.experiment import Experiment
from cloud_aggregator.records import RunRecord
from cloud_aggregator.reproduce.folder import folder_of
from cloud_aggregator.sweep import Axis, SweptRun, plan_sweep, read_axis
from cloud_aggregator.sweep_report import tabulate
from cloud_aggregator.sweep_run import run_sweep
from device_profiles.errors import InputError
from tests.cloud_aggregator.reports.conftest import make_run


def planned(*sweep: str, seeds: int = 1, **options: Any) -> list[SweptRun]:
    return plan_sweep(None, options, [read_axis(text) for text in sweep], seeds)


def refusal(*sweep: str, seeds: int = 1, **options: Any) -> str:
    with pytest.raises(InputError) as told:
        planned(*sweep, seeds=seeds, **options)
    return str(told.value)


def test_an_axis_is_a_key_and_its_values() -> None:
    assert read_axis("lora-rank = 8, 16") == Axis(key="lora_rank", values=("8", "16"))


def test_values_with_commas_stand_between_semicolons() -> None:
    axis = read_axis("stages=instruction;instruction,reward")
    assert axis.values == ("instruction", "instruction,reward")


def test_every_combination_runs_at_every_seed_in_a_folder_named_by_its_values() -> None:
    runs = planned("alpha=0.1,10", "method=pwff,fedlora", seeds=2, seed=4, clients=3)
    assert [run.name for run in runs] == [
        f"alpha={alpha},method={method},seed={seed}"
        for seed in (4, 5)
        for alpha in ("0.1", "10")
        for method in ("pwff", "fedlora")
    ]
    last = runs[-1].experiment
    assert (last.alpha, last.method, last.seed, last.clients) == (10.0, "fedlora", 5, 3)


def test_seeds_alone_are_a_sweep_of_one_setting() -> None:
    assert [run.name for run in planned(seeds=2)] == ["seed=0", "seed=1"]


def test_a_folders_name_holds_no_separator() -> None:
    (run,) = planned("data=/some where/rows.jsonl")
    assert run.name == "data=-some-where-rows.jsonl,seed=0"


@pytest.mark.parametrize(
    ("sweep", "words"),
    [
        (["alhpa=1,2"], ["alhpa", "did you mean 'alpha'"]),
        (["alpha=0.1,-1"], ["alpha = '-1'"]),
        (["method=pwff,fedlra"], ["fedlra", "fedlora"]),
        (["alpha"], ["KEY=V,V"]),
        (["=1"], ["KEY=V,V"]),
        (["alpha=1,,2"], ["empty place"]),
        (["alpha=1,1"], ["'1' twice"]),
        (["alpha=1,1.0"], ["same run"]),
        (["alpha=1", "alpha=2"], ["alpha twice"]),
        (["seed=1,2"], ["--seeds"]),
        (["workers=1,2"], ["workers", "how a run is done"]),
        (["cohort=3,11"], ["cohort = 11", "clients = 10"]),
    ],
)
def test_a_wrong_sweep_is_told(sweep: list[str], words: list[str]) -> None:
    said = refusal(*sweep)
    assert all(word in said for word in words), said


def test_a_setting_is_swept_or_given_but_not_both() -> None:
    assert "alpha is swept" in refusal("alpha=1,2", alpha="3")


@pytest.mark.parametrize("seeds", [0, 101])
def test_seeds_have_bounds(seeds: int) -> None:
    assert "1 to 100" in refusal(seeds=seeds)


def test_rounds_may_be_swept_though_a_resumed_run_may_change_them() -> None:
    assert [run.experiment.rounds for run in planned("rounds=2,4")] == [2, 4]


def record(accuracy: float, seed: int) -> RunRecord:
    """Return a run of one client that ends at an accuracy, percent."""
    return make_run({"a": [0.1, accuracy / 100]}, seed=seed)


def cell(found: dict[str, dict[int, RunRecord]], row: int, kind: str) -> str:
    """Return what a table has of accuracy in a row."""
    swept = tabulate(found)
    names = [measure.name for measure in swept.measures]
    cells: tuple[str, ...] = getattr(swept.rows[row], kind)
    return cells[names.index("eval_accuracy_percent")]


def test_mean_and_spread_are_over_the_seeds() -> None:
    found = {"a": {0: record(20.0, 0), 1: record(24.0, 1)}}
    # mean 22; sample standard deviation sqrt(2**2 + 2**2)
    assert cell(found, 0, "figures") == "22.00 ± 2.83"


def test_differences_are_paired_by_seed() -> None:
    found = {
        "a": {0: record(20.0, 0), 1: record(30.0, 1)},
        "b": {0: record(21.0, 0), 1: record(31.5, 1), 2: record(90.0, 2)},
    }
    # 1 and 1.5 where the seeds match: mean 1.25, spread 0.25 * sqrt(2); unpaired, 22.5
    assert cell(found, 1, "differences") == "+1.25 ± 0.35 *"


def test_a_difference_with_either_sign_does_not_count() -> None:
    found = {
        "a": {0: record(20.0, 0), 1: record(30.0, 1)},
        "b": {0: record(23.0, 0), 1: record(29.0, 1)},
    }
    assert cell(found, 1, "differences") == "+1.00 ± 2.83"


def test_without_a_seed_in_common_there_is_no_difference() -> None:
    found = {"a": {0: record(20.0, 0)}, "b": {1: record(30.0, 1)}}
    assert cell(found, 1, "differences") == "-"


@pytest.fixture
def options(tiny_checkpoint: Path, tmp_path: Path) -> dict[str, Any]:
    """Return the least that is a run: two clients, one round of one step on a tiny base."""
    rows = tmp_path / "rows.jsonl"
    lines = [{"instruction": f"Name {n}", "output": f"It is {n}"} for n in range(12)]
    rows.write_text("\n".join(map(json.dumps, lines)))
    return {
        "model": str(tiny_checkpoint), "data": str(rows), "clients": 2, "rounds": 1,
        "local_steps": 1, "partition": "iid", "transport": "memory",
    }  # fmt: skip


def sweep_into(out: Path, options: dict[str, Any], *sweep: str, seeds: int = 1) -> str:
    """Do a sweep and return what it said."""
    said = io.StringIO()
    console = Console(file=said, width=200)
    run_sweep(console, None, options, sweep=sweep, seeds=seeds, out=out)
    return said.getvalue()


def marks(out: Path) -> dict[str, tuple[bytes, int]]:
    """Return the records by folder: their bytes, and when they were written."""
    paths = sorted(out.glob("runs/*/run.json"))
    return {p.parent.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in paths}


def test_a_sweep_ends_with_a_comparison_and_does_no_run_twice(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    out = tmp_path / "sweep"
    said = sweep_into(out, options, "codec=fp32,int8")
    assert "run 2 of 2: codec=int8, seed 0" in said
    before = marks(out)
    assert set(before) == {"codec=fp32,seed=0", "codec=int8,seed=0"}
    page = (out / "comparison.html").read_text()
    assert "Difference from codec=fp32" in page
    (full, small) = csv.DictReader(io.StringIO((out / "sweep.csv").read_text()))
    assert (full["setting"], small["setting"]) == ("codec=fp32", "codec=int8")
    # a quarter of the bytes, and headers of a few kB on a base of width 16
    assert float(small["upload_megabytes"]) < 0.6 * float(full["upload_megabytes"])

    again = sweep_into(out, options, "codec=fp32,int8")
    assert "2 of 2 runs are there already" in again
    assert marks(out) == before


def test_a_run_that_broke_off_goes_on(tmp_path: Path, options: dict[str, Any]) -> None:
    out = tmp_path / "sweep"
    sweep_into(out, options)
    (done,) = marks(out).values()
    longer = sweep_into(out, {**options, "rounds": 2})
    assert "it goes on after round 1" in longer
    (after,) = marks(out).values()
    assert json.loads(after[0])["rounds"][0] == json.loads(done[0])["rounds"][0]
    assert len(json.loads(after[0])["rounds"]) == 2


def test_what_is_wrong_with_a_later_run_is_told_before_the_first_begins(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    out = tmp_path / "sweep"
    del options["clients"]
    with pytest.raises(InputError, match="clients=20, seed 0"):  # of 12 rows
        sweep_into(out, options, "clients=2,20")
    assert not out.exists()


def test_a_run_with_other_settings_is_not_taken_for_done(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    out = tmp_path / "sweep"
    sweep_into(out, options)
    before = marks(out)
    with pytest.raises(InputError, match="local_steps = 2, but the run to resume has 1"):
        sweep_into(out, {**options, "local_steps": 2})
    assert marks(out) == before


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path, options: dict[str, Any]) -> None:
    (tmp_path / "kept").write_text("mine")
    with pytest.raises(InputError, match="holds something else"):
        sweep_into(tmp_path, options)


def test_a_sweeps_runs_are_experiments_like_others() -> None:
    (run,) = planned()
    assert run.experiment == Experiment()
    assert folder_of(Path("out"), run).path == Path("out/runs/seed=0")
