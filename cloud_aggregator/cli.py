"""The commands of the cloud side: ``emulate``, ``aggregator`` and ``report``."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from rich.console import Console
from rich.logging import RichHandler

from cloud_aggregator.closing import closing_lines, closing_table
from cloud_aggregator.experiment import load_experiment
from cloud_aggregator.experiments import find_experiment, listing
from cloud_aggregator.methods import METHODS
from cloud_aggregator.progress import ProgressView, say
from cloud_aggregator.records import RunRecord
from cloud_aggregator.run_folder import RunFolder
from cloud_aggregator.trackers import TRACKERS
from device_profiles import logs
from device_profiles.config_files import read_toml
from device_profiles.errors import InputError
from device_profiles.modules import PLACEMENTS

if TYPE_CHECKING:
    from cloud_aggregator.server import Aggregator

INTERRUPTED = 130

F = TypeVar("F", bound=Callable[..., Any])


class _InterruptedError(Exception):
    """A run that was stopped by a signal and kept everything."""

    exit_code = INTERRUPTED


def _start_logging(level: str, console: Console) -> None:
    # a live view is drawn around lines of its own console only
    beside = console if console.is_terminal else Console(stderr=True)
    logs.start("text", level, handler=RichHandler(console=beside, show_path=False))


def stop_on_signals(aggregator: Aggregator) -> None:
    """Make Ctrl-C and SIGTERM end the run in good order; a second Ctrl-C ends the process."""

    def stop(_signal: int, _frame: object) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        aggregator.stop()

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)


def _list_experiments(ctx: click.Context, _option: click.Parameter, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        click.echo("\n".join(listing()))
        ctx.exit()


@click.command()
@click.argument("experiment", required=False, metavar="[NAME|FILE.toml]")
@click.option(
    "--list",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_list_experiments,
    help="Name the experiments that come with the project, and end.",
)
@click.option("--method", metavar="NAME", help=f"One of {', '.join(METHODS)} (default pwff).")
@click.option(
    "--stages", metavar="NAMES", help="instruction, reward, alignment, with commas (instruction)."
)
@click.option("--clients", type=int, metavar="N", help="Devices drawn (default 10).")
@click.option("--fleet", metavar="FILE|NAME", help="Mix of device profiles (default mixed).")
@click.option("--rounds", metavar="N[,N]", help="At most, one or one a stage (6, 5, 4).")
@click.option(
    "--local-steps", metavar="N[,N]", help="A client and round, one or one a stage (12, 40, 2)."
)
@click.option("--batch-size", type=int, metavar="N", help="Examples a step (default 4).")
@click.option("--learning-rate", type=float, metavar="X", help="Of AdamW (default 0.001).")
@click.option("--seed", type=int, metavar="N", help="Same seed, same bits (default 0).")
@click.option("--model", metavar="mini|gpt2|PATH|HUB_ID", help="The frozen base (default mini).")
@click.option(
    "--precision",
    metavar="NAME",
    help="Of the base: fp32, bf16, int8, int8-dynamic, nf4, or auto, the device's plan (auto).",
)
@click.option("--data", metavar="kit|alpaca|FILE", help="Instruction data (default kit).")
@click.option("--helpfulness", metavar="kit|FILE", help="Preference pairs (default kit).")
@click.option("--harmlessness", metavar="kit|FILE", help="Preference pairs (default kit).")
@click.option("--prompts", metavar="kit|FILE", help="That alignment answers (the pairs' own).")
@click.option("--trunk-precision", metavar="NAME", help="Of what reward models read (int8).")
@click.option("--reward-trunk", metavar="base|DIR|HUB_ID", help="That reward models read (base).")
@click.option("--reward-shares", metavar="head|adapters|all", help="Of a reward model (head).")
@click.option("--reward-batch-size", type=int, metavar="N", help="Pairs a step (32).")
@click.option("--reward-learning-rate", type=float, metavar="X", help="Of reward models (0.0003).")
@click.option("--margin", type=float, metavar="X", help="Of the Bradley-Terry loss (0).")
@click.option("--algorithm", metavar="NAME", help="Of alignment: ppo, rloo or dpo (ppo).")
@click.option("--rollouts", type=int, metavar="N", help="Responses a step of alignment (16).")
@click.option(
    "--alignment-learning-rate", type=float, metavar="X", help="Of AdamW (0.0003; rloo: 0.001)."
)
@click.option("--max-new-tokens", type=int, metavar="N", help="Of a response (48).")
@click.option("--temperature", type=float, metavar="X", help="Of rollouts (0.7).")
@click.option("--kl-coefficient", type=float, metavar="X", help="Cost of a nat at first (0.15).")
@click.option("--kl-target", type=float, metavar="NATS", help="Steered to; 0: fixed cost (6).")
@click.option("--kl-limit", type=float, metavar="NATS", help="Beyond it a round is undone (50).")
@click.option("--reward-drop", type=float, metavar="X", help="Likewise, fall of reward (2).")
@click.option("--held-out-prompts", type=int, metavar="N", help="Answered when measured (16).")
@click.option("--partition", metavar="KIND", help="iid, category, cluster or dirichlet (category).")
@click.option(
    "--alpha", type=float, metavar="A", help="Dirichlet's; small is uneven (default 0.5)."
)
@click.option("--skew", type=float, metavar="X", help="Power law of the clients' sizes (0, equal).")
@click.option("--max-length", type=int, metavar="N", help="Tokens an example at most (256).")
@click.option("--placement", metavar="NAME", help=f"LoRA sites: {', '.join(PLACEMENTS)} (qkv).")
@click.option("--lora-count", type=int, metavar="N", help="12 to 36 for all, not the profile's.")
@click.option(
    "--lora-rank", type=int, metavar="R", help="Instead of 96 at width 768 in proportion."
)
@click.option("--adapter-count", type=int, metavar="N", help="Checked against the base's sites.")
@click.option("--adapter-size", type=int, metavar="M", help="Bottleneck size (default 10).")
@click.option("--codec", metavar="NAME", help="fp32, fp16, int8 or int4 (default fp32).")
@click.option("--channel", metavar="paper|profile", help="Every client's uplink (default paper).")
@click.option(
    "--priced-at", metavar="base|gpt2-small", help="Shape that delay and energy are of (base)."
)
@click.option("--priced-lora-rank", type=int, metavar="R", help="Rank there (in proportion).")
@click.option("--fading", metavar="NAME", help="rayleigh, rician or none (the link's).")
@click.option(
    "--scheme", metavar="NAME", help="adaptive, fixed-rate, outage or inversion (adaptive)."
)
@click.option("--sharing", metavar="NAME", help="Of the band: dedicated, tdma or fdma (dedicated).")
@click.option("--cohort", type=int, metavar="N", help="Clients that train in a round (all).")
@click.option(
    "--selection", metavar="NAME", help="uniform, best-channel, proportional-fair or utility."
)
@click.option("--availability", metavar="NAME", help="always, diurnal or churn (always).")
@click.option("--night-hours", type=float, metavar="X", help="Of diurnal (8).")
@click.option("--on-hours", type=float, metavar="X", help="Of churn: a device stays (2).")
@click.option("--off-hours", type=float, metavar="X", help="Of churn: it is away (2).")
@click.option("--weibull-shape", type=float, metavar="X", help="Of churn; 1: exponential (1).")
@click.option("--upload-policy", metavar="NAME", help="at-once, or wait for good blocks (at-once).")
@click.option(
    "--aggregation",
    metavar="RULE",
    help="mean, norm-clipped, trimmed-mean, median, krum or fedbuff (mean).",
)
@click.option("--clip-norm", type=float, metavar="X", help="For norm-clipped.")
@click.option("--trim-share", type=float, metavar="X", help="For trimmed-mean, at each end.")
@click.option("--byzantine", type=int, metavar="N", help="For krum: bad updates reckoned with.")
@click.option("--max-staleness", type=int, metavar="N", help="For fedbuff, in rounds (5).")
@click.option("--max-norm", type=float, metavar="X", help="Above it an update is refused.")
@click.option(
    "--over-selection", type=float, metavar="X", help="Devices asked an update needed (1)."
)
@click.option("--keep-states", type=int, metavar="N", help="Global states a stage (all).")
@click.option("--quorum", type=float, metavar="SHARE", help="Of updates that end a round (1).")
@click.option("--deadline-seconds", type=float, metavar="S", help="Of a round, modelled (3600).")
@click.option("--epsilon", type=float, metavar="NATS", help="Least improvement that counts (0).")
@click.option(
    "--patience", type=int, metavar="N", help="Rounds without it until the end (0: never)."
)
@click.option("--held-out-share", type=float, metavar="X", help="Of each client's rows (0.2).")
@click.option("--others-sample", type=int, metavar="N", help="Of others' rows, measured too (0).")
@click.option("--proximal", type=float, metavar="X", help="Ditto's pull on a personal copy (0).")
@click.option("--lora-dropout", type=float, metavar="X", help="Of what LoRA is given (0).")
@click.option("--weight-decay", type=float, metavar="X", help="Of AdamW (0).")
@click.option("--stopping-patience", type=int, metavar="N", help="Looks until a round ends (0).")
@click.option("--validation-share", type=float, metavar="X", help="Set apart for them (0.2).")
@click.option("--validation-every", type=int, metavar="N", help="Steps between two looks (4).")
@click.option("--threads", type=int, metavar="N", help="A client computes with; the bits' (1).")
@click.option(
    "--chunk-bytes", type=int, metavar="N", help="Of a message, header included (122880)."
)
@click.option("--engine", metavar="local|ray", help="Here, or on a Ray cluster (local).")
@click.option(
    "--address", metavar="HOST:PORT|auto", help="Of the cluster; default: Ray starts here."
)
@click.option("--workers", type=int, metavar="N", help="Processes (default: one a core).")
@click.option(
    "--transport", metavar="mqtt|memory", help="A real broker, or no socket at all (mqtt)."
)
@click.option("--broker", metavar="URL", help="mqtt://HOST:PORT; default: one is started here.")
@click.option("--broker-port", type=int, metavar="PORT", help="Of that one (default: a free one).")
@click.option("--broker-wait-seconds", type=float, metavar="S", help="For a given broker (10).")
@click.option("--features", metavar="DIR", help="Shared by runs that read the same pairs.")
@click.option("--out", type=click.Path(path_type=Path), help="The run's folder (default runs/...).")
@click.option("--resume", is_flag=True, help="Go on with the run in --out.")
@click.option(
    "--sweep", multiple=True, metavar="KEY=V,V", help="A run at each value; more than one: a grid."
)
@click.option("--seeds", type=int, metavar="N", help="Each at so many, from --seed on (1).")
@click.option(
    "--track", multiple=True, metavar="|".join(TRACKERS), help="Follow the run there too."
)
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON at the end.")
@click.option("-v", "--verbose", count=True, help="More of the log; twice for all.")
def emulate(
    *,
    experiment: str | None,
    out: Path | None,
    resume: bool,
    sweep: tuple[str, ...],
    seeds: int | None,
    track: tuple[str, ...],
    as_json: bool,
    verbose: int,
    **options: Any,
) -> int:
    """Emulate a fleet on this machine: a broker, the aggregator, and devices that train.

    Its argument is the name of an experiment that comes with the project (--list) or a TOML file
    with any of these options as keys (dashes become underscores); options on the command line win
    over it. Without one it runs the bundled kit.

    With --sweep or --seeds it does many runs, one after another, in the folders below --out, and
    compares them; the same command goes on with what is left of them.
    """
    from cloud_aggregator.emulation.emulate import emulate as run_emulation
    from cloud_aggregator.emulation.emulate import new_place, require_edge
    from cloud_aggregator.sweep_run import run_sweep

    console = Console(stderr=as_json)
    _start_logging(("warning", "info", "debug")[min(verbose, 2)], console)
    given = {k: v for k, v in options.items() if v is not None}
    path = None if experiment is None else find_experiment(experiment)
    if sweep or seeds is not None:
        if resume or as_json:
            raise InputError(
                f"--{'resume' if resume else 'json'} is of one run, and --sweep and --seeds do "
                "many; leave one out (the same command goes on with what is left of a sweep)"
            )
        require_edge()
        out = out or Path("runs") / "sweep"
        run_sweep(console, path, given, sweep=sweep, seeds=seeds or 1, out=out, track=track)
        return 0
    if resume and out is None:
        raise InputError("--resume goes on with the run in --out; name its folder")
    if resume and experiment is None and out is not None and (out / "config.toml").exists():
        given = {**read_toml(out / "config.toml").get("experiment", {}), **given}
    chosen = load_experiment(path, given)
    out = out or new_place(chosen)
    with ProgressView(console, chosen.total_rounds) as view:
        record = run_emulation(
            chosen, out, resume=resume, track=track, notify=view, on_start=stop_on_signals
        )
    remedy = f"go on with --resume --out {out}"
    return _close(console, record, RunFolder(out), remedy=remedy, as_json=as_json)


def _close(
    console: Console, record: RunRecord, folder: RunFolder, *, remedy: str, as_json: bool
) -> int:
    """Show what came of a run; return its exit code."""
    from cloud_aggregator.reports.build import write_report

    console.print(closing_table(record))
    for line in closing_lines(record):
        say(console, line)
    report = write_report([folder.path], None)
    say(console, f"Report: {report}")
    if as_json:
        click.echo(json.dumps({"out": str(folder.path), **record.summary.model_dump()}))
    if record.status == "stopped":
        raise _InterruptedError(
            f"interrupted after {len(record.rounds)} rounds, everything is kept; {remedy}"
        )
    return 0


@click.command()
@click.option(
    "--config", "path", required=True, type=click.Path(path_type=Path), help="A TOML file."
)
@click.option("-v", "--verbose", is_flag=True, help="The whole log: --log-level debug.")
@click.option("--log-level", type=click.Choice(logs.LEVELS), help="The least logged (info).")
@click.option(
    "--log-format", type=click.Choice(["text", "json"]), default="text", help="json: one a line."
)
def aggregator(path: Path, verbose: bool, log_level: str | None, log_format: logs.Format) -> int:
    """Run the cloud side of a run until it is done or stopped; it resumes where it was."""
    from cloud_aggregator.service import serve
    from cloud_aggregator.service_config import load_service

    for_machines = log_format == "json"
    console = Console(quiet=for_machines)
    level = log_level or ("debug" if verbose else "info")
    if for_machines:
        logs.start("json", level)
    else:
        _start_logging(level, console)
    service = load_service(path)
    logs.place(run=service.run)
    with ProgressView(console, service.total_rounds) as view:

        def notify(event: str, **fields: Any) -> None:
            logs.note_event(event, **fields)
            (logs.tell_event if for_machines else view)(event, **fields)

        record = serve(service, notify=notify, on_start=stop_on_signals)
    remedy = f"start it again with --config {path}"
    return _close(console, record, RunFolder(service.out), remedy=remedy, as_json=False)


@click.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Where the page is written.")
def report(runs: tuple[Path, ...], out: Path | None) -> int:
    """Write report.html of one run's folder, or a comparison of several."""
    from cloud_aggregator.reports.build import fairness_of, write_report

    page = write_report(list(runs), out)
    for line in fairness_of(runs):
        click.echo(line)
    click.echo(f"Report: {page}")
    return 0
