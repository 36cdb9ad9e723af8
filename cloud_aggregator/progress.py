"""What a person sees while a run goes on.

On a terminal: a live view of clients, rounds, bytes and the time left. Elsewhere (a log, a pipe):
one line an event that matters.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from cloud_aggregator.records import RunRecord
from cloud_aggregator.stages import TAKEN_BACK
from messaging.protocol import DeviceRecord


def human_bytes(number: float) -> str:
    """Return a number of bytes in the unit that reads best (powers of 1000)."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(number) < 1000:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} TB"


def percent(value: float | None, sign: str = " %") -> str:
    """Return a share as a percentage, or a dash."""
    return "-" if value is None else f"{100 * value:.1f}{sign}"


def nats(value: float | None) -> str:
    """Return a loss with three decimals, or a dash."""
    return "-" if value is None else f"{value:.3f}"


_TRAINING = {"instruction": "training", "reward": "learning", "alignment": "aligning"}


def stage_words(stage: str, figures: Mapping[str, Any]) -> str:
    """Return what a stage's figures say in few words."""
    if stage == "reward":
        return (
            f"pair accuracy {percent(figures['reward_accuracy'])}, "
            f"loss {nats(figures['reward_loss'])}"
        )
    if stage == "alignment":
        return (
            f"weighted reward {nats(figures['weighted_reward'])} (helpfulness "
            f"{nats(figures['reward_helpfulness'])}, harmlessness "
            f"{nats(figures['reward_harmlessness'])}), KL {nats(figures['kl'])} nats"
        )
    return f"accuracy {percent(figures['eval_accuracy'])}, loss {nats(figures['eval_loss'])}"


def _besides(round_: Mapping[str, Any]) -> str:
    """Return what else is to be said: late updates, what it spent, and how long it waited."""
    late, spent, waited = (round_.get(key) for key in ("stale", "epsilon", "waited_seconds"))
    parts = [f" and {late} late"] if late else []
    parts += [] if spent is None else [f", epsilon {spent:.2f}"]
    parts += [f" after {waited:.0f} s without enough devices"] if waited else []
    return "".join(parts)


def say(console: Console, line: str) -> None:
    """Print a sentence: wrapped between words on a terminal, whole in a log."""
    console.print(line, highlight=False, soft_wrap=not console.is_terminal)


@dataclass
class _Row:
    profile: str = ""
    lora_count: int = 0
    doing: str = ""
    before: float | None = None
    accuracy: float | None = None
    loss: float | None = None
    train_loss: float | None = None


@dataclass
class _View:
    rows: dict[str, _Row] = field(default_factory=dict)
    round: int = 0
    bytes_up: int = 0


