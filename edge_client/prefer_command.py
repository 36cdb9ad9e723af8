"""The command ``prefer``: two responses of the device's own model, ranked by a judge."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from device_profiles.config_files import check
from device_profiles.errors import InputError
from device_profiles.methods import OBJECTIVES
from edge_client.data.prompt_files import Prompt, load_prompts
from edge_client.inference.generation import Speaker
from edge_client.inference.sampling import Sampling
from edge_client.prefer.candidates import (
    check_draws,
    draw_candidates,
    has_room,
    open_candidate_model,
)
from edge_client.prefer.human import person
from edge_client.prefer.ranking import RankingError
from edge_client.prefer.rubrics import Estimate, estimate
from edge_client.prefer.session import SKIPPED, Source, Tally, collect
from edge_client.prefer.store import PairStore
from edge_client.talk_command import INTERRUPTED, model_options
from quantization.errors import MissingExtraError

if TYPE_CHECKING:
    from edge_client.prefer.endpoint import Endpoint, EndpointJudge

JUDGES = ("human", "endpoint")
FIRST_WAIT_SECONDS = 1.0  # before a request is tried again


@click.command()
@model_options("Above 0: a higher one makes the two responses differ more.")
@click.option(
    "--objective", type=click.Choice(OBJECTIVES), required=True,
    help="By what the responses are ranked.",
)  # fmt: skip
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, metavar="FILE",
    help="JSONL; a session that is started again goes on where it was.",
)  # fmt: skip
@click.option(
    "--prompts", "source", default="kit", show_default=True, metavar="FILE",
    help="kit; a .json or .jsonl file of instructions; or a text file, a prompt on each line.",
)  # fmt: skip
@click.option(
    "--count", type=click.IntRange(min=1), metavar="N",
    help="Pairs that FILE is to hold in the end (default: one for each prompt).",
)  # fmt: skip
@click.option(
    "--judge", type=click.Choice(JUDGES), default="human", show_default=True,
    help="Who ranks: you at this terminal, or a model behind an API.",
)  # fmt: skip
@click.option(
    "--endpoint", "url", metavar="URL",
    help="With --judge endpoint: an OpenAI-compatible API, https://host/v1.",
)  # fmt: skip
@click.option("--judge-model", metavar="NAME", help="With --judge endpoint: which of its models.")
@click.option(
    "--key-variable", default="OPENAI_API_KEY", show_default=True, metavar="NAME",
    help="The environment variable that holds the key of the API.",
)  # fmt: skip
@click.option(
    "--price-per-million-tokens", "price", type=click.FloatRange(min=0), metavar="PRICE",
    help="What the API takes, read or written; the cost is shown before it starts.",
)  # fmt: skip
@click.option(
    "--tries", type=click.IntRange(1, 20), default=5, show_default=True,
    help="Of a request that meets a busy or unreachable API.",
)  # fmt: skip
@click.option("--yes", is_flag=True, help="Do not ask before the API is used.")
@click.option("--json", "as_json", is_flag=True, help="Print what came of it as JSON.")
def prefer(
    *,
    model: Path,
    client: str | None,
    base: str | None,
    runtime: str,
    threads: int | None,
    objective: str,
    out: Path,
    source: str,
    count: int | None,
    judge: str,
    url: str | None,
    judge_model: str | None,
    key_variable: str,
    price: float | None,
    tries: int,
    yes: bool,
    as_json: bool,
    **settings: Any,
) -> int:
    """Collect preference pairs: two responses of a model to each prompt, ranked.

    MODEL is a folder that `pwff export` wrote, a run's folder with --client, or a base (mini, a
    checkpoint folder, a hub id). Each pair is on disk before the next is asked for; Ctrl-C loses
    nothing. `pwff emulate --helpfulness FILE` or `--harmlessness FILE` reads what is written.
    """
    console = Console(stderr=True, highlight=False)
    notice = partial(console.print, style="dim", markup=False, soft_wrap=True)
    sampling = check(Sampling, settings, "options")
    check_draws(sampling)
    place = _endpoint(judge, url, judge_model, key_variable, tries)
    read = load_prompts(source, objective, sampling.seed)
    for number, reason in read.broken:
        notice(f"{source}, {number}: {reason}; left out")
    with ExitStack() as stack:
        store = stack.enter_context(PairStore(out, objective))
        if store.mended:
            notice(f"{out}: its last line was cut short, and is removed")
        left = [prompt for prompt in read.prompts if prompt.key not in store.judged]
        most = min(store.count + len(left), count or store.count + len(left))
        if store.count >= most:
            _report(Tally(judged=0, stopped="enough"), store, None, as_json=as_json)
            return 0
        speaker = open_candidate_model(
            model, client=client, base=base, runtime=runtime, threads=threads
        )
        asked: EndpointJudge | None = None
        if place is not None:
            needed = estimate(
                left,
                requests=most - store.count,
                objective=objective,
                response_tokens=sampling.max_tokens,
                count_tokens=lambda text: len(speaker.tokenizer.encode(text).ids),
            )
            console.print(_announcement(place, needed, price), markup=False, soft_wrap=True)
            if not yes and not click.confirm("go on?", err=True):
                console.print("nothing was sent")
                return 0
            asked = _ask(place, notice)
            stack.callback(asked.close)
        try:
            tally = collect(
                left,
                _source(speaker, sampling, console),
                asked.rank if asked else person(console),
                store,
                judge=f"endpoint {judge_model}" if asked else "human",
                most=most,
                seed=sampling.seed,
                notice=notice,
            )
        except RankingError as err:
            raise RankingError(
                f"{err}; {out} keeps its {_number(store.count, 'pair')}, and the same command "
                "goes on"
            ) from err
        _report(tally, store, asked, as_json=as_json)
    if tally.stopped == "interrupted":
        return INTERRUPTED
    return 1 if tally.stopped == "prompts" and not tally.judged else 0


def _endpoint(
    judge: str, url: str | None, model: str | None, key_variable: str, tries: int
) -> Endpoint | None:
    """Return who is asked, or None where a person judges."""
    named = {"--endpoint": url, "--judge-model": model}
    if judge == "human":
        for option, value in named.items():
            if value is not None:
                raise InputError(f"{option} goes with --judge endpoint; add it or leave both out")
        return None
    for option, value in named.items():
        if not value:
            raise InputError(f"--judge endpoint needs {option}; add it")
    try:
        from edge_client.prefer.endpoint import Endpoint, check_url, find_key
    except ImportError as err:
        raise MissingExtraError(
            f"--judge endpoint needs the package {err.name}, which is not installed: "
            "`pip install 'pwff[endpoint]'`, or judge yourself with --judge human"
        ) from err
    return Endpoint(
        url=check_url(url or ""),
        model=model or "",
        key=find_key(key_variable),
        tries=tries,
        first_wait_seconds=FIRST_WAIT_SECONDS,
    )


def _ask(place: Endpoint, notice: Callable[[str], None]) -> EndpointJudge:
    from edge_client.prefer.endpoint import EndpointJudge

    return EndpointJudge(place, notice)


def _announcement(place: Endpoint, needed: Estimate, price: float | None) -> str:
    """Return what judging takes and who reads it."""
    clear = ", unencrypted" if place.in_clear else ""
    cost = "" if price is None else f", at {price:g} a million at most {needed.cost(price):.4f}"
    return (
        f"prompts and responses leave this device for {place.host}{clear}\n"
        f"{needed.requests} requests to {place.model}: at most about {needed.tokens_in} tokens "
        f"read and {needed.tokens_out} written{cost} (a request that is repeated counts again)"
    )


def _source(speaker: Speaker, sampling: Sampling, console: Console) -> Source:
    def draw(prompt: Prompt) -> tuple[str, str] | None:
        with console.status("two responses are drawn"):
            return draw_candidates(speaker, prompt, sampling)

    return Source(title=speaker.title, has_room=partial(has_room, speaker), draw=draw)


def _report(tally: Tally, store: PairStore, asked: EndpointJudge | None, *, as_json: bool) -> None:
    """Print what came of a session."""
    usage = {"read": asked.tokens_in, "written": asked.tokens_out} if asked else None
    if as_json:
        record = {
            "out": str(store.path),
            "objective": store.objective,
            "pairs": store.count,
            "judged": tally.judged,
            "skipped": tally.skipped,
            "stopped": tally.stopped,
            "tokens": usage,
        }
        click.echo(json.dumps(record, indent=1))
        return
    end = " (interrupted)" if tally.stopped == "interrupted" else ""
    click.echo(f"{_number(tally.judged, 'pair')} added, {store.count} in {store.path}{end}")
    for reason, number in tally.skipped.items():
        click.echo(f"{_number(number, 'prompt')} skipped: {SKIPPED[reason]}")
    if usage and any(usage.values()):
        click.echo(f"tokens by the endpoint's count: {usage['read']} in, {usage['written']} out")


def _number(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"
