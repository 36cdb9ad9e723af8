"""``fig5.md``: the tables, what they say of the paper's claims, and all it takes to repeat them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from cloud_aggregator.records import RunRecord
from cloud_aggregator.reports.words import duration
from cloud_aggregator.reproduce.claims import Claim
from cloud_aggregator.reproduce.document import capital, machines
from cloud_aggregator.reproduce.fig4 import EXPERIMENTS, PlannedRun
from cloud_aggregator.reproduce.fig5.claims import hacking, judge
from cloud_aggregator.reproduce.fig5.gather import Gathered
from cloud_aggregator.reproduce.fig5.plan import RewardSettings, Settings
from cloud_aggregator.reproduce.fig5.tables import judge_table, markdown_table
from cloud_aggregator.reproduce.judge_records import JudgeRecord
from cloud_aggregator.reproduce.words import NO_EVIDENCE, counted, joined

_SHOWN = (
    "clients", "fleet", "partition", "held_out_share", "batch_size", "learning_rate",
    "reward_batch_size", "reward_learning_rate", "algorithm", "rollouts", "alignment_learning_rate",
    "temperature", "kl_coefficient", "kl_target", "reward_drop", "max_new_tokens",
    "held_out_prompts", "max_length", "codec", "channel", "placement", "adapter_size",
    "trunk_precision", "reward_trunk", "reward_shares",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Judged:
    """One experiment with what its figures say of the claims."""

    gathered: Gathered
    claims: tuple[Claim, ...]


def held(gathered: Gathered) -> Judged:
    """Return an experiment with its claims held against its figures."""
    return Judged(gathered=gathered, claims=tuple(judge(gathered.runs)))


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
    judged_by: JudgeRecord,
    *,
    experiments: Sequence[Judged],
    runs: Sequence[PlannedRun],
    records: Mapping[str, RunRecord],
    out: Path,
) -> str:
    """Return the whole of ``fig5.md``."""
    parts = ["# Fig. 5 of arXiv 2404.13238v2, reproduced"]
    if settings.quick:
        parts.append(f"> **{NO_EVIDENCE}**")
    parts.append("![Reward over the rounds of alignment; energy of the uploads](fig5.svg)")
    parts += [_section(experiment) for experiment in experiments]
    parts += ["## The judge", judge_table(judged_by), judge_words(judged_by)]
    parts += ["## How it was measured", how_measured("fig5")]
    parts += ["## How to repeat it", "\n".join(_repeat(settings, runs, records, out))]
    return "\n\n".join(parts) + "\n"


def command(settings: Settings) -> str:
    """Return the command of the comparison; model and data by their last name, without a path."""
    words = ["pwff", "reproduce", "fig5", *shared_options(settings)]
    if settings.experiments != EXPERIMENTS:
        words += ["--experiments", ",".join(settings.experiments)]
    return " ".join([*words, "--methods", ",".join(settings.methods)])


def shared_options(settings: RewardSettings) -> list[str]:
    """Return the options that both reproductions with rewards have, as they were set."""
    words = ["--quick"] if settings.quick else []
    for option, values in (
        ("--seeds", settings.seeds),
        ("--rounds", settings.rounds),
        ("--local-steps", settings.local_steps),
    ):
        words += [option, ",".join(map(str, values))]
    given = {
        "--rollouts": settings.rollouts,
        "--max-new-tokens": settings.max_new_tokens,
        "--held-out-prompts": settings.held_out_prompts,
        "--clients": settings.clients,
        "--batch-size": settings.batch_size,
        "--held-out-share": settings.held_out_share,
        "--model": Path(settings.model).name,
        "--data": Path(settings.data).name,
        "--helpfulness": Path(settings.helpfulness).name,
        "--harmlessness": Path(settings.harmlessness).name,
    }
    for option, value in given.items():
        words += [] if value is None else [option, str(value)]
    return words


def judge_words(judge: JudgeRecord) -> str:
    """Return whether the judge beats the rules that look at length alone."""
    said = []
    for name, head in judge.heads.items():
        rule = max(head.longer_wins, 1 - head.longer_wins)
        word = "beats" if head.accuracy > rule else "does not beat"
        said.append(
            f"for {name} it {word} the better of 'the longer one wins' and 'the shorter one wins' "
            f"({100 * head.accuracy:.1f} against {100 * rule:.1f} %)"
        )
    return (
        f"On {joined([str(h.pairs) for h in judge.heads.values()])} held-out pairs, {joined(said)}."
    )


def how_measured(which: str) -> str:
    """Return the notes of one reproduction."""
    file = resources.files(f"cloud_aggregator.reproduce.{which}") / "how_measured.md"
    return file.read_text(encoding="utf-8").strip()


def repeat_lines(
    said: str,
    settings: RewardSettings,
    runs: Sequence[PlannedRun],
    records: Mapping[str, RunRecord],
    out: Path,
) -> list[str]:
    """Return the command, the settings, the hashes and the machines of a reproduction."""
    aligned = [run.experiment for run in runs if run.experiment.stage_names[1:]]
    experiment = (aligned or [run.experiment for run in runs])[0]
    shown = "; ".join(f"{key} {getattr(experiment, key)}" for key in _SHOWN)
    seconds = sum(r.observed.wall_seconds for record in records.values() for r in record.rounds)
    lines = [
        f"    {said}\n",
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
    pairs = {
        f"{name} pairs of the runs {sha256[:12]}"
        for r in records.values()
        for name, sha256 in r.data.preferences.items()
    }
    lines += [f"- Hashes: {text}." for text in [*sorted(hashes), *sorted(pairs)]]
    return lines + [f"- {text}" for text in machines(runs, records, out)]


def _repeat(
    settings: Settings,
    runs: Sequence[PlannedRun],
    records: Mapping[str, RunRecord],
    out: Path,
) -> list[str]:
    return repeat_lines(command(settings), settings, runs, records, out)


def _section(experiment: Judged) -> str:
    gathered = experiment.gathered
    parts = [
        f"## {gathered.name}",
        f"{capital(gathered.learning)}. {capital(gathered.priced)}. "
        f"{counted(len(gathered.seeds), 'seed')}.",
    ]
    if gathered.missing:
        parts.append(f"**Missing runs**: {'; '.join(gathered.missing)}.")
    parts += [markdown_table(gathered.runs), summary(experiment)]
    parts.append("\n".join(f"- **{c.text}: {c.verdict}.** {c.sentence}" for c in experiment.claims))
    if said := hacking(gathered.runs):
        parts.append(
            "Rise of the reward by alignment, by the reward models that the run learned and by the "
            f"judge. {'; '.join(said)}."
        )
    if undone := _taken_back(gathered):
        parts.append(f"Alignment was undone in its last round: {joined(undone)}.")
    return "\n\n".join(parts)


def _taken_back(gathered: Gathered) -> list[str]:
    return [
        f"{run.method}, seed {run.seed} ({run.taken_back})"
        for by_seed in gathered.runs.values()
        for run in by_seed.values()
        if run.taken_back
    ]
