"""Real runs on a tiny base: what is done stays, what broke off goes on, Ctrl-C stops in order."""

from __future__ import annotations

import io
import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from rich.console import Console

from cloud_aggregator.records import RunRecord
from cloud_aggregator.reproduce.command import reproduce
from cloud_aggregator.reproduce.fig4 import PlannedRun, Settings, plan
from cloud_aggregator.reproduce.folder import folder_of, record_of
from cloud_aggregator.reproduce.runner import Interruption, RunsView, StoppedError, carry_out
from tests.cloud_aggregator.reproduce.conftest import write_run

WIDTH = 16  # of the tiny base
HOW = {"transport": "memory"}
ROWS = 40  # for ten clients
Settle = Callable[..., Settings]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Return a small data file, without categories."""
    path = tmp_path / "rows.jsonl"
    lines = [
        {"instruction": f"Name {n} after {n % 7}", "output": f"It is {n}"} for n in range(ROWS)
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


@pytest.fixture
def settled(tiny_checkpoint: Path, rows: Path) -> Settle:
    """Return settings of one round and one step on the tiny base."""

    def settle(**changes: object) -> Settings:
        fields = {
            "seeds": (0,), "rounds": 1, "local_steps": 1, "model": str(tiny_checkpoint),
            "data": str(rows), "methods": ("pwff", "fedada"), "experiments": ("paper-literal",),
        }  # fmt: skip
        return Settings.model_validate({**fields, **changes})

    return settle


class Log(io.StringIO):
    """A log that sends this process Ctrl-C once it reads certain words."""

    def __init__(self, words: str) -> None:
        super().__init__()
        self._words = words

    def write(self, text: str) -> int:
        """Take a piece of the log."""
        if self._words in text:
            signal.raise_signal(signal.SIGINT)
        return super().write(text)


def records(out: Path, runs: list[PlannedRun]) -> dict[str, RunRecord | None]:
    """Return the records by method."""
    return {run.experiment.method: record_of(out, run) for run in runs}


def test_runs_are_done_once_and_taken_on_to_more_rounds(tmp_path: Path, settled: Settle) -> None:
    out = tmp_path / "fig4"
    runs = plan(settled(), WIDTH, HOW)
    log = io.StringIO()
    carry_out(runs, out, Console(file=log, width=200))
    assert "run 1 of 2: pwff, seed 0, paper-literal" in log.getvalue()
    files = [folder_of(out, run).record_path for run in runs]
    before = [(path.read_bytes(), path.stat().st_mtime_ns) for path in files]

    again = io.StringIO()
    carry_out(runs, out, Console(file=again, width=200))
    assert again.getvalue() == "2 of 2 runs are there already\n"
    assert [(path.read_bytes(), path.stat().st_mtime_ns) for path in files] == before

    longer = plan(settled(rounds=2, methods=("pwff",)), WIDTH, HOW)
    assert [run.name for run in longer] == [runs[0].name]
    first = record_of(out, longer[0])
    more = io.StringIO()
    carry_out(longer, out, Console(file=more, width=200))
    last = record_of(out, longer[0])
    assert "it goes on after round 1" in more.getvalue()
    assert first is not None
    assert last is not None
    assert (len(last.rounds), last.status) == (2, "done")
    assert last.rounds[0] == first.rounds[0]


def test_interrupted_it_says_how_to_go_on_and_then_does(tmp_path: Path, settled: Settle) -> None:
    out = tmp_path / "fig4"
    runs = plan(settled(), WIDTH, HOW)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(StoppedError, match=f"run 2 of 2.*--out {out}") as stopped:
        carry_out(runs, out, Console(file=Log("run 2 of 2"), width=200))
    assert stopped.value.exit_code == 130
    assert signal.getsignal(signal.SIGINT) is handler
    found = records(out, runs)
    assert found["pwff"] is not None
    assert found["fedada"] is not None
    assert (found["pwff"].status, found["fedada"].status) == ("done", "stopped")
    assert found["fedada"].rounds == []

    carry_out(runs, out, Console(file=io.StringIO()))
    assert {r.status for r in records(out, runs).values() if r is not None} == {"done"}


def invoke(*arguments: str) -> Result:
    """Call ``pwff reproduce`` in this process."""
    return CliRunner().invoke(reproduce, arguments)


def refused(*arguments: str) -> str:
    """Call ``pwff reproduce fig4`` with bad input and return its sentence."""
    done = invoke("fig4", *arguments)
    assert getattr(done.exception, "exit_code", None) == 2, done.output
    return str(done.exception)


def test_the_command_does_everything_and_goes_on_by_its_folder(
    tmp_path: Path, tiny_checkpoint: Path, rows: Path
) -> None:
    out = tmp_path / "fig4"
    done = invoke(
        "fig4", "--out", str(out), "--seeds", "0", "--rounds", "1", "--local-steps", "1",
        "--model", str(tiny_checkpoint), "--data", str(rows), "--methods", "vanilla-fl,pwff",
        "--transport", "memory", "--quick",
    )  # fmt: skip
    assert done.exception is None, done.output
    assert "run 4 of 4" in done.output
    for name in ("fig4.svg", "fig4.png", "fig4.csv", "fig4.md"):
        assert (out / name).stat().st_size > 0

    again = invoke("fig4", "--out", str(out), "--render-only", "--json")
    assert again.exception is None, again.output
    told = json.loads(again.stdout)
    assert told["quick"] is True
    literal, consistent = (told["experiments"][n] for n in ("paper-literal", "paper-consistent"))
    assert literal["missing"] == consistent["missing"] == []
    # 36 adapters of size 10 at width 768 in fp32, and LoRA of rank 96 or 8 on 36 squares beside
    adapters, factors = 32 * 580_968, 32 * 36 * 2 * 768
    for found, rank in ((literal, 96), (consistent, 8)):
        ours, theirs = (found["methods"][m]["uplink_bits"] for m in ("pwff", "vanilla-fl"))
        # above it only headers: below 0.1 % of the smallest upload
        assert 0 < ours / adapters - 1 < 1e-3
        assert 0 < theirs / (adapters + rank * factors) - 1 < 1e-3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--methods", "pwff,fedlra"], ["fedlra", "fedlora"]),
        (["--experiments", "paper-litral"], ["paper-litral", "paper-literal"]),
        (["--seeds", "0,one"], ["--seeds", "'one'"]),
        (["--seeds", "0,0"], ["--seeds", "'0'", "twice"]),
        (["--rounds", "0"], ["rounds", "'0'"]),
        (["--local-steps", "0"], ["local_steps", "'0'"]),
        (["--workers", "-1"], ["workers", "-1"]),
        (["--transport", "pigeon"], ["transport", "pigeon", "memory"]),
        (["--model", "./nowhere"], ["nowhere"]),
        (["--render-only"], ["--render-only"]),
    ],
)
def test_bad_input_is_told_with_what_would_do(
    tmp_path: Path, arguments: list[str], words: list[str]
) -> None:
    out = tmp_path / "new"
    said = refused("--out", str(out), *arguments)
    assert all(word in said for word in words), said
    assert not out.exists()


def test_a_folder_with_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    assert "holds something else" in refused("--out", str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        """Return the time."""
        return self.now


def test_the_view_counts_runs_and_estimates_from_the_rounds_so_far(tmp_path: Path) -> None:
    runs = plan(Settings(seeds=(0,), methods=("pwff",), rounds=3), 128)
    log, clock = io.StringIO(), Clock()
    record = write_run(tmp_path, runs[0])
    with RunsView(Console(file=log, width=200), runs=9, there=6, rounds=8, clock=clock) as view:
        view.begin(runs[0], left=2)
        assert view.left() == ""
        clock.now = 20.0
        view("round", round=2)
        assert view.left().split() == ["about", "2", "min", "20", "s"]  # 7 rounds of 20 s
        clock.now = 30.0
        view("round", round=3)
        view.end(record)
    lines = log.getvalue().replace("\u00a0", " ").splitlines()
    assert lines == [
        "6 of 9 runs are there already",
        "run 7 of 9: pwff, seed 0, paper-literal; it goes on after round 1",
        "  done: accuracy 22.0 %, 30.0 s; about 90.0 s for 2 more",  # 6 rounds of 15 s
    ]


def test_on_a_terminal_the_bar_says_which_run_and_round_is_at_hand() -> None:
    runs = plan(Settings(seeds=(0,), methods=("pwff",), rounds=3), 128)
    log = io.StringIO()
    console = Console(file=log, width=200, force_terminal=True)
    with RunsView(console, runs=9, there=6, rounds=8) as view:
        view.begin(runs[0], left=3)
        view("round", round=2)
    assert "run 7 of 9, round 2" in log.getvalue()


def test_the_first_interrupt_is_taken_and_the_second_ends_the_process() -> None:
    with Interruption() as interruption:
        signal.raise_signal(signal.SIGINT)
        assert interruption.asked
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
