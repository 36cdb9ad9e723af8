"""Does the runs of a comparison one after another: what is done stays, what broke off goes on."""

from __future__ import annotations

import shlex
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from cloud_aggregator.progress import percent, say
from cloud_aggregator.records import RunRecord
from cloud_aggregator.reports.words import duration
from cloud_aggregator.reproduce.fig4 import PlannedRun
from cloud_aggregator.reproduce.folder import folder_of, record_of, rounds_left
from cloud_aggregator.run_folder import RunFolder

if TYPE_CHECKING:
    from cloud_aggregator.server import Aggregator


class StoppedError(Exception):
    """Someone asked the comparison to stop; what was done is on disk."""

    exit_code = 130


class Interruption:
    """Ctrl-C and SIGTERM over several runs; use it as a context manager.

    The first ends the run at hand in good order and lets none begin after it; a second Ctrl-C ends
    the process.
    """

    def __init__(self) -> None:
        self.asked = False
        self._aggregator: Aggregator | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interruption:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._stop)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def watch(self, aggregator: Aggregator) -> None:
        """Stop this aggregator from now on; it stops at once where that was asked already."""
        self._aggregator = aggregator
        if self.asked:
            aggregator.stop()

    def _stop(self, _signal: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        self.asked = True
        if self._aggregator is not None:
            self._aggregator.stop()


class RunsView:
    """Shows which run of how many is at hand, and how long all may take; a context manager.

    On a terminal a bar over the rounds of all runs; elsewhere two lines a run.

    Args:
        console: Where it is shown.
        runs: How many runs the comparison has.
        there: How many of them are done already.
        rounds: How many rounds are left to do.
        clock: Seconds.
    """

    def __init__(
        self,
        console: Console,
        *,
        runs: int,
        there: int,
        rounds: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console
        self._runs = runs
        self._number = there
        self._rounds = rounds
        self._done = 0
        self._clock = clock
        self._began = self._run_began = clock()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=console,
            transient=True,
        )
        self._task = self._bar.add_task("", total=rounds, left="")
        if there:
            say(console, f"{there} of {runs} runs are there already")

    def __enter__(self) -> RunsView:
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._bar.stop()

    def begin(self, run: PlannedRun, *, left: int) -> None:
        """Show that a run begins, or goes on with so many rounds left."""
        self._number += 1
        self._run_began = self._clock()
        done = run.experiment.total_rounds - left
        said = f"; it goes on after round {done}" if done else ""
        self._title = f"run {self._number} of {self._runs}: {run.words}"
        say(self._console, f"{self._title}{said}")
        self._bar.update(self._task, description=f"run {self._number} of {self._runs}")

    def __call__(self, event: str, **fields: Any) -> None:
        """Take one event of the run at hand."""
        if event == "round":
            self._done += 1
            self._bar.update(
                self._task,
                completed=self._done,
                left=self.left(),
                description=f"run {self._number} of {self._runs}, round {fields['round']}",
            )

    def end(self, record: RunRecord) -> None:
        """Show that the run at hand is done."""
        took = duration(self._clock() - self._run_began)
        accuracy = percent(record.summary.eval_accuracy_after)
        left = self.left()
        said = f"; {left} for {self._runs - self._number} more" if left else ""
        say(self._console, f"  done: accuracy {accuracy}, {took}{said}")

    def left(self) -> str:
        """Return about how long the rounds to come take, if they are like those done."""
        rounds = self._rounds - self._done
        if not self._done or rounds <= 0:
            return ""
        return f"about {duration(rounds * (self._clock() - self._began) / self._done)}"


def carry_out(
    runs: Sequence[PlannedRun],
    out: Path,
    console: Console,
    *,
    name: str = "fig4",
    clock: Callable[[], float] = time.monotonic,
    watch: Callable[[RunFolder], Callable[..., None]] = lambda _folder: _overlook,
    after: Callable[[PlannedRun], None] = lambda _run: None,
) -> None:
    """Do every run that is not done, each in its folder below ``out``.

    Args:
        runs: All of them.
        out: The folder of the comparison.
        console: Where it is shown.
        name: Of the command, for how to go on.
        clock: Seconds.
        watch: Given a run's folder, what is told of all that happens in it.
        after: Called with each run once it is done, also with those that were done before.

    Raises:
        StoppedError: If Ctrl-C or SIGTERM asked for it.
        InputError: If a run's settings, its data or its folder are not usable.
        RunFailedError: If a run cannot go on.
    """
    from cloud_aggregator.emulation.emulate import emulate

    to_do = [(run, left) for run in runs if (left := rounds_left(run, record_of(out, run)))]
    there, rounds = len(runs) - len(to_do), sum(left for _, left in to_do)
    waiting = {run.name for run, _ in to_do}
    for run in runs:
        if run.name not in waiting:
            after(run)
    with (
        Interruption() as interruption,
        RunsView(console, runs=len(runs), there=there, rounds=rounds, clock=clock) as view,
    ):
        for number, (run, left) in enumerate(to_do, there + 1):
            folder = folder_of(out, run)
            notify = _both(view, watch(folder))
            view.begin(run, left=left)
            record = emulate(
                run.experiment,
                folder.path,
                resume=folder.record_path.exists(),
                notify=notify,
                on_start=interruption.watch,
            )
            if record.status == "stopped" or interruption.asked:
                raise StoppedError(
                    f"interrupted in run {number} of {len(runs)}, everything is kept; go on with "
                    f"pwff reproduce {name} --out {shlex.quote(str(out))}"
                )
            after(run)
            view.end(record)


def _both(*listeners: Callable[..., None]) -> Callable[..., None]:
    def tell(event: str, **fields: Any) -> None:
        for listener in listeners:
            listener(event, **fields)

    return tell


def _overlook(_event: str, **_fields: Any) -> None:
    """Take no notice."""
