"""The command ``pretrain``: a recipe and text files into a small GPT-2 base."""

from __future__ import annotations

import datetime
import time
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from quantization.errors import MissingExtraError

INTERRUPTED = 130
_LINE_STEPS = 100


@click.command()
@click.argument("recipe", metavar="RECIPE.toml", type=click.Path(path_type=Path))
@click.option(
    "--text",
    "texts",
    multiple=True,
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="UTF-8 text to train on, besides the kit's training part; may be given again.",
)
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="The folder of the new base."
)
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    metavar="N",
    help="Of torch (default: as torch chooses); the bits depend on it.",
)
def pretrain(recipe: Path, texts: tuple[Path, ...], out: Path, threads: int | None) -> int:
    """Train a small GPT-2 base from text files.

    RECIPE.toml names shape, vocabulary, corpus, steps and seed, as quantization/bases/mini.toml
    does. A checkpoint is kept every 100 steps: after Ctrl-C, the same call goes on from the last.
    """
    try:
        import torch
        import transformers

        from edge_client import pretrain as training
    except ImportError as err:
        raise MissingExtraError(
            f"pretrain needs {err.name}, which is not installed: `pip install 'pwff[edge]'`"
        ) from err
    transformers.logging.set_verbosity_error()  # its notices are about nothing that is used here
    chosen = training.load_recipe(recipe)
    if threads is not None:
        torch.set_num_threads(threads)
    start = training.checkpoint_step(out)
    console = Console(highlight=False)
    if start:
        console.print(f"going on from step {start:,} of {chosen.steps:,}")
    try:
        with _StepsView(console, start, chosen.steps) as view:
            figures = training.pretrain(chosen, list(texts), out, view)
    except KeyboardInterrupt:
        kept = training.checkpoint_step(out)
        begins = f"goes on from step {kept:,}" if kept else "begins anew (no checkpoint yet)"
        click.echo(f"interrupted; called again, it {begins}", err=True)
        return INTERRUPTED
    console.print(
        f"held-out loss {figures['held_out_loss']:.4f} nats a token, "
        f"accuracy {figures['held_out_accuracy']:.1%}, {figures['parameters']:,} parameters"
    )
    console.print(f"Base: {out} (use it with: pwff emulate --model {out})", soft_wrap=True)
    return 0


class _StepsView:
    """Steps done, loss and time left: a bar in a terminal, a line now and then elsewhere."""

    def __init__(self, console: Console, start: int, steps: int) -> None:
        self._console = console
        self._start, self._steps = start, steps
        self._began = 0.0
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("reading", completed=start, total=steps)

    def __enter__(self) -> _StepsView:
        self._progress.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._progress.stop()

    def __call__(self, done: int, loss: float) -> None:
        """Show that ``done`` steps are done, the last with this loss (nats a token)."""
        self._progress.update(self._task, completed=done, description=f"loss {loss:.3f}")
        if done == self._start + 1:
            self._began = time.monotonic()
        elif not self._console.is_terminal and done % _LINE_STEPS == 0:
            a_step = (time.monotonic() - self._began) / (done - self._start - 1)
            left = datetime.timedelta(seconds=round(a_step * (self._steps - done)))
            self._console.print(f"{done:,} of {self._steps:,} steps, loss {loss:.3f}, {left} left")
