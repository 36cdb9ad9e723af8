"""``fig4.md``: the tables, what they say of the paper's claims, and all it takes to repeat them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from cloud_aggregator.records import RunRecord
from cloud_aggregator.reports.words import duration
from cloud_aggregator.reproduce.claims import Claim, judge, variants
from cloud_aggregator.reproduce.fig4 import EXPERIMENTS, PlannedRun, Settings
from cloud_aggregator.reproduce.folder import folder_of
from cloud_aggregator.reproduce.gather import Gathered
from cloud_aggregator.reproduce.tables import markdown_table
from cloud_aggregator.reproduce.words import NO_EVIDENCE, counted, joined
from device_profiles.config_files import read_toml

_SHOWN = (
    "clients", "fleet", "partition", "held_out_share", "rounds", "local_steps", "batch_size",
    "learning_rate", "max_length", "codec", "channel", "placement", "adapter_size",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Judged:
    """One experiment with what its figures say of the claims, and of the variants."""

    gathered: Gathered
    claims: tuple[Claim, ...]
    variants: tuple[str, ...]


def judged(gathered: Gathered) -> Judged:
    """Return an experiment with its claims held against its figures."""
    return Judged(
        gathered=gathered,
        claims=tuple(judge(gathered.runs)),
        variants=tuple(variants(gathered.runs)),
    )


def summary(experiment: Judged) -> str:
    """Return how many of the paper's claims held; the control is not the paper's."""
    verdicts = Counter(claim.verdict for claim in experiment.claims[:-1])
    parts = [f"{verdicts[v]} {v}" for v in ("held", "not held", "undecided") if verdicts[v]]
    return (
        f"Of the paper's {counted(sum(verdicts.values()), 'claim')}, at rank "
        f"{experiment.gathered.rank}: {joined(parts)}."
    )


def document(
    settings: Settings,
    experiments: Sequence[Judged],
    runs: Sequence[PlannedRun],
    records: Mapping[str, RunRecord],
    out: Path,
) -> str:
    """Return the whole of ``fig4.md``."""
    parts = ["# Fig. 4 of arXiv 2404.13238v2, reproduced"]
    if settings.quick:
        parts.append(f"> **{NO_EVIDENCE}**")
    parts.append("![Accuracy over the rounds; delay and energy of a round's upload](fig4.svg)")
    parts += [_section(experiment) for experiment in experiments]
    parts += ["## How it was measured", _how_measured()]
    parts += ["## How to repeat it", _repeat(settings, runs, records, out)]
    return "\n\n".join(parts) + "\n"


def command(settings: Settings, rounds: int, local_steps: int) -> str:
    """Return the command of the comparison; model and data by their last name, without a path."""
    words = ["pwff", "reproduce", "fig4"]
    words += ["--quick"] if settings.quick else []
    words += ["--seeds", ",".join(map(str, settings.seeds))]
    words += ["--rounds", str(rounds), "--local-steps", str(local_steps)]
    words += ["--model", Path(settings.model).name, "--data", Path(settings.data).name]
    if settings.batch_size is not None:
        words += ["--batch-size", str(settings.batch_size)]
    if settings.held_out_share is not None:
        words += ["--held-out-share", f"{settings.held_out_share:g}"]
    if settings.experiments != EXPERIMENTS:
        words += ["--experiments", ",".join(settings.experiments)]
    return " ".join([*words, "--methods", ",".join(settings.methods)])


def _how_measured() -> str:
    file = resources.files("cloud_aggregator.reproduce") / "how_measured.md"
    return file.read_text(encoding="utf-8").strip()


def _section(experiment: Judged) -> str:
    gathered = experiment.gathered
    parts = [
        f"## {gathered.name}",
        f"{capital(gathered.learning)}. {capital(gathered.priced)}. "
        f"{counted(len(gathered.seeds), 'seed')}.",
    ]
    if gathered.missing:
        parts.append(f"**Missing runs**: {'; '.join(gathered.missing)}.")
    parts += [markdown_table(gathered.runs), *_missed(gathered), summary(experiment)]
    claims = (f"- **{c.text}: {c.verdict}.** {c.sentence}" for c in experiment.claims)
    parts.append("\n".join(claims))
    if experiment.variants:
        parts.append("Variants: " + " ".join(experiment.variants))
    return "\n\n".join(parts)


def _missed(gathered: Gathered) -> list[str]:
    missed = {
        method: sum(r.missed for run in by_seed.values() for r in run.rounds)
        for method, by_seed in gathered.runs.items()
    }
    said = [f"{number} of {method}" for method, number in missed.items() if number]
    return [f"Updates that were late, lost or rejected: {joined(said)}."] if said else []


def _repeat(
    settings: Settings,
    runs: Sequence[PlannedRun],
    records: Mapping[str, RunRecord],
    out: Path,
) -> str:
    experiment = runs[0].experiment
    shown = "; ".join(f"{key} {getattr(experiment, key)}" for key in _SHOWN)
    seconds = sum(r.observed.wall_seconds for record in records.values() for r in record.rounds)
    lines = [
        f"    {command(settings, experiment.total_rounds, experiment.steps_of('instruction'))}\n",
        f"- Seeds: {', '.join(map(str, settings.seeds))}.",
        f"- Settings: {shown}.",
        f"- Runs: {len(records)} of {len(runs)}; their rounds took {duration(seconds)} in all.",
    ]
    hashes = {
        f"base {r.model.name} {r.model.sha256[:12]}, tokenizer {r.model.tokenizer_sha256[:12]}, "
        f"data {Path(r.data.source).name} {(r.data.sha256 or '')[:12]} "
        f"({r.data.examples:,} examples)"
        for r in records.values()
    }
    lines += [f"- Hashes: {text}." for text in sorted(hashes)]
    lines += [f"- {text}" for text in machines(runs, records, out)]
    return "\n".join(lines)


def machines(runs: Sequence[PlannedRun], records: Mapping[str, RunRecord], out: Path) -> list[str]:
    """Return what the runs say that they ran on, and how many of them."""
    found: Counter[str] = Counter()
    for run in runs:
        if run.name in records:
            config: dict[str, Any] = read_toml(folder_of(out, run).path / "config.toml")
            machine, packages = config.get("machine", {}), config.get("packages", {})
            workers = counted(records[run.name].workers, "worker")
            versions = ", ".join(f"{name} {number}" for name, number in packages.items())
            found[
                f"Machine: {machine.get('cpu')}, {machine.get('system')}, {workers} of "
                f"{counted(run.experiment.threads, 'thread')}; pwff {records[run.name].version}, "
                f"Python {machine.get('python')}, {versions}."
            ] += 1
    many = len(found) > 1
    return [f"{text} ({counted(n, 'run')})" if many else text for text, n in found.items()]


def capital(text: str) -> str:
    """Return a text as a sentence begins."""
    return text[:1].upper() + text[1:]