class ProgressView:
    """Turns a run's events into a live view or into lines; use it as a context manager.

    Args:
        console: Where it is shown.
        rounds: How many rounds the run has at most.
        clock: Seconds.
    """

    def __init__(
        self, console: Console, rounds: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._console = console
        self._rounds = rounds
        self._clock = clock
        self._view = _View()
        self._round_seconds: list[float] = []
        self._bar = Progress(
            TextColumn("rounds"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=console,
        )
        self._bar_task = self._bar.add_task("rounds", total=rounds, left="")
        self._live: Live | None = None
        if console.is_terminal:
            self._live = Live(self._draw(), console=console, refresh_per_second=4, transient=True)

    def __enter__(self) -> ProgressView:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def __call__(self, event: str, **fields: Any) -> None:
        """Take one event of the run."""
        handler = getattr(self, f"_on_{event}", None)
        if handler is not None:
            handler(**fields)
        if self._live is not None:
            self._live.update(self._draw())

    def _say(self, line: str) -> None:
        say(self._console, line)  # above the live view

    def _row(self, client: str) -> _Row:
        return self._view.rows.setdefault(client, _Row())

    def _on_plan(
        self, record: RunRecord, clients: list[DeviceRecord], broken: list[tuple[int, str]]
    ) -> None:
        for device in clients:
            row = self._row(device.id)
            row.profile, row.lora_count = device.profile, device.lora_count
        for measured in record.before:
            self._row(measured.id).before = measured.eval_accuracy
        self._advance(len(record.rounds))
        for number, reason in broken[:3]:
            self._console.print(f"data: line {number} left out: {reason}", highlight=False)
        if len(broken) > 3:
            self._console.print(f"data: {len(broken)} rows left out in all", highlight=False)
        counts = sorted({d.lora_count for d in clients})
        self._say(
            f"{len(clients)} clients on {record.model.name} "
            f"({record.model.parameters:,} parameters), "
            f"LoRA modules {', '.join(map(str, counts))}; {record.data.examples:,} examples; "
            f"starting {record.workers} worker(s)"
        )

    def _on_airtime(self, lines: list[str]) -> None:
        for line in lines:
            self._say(line)

    def _on_hello(self, client: str, online: bool, profile: str, lora_count: int) -> None:
        row = self._row(client)
        row.doing = "ready" if online else "left"
        row.profile, row.lora_count = profile or row.profile, lora_count or row.lora_count

    def _on_task(
        self, work: str, round: int, clients: list[str], stage: str, **_fields: Any
    ) -> None:
        self._view.round = round
        words = _TRAINING.get(stage, "training") if work == "train" else "measuring"
        for client in clients:
            self._row(client).doing = words

    def _on_update(
        self, client: str, verdict: str, train_loss: float | None, **fields: Any
    ) -> None:
        row = self._row(client)
        row.train_loss = train_loss
        row.doing = "sent" if verdict in ("taken", "accepted") else verdict
        self._view.bytes_up += fields["bytes"]

    def _on_refused(self, client: str, code: str, **_fields: Any) -> None:
        if client in self._view.rows:
            self._row(client).doing = f"refused ({code})"

    def _on_report(
        self, client: str, eval_loss: float | None, eval_accuracy: float | None, **_fields: Any
    ) -> None:
        row = self._row(client)
        if row.before is None:
            row.before = eval_accuracy
        row.accuracy, row.loss, row.doing = eval_accuracy, eval_loss, "measured"

    def _on_before(self, stage: str, **figures: Any) -> None:
        if stage != "instruction":
            self._say(f"stage {stage}:")
        where = "" if stage == "alignment" else "held-out "
        self._say(f"before: {where}{stage_words(stage, figures)}")

    def _on_round(self, **f: Any) -> None:
        self._round_seconds.append(f["wall_seconds"])
        self._advance(f["round"])
        left = self._left()
        self._say(
            f"round {f['round']}/{self._rounds}: {stage_words(f['stage'], f)}, "
            f"{f['accepted']} of {f['clients']} clients{_besides(f)}, "
            f"{human_bytes(f['upload_bytes'])} up, {f['virtual_seconds']:.0f} s modelled, "
            f"{f['wall_seconds']:.0f} s here" + (f", {left}" if left else "")
        )
        if f["taken_back"]:
            self._say(
                f"round {f['round']} was taken back ({TAKEN_BACK[f['taken_back']]}): every device "
                "has again what it had before, and the stage ends"
            )

    def _on_replaced(self, client: str, by: str, **_fields: Any) -> None:
        self._row(client).doing = "vanished"
        self._say(f"'{client}' vanished; '{by}' is asked in its place")

    def _left(self) -> str:
        rounds = self._rounds - self._view.round
        if not self._round_seconds or rounds <= 0:
            return ""
        seconds = rounds * sum(self._round_seconds) / len(self._round_seconds)
        return (
            f"about {seconds / 60:.0f} min left" if seconds >= 90 else f"about {seconds:.0f} s left"
        )

    def _advance(self, done: int) -> None:
        self._view.round = done
        self._bar.update(self._bar_task, completed=done, left=self._left())

    def _draw(self) -> Group:
        table = Table(box=None, pad_edge=False)
        for name in ("client", "device", "LoRA", "doing", "train loss", "loss", "accuracy", "was"):
            table.add_column(
                name, justify="left" if name in ("client", "device", "doing") else "right"
            )
        for client, row in sorted(self._view.rows.items()):
            table.add_row(
                client,
                row.profile,
                str(row.lora_count),
                row.doing,
                nats(row.train_loss),
                nats(row.loss),
                percent(row.accuracy),
                percent(row.before),
            )
        sent = Text(f"{human_bytes(self._view.bytes_up)} of updates received")
        return Group(table, sent, self._bar)
