"""The commands ``generate`` and ``chat``: talk to a personal model."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from device_profiles.config_files import check
from device_profiles.errors import InputError
from edge_client.data.prompts import prompt as fill_template
from edge_client.inference.chat import COMMANDS, Chat, ChatSettings
from edge_client.inference.generation import Answer, answer
from edge_client.inference.open_model import RUNTIMES, open_speaker
from edge_client.inference.sampling import Sampling

INTERRUPTED = 130
_DEFAULTS = Sampling()
_TEMPERATURE = "0 takes the likeliest token every time."
_SAID = {
    "length": "[the answer is longer: --max-tokens]",
    "context": "[the model can read no more]",
    "interrupted": "[interrupted]",
}

Function = TypeVar("Function", bound=Callable[..., Any])


def model_options(temperature: str) -> Callable[[Function], Function]:
    """Return what adds the options of every command that a model answers in.

    Args:
        temperature: What its help says of that option: not every command can draw at 0.
    """
    options = [
        click.argument("model", type=click.Path(path_type=Path)),
        click.option("--client", metavar="ID", help="If MODEL is a run: whose model."),
        click.option(
            "--base", metavar="NAME", help="If MODEL is a run whose base has moved: where."
        ),
        click.option(
            "--runtime", type=click.Choice(RUNTIMES), default="auto", show_default=True,
            help="What computes; auto takes what MODEL was exported for.",
        ),
        click.option(
            "--threads", type=click.IntRange(min=1), metavar="N", help="Processor threads."
        ),
        _setting("temperature", float, temperature),
        _setting("top_k", int, "Only so many of the likeliest tokens; 0 for all."),
        _setting("top_p", float, "Only the likeliest tokens that together reach this."),
        _setting("repetition_penalty", float, "Above 1 makes repetition unlikelier."),
        _setting("max_tokens", int, "An answer's length at most."),
        _setting("seed", int, "The same seed gives the same answer."),
    ]  # fmt: skip

    def add(function: Function) -> Function:
        for option in reversed(options):
            function = option(function)
        return function

    return add


def _setting(name: str, kind: type, text: str) -> Callable[[Function], Function]:
    option = f"--{name.replace('_', '-')}"
    default = getattr(_DEFAULTS, name)
    return click.option(option, name, type=kind, default=default, show_default=True, help=text)


@click.command()
@model_options(_TEMPERATURE)
@click.option("--prompt", "instruction", metavar="TEXT", help="The instruction.")
@click.option(
    "--file", type=click.Path(path_type=Path), metavar="FILE", help="The instruction, in a file."
)
@click.option(
    "--input", "context", metavar="TEXT", default="", help="What the instruction is about."
)
@click.option("--json", "as_json", is_flag=True, help="Print the answer and its figures as JSON.")
def generate(
    *,
    model: Path,
    client: str | None,
    base: str | None,
    runtime: str,
    threads: int | None,
    instruction: str | None,
    file: Path | None,
    context: str,
    as_json: bool,
    **settings: Any,
) -> int:
    """Answer one instruction with a personal model.

    MODEL is a folder that `pwff export` wrote, or a run's folder with --client. The instruction is
    put into the template that the model was trained on.
    """
    sampling = check(Sampling, settings, "options")
    asked = fill_template(_instruction(instruction, file), context)
    speaker = open_speaker(model, client=client, base=base, runtime=runtime, threads=threads)
    given = answer(speaker, asked, sampling, show=(lambda _: None) if as_json else _show)
    if as_json:
        click.echo(json.dumps(_record(given, speaker.model.name, sampling), indent=1))
    else:
        _end(given)
    return INTERRUPTED if given.stopped == "interrupted" else 0


def _instruction(given: str | None, file: Path | None) -> str:
    if (given is None) == (file is None):
        raise InputError("give the instruction either by --prompt TEXT or by --file FILE")
    if given is None and file is not None:
        try:
            given = file.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as err:
            raise InputError(f"--file {file}: {err}; give a UTF-8 text file") from err
    text = (given or "").strip()
    if not text:
        raise InputError("the instruction is empty; say what the model is to do")
    return text


def _record(given: Answer, runtime: str, sampling: Sampling) -> dict[str, Any]:
    return {
        "text": given.text,
        "tokens": given.tokens,
        "stopped": given.stopped,
        "seconds": round(given.seconds, 3),
        "tokens_per_second": round(given.tokens / given.seconds, 2),
        "runtime": runtime,
        "sampling": sampling.model_dump(),
    }


def _show(piece: str) -> None:
    click.echo(piece, nl=False)


def _end(given: Answer) -> None:
    click.echo("" if given.stopped == "end" else f" {_SAID[given.stopped]}")


@click.command()
@model_options(_TEMPERATURE)
@click.option(
    "--history", type=int, default=0, show_default=True,
    help="Earlier turns put before a question; the models are tuned on none.",
)  # fmt: skip
def chat(
    *,
    model: Path,
    client: str | None,
    base: str | None,
    runtime: str,
    threads: int | None,
    **settings: Any,
) -> int:
    """Talk to a personal model.

    MODEL is a folder that `pwff export` wrote, or a run's folder with --client. Each question is
    answered by itself: the models are tuned on single turns. Ctrl-C ends an answer; at the prompt
    it ends the chat.
    """
    chosen = check(ChatSettings, settings, "options")
    speaker = open_speaker(model, client=client, base=base, runtime=runtime, threads=threads)
    click.echo(f"{speaker.title}. {_turns(chosen)} {', '.join(COMMANDS)}")
    talk = Chat(speaker, chosen)
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - lines can be edited, and called back by the arrow keys
    try:
        while not talk.over:
            line = input("> ").strip()
            try:
                if line.startswith("/"):
                    click.echo(talk.command(line))
                elif line:
                    _end(talk.ask(line, _show))
            except InputError as err:
                click.echo(f"error: {err}", err=True)
    except EOFError:
        click.echo("")
    except KeyboardInterrupt:
        click.echo("")
        return INTERRUPTED
    return 0


def _turns(settings: ChatSettings) -> str:
    if settings.history:
        return f"The last {settings.history} turns stand before a question."
    return "Each question is answered by itself: the model was tuned on single turns."
