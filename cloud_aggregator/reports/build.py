"""The page: records in, one HTML file out that asks for nothing from anywhere.

Every figure is the record's; what a template adds is only how it is set.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from cloud_aggregator.counting_words import counting_lines
from cloud_aggregator.fairness import fairness_lines, gap
from cloud_aggregator.methods import METHODS
from cloud_aggregator.records import RunRecord, modelled_seconds
from cloud_aggregator.reports import (
    comparison,
    cost_plots,
    energy,
    energy_plots,
    plots,
    series,
    stage_views,
    words,
)
from cloud_aggregator.reports.canvas import PALETTE
from cloud_aggregator.reports.stages import stage_run
from cloud_aggregator.run_folder import RunFolder, read_record, write_atomically
from cloud_aggregator.summary import of_stage
from device_profiles.errors import InputError

_MOST_MISSED = 60  # updates that did not arrive, listed with their reasons
_MOST_ENTRIES = 400  # clients' rounds that the page lists one by one


def build_report(runs: Sequence[tuple[str, RunRecord]]) -> str:
    """Return the page: a report of one run, or a comparison of several.

    Args:
        runs: Name and record of each; equal names get a number.

    Raises:
        InputError: If there is no run.
    """
    if not runs:
        raise InputError("no run is named; give one run's folder, or several to compare")
    if len(runs) == 1:
        name, run = runs[0]
        return _environment().get_template("report.html.jinja").render(_one(name, run))
    return build_comparison(runs, template="comparison.html.jinja")


def build_comparison(runs: Sequence[tuple[str, RunRecord]], *, template: str, **more: Any) -> str:
    """Return a comparison of at least one run, on a template that shows ``more`` besides."""
    told = _told_apart(runs)
    return _environment().get_template(template).render(_several(told), **more)


def write_report(folders: Sequence[Path], out: Path | None) -> Path:
    """Write the page and return where it is.

    Args:
        folders: Folders of runs, or their ``run.json``.
        out: Where to; without it ``report.html`` in the one run's folder, or ``comparison.html``
            in the current one for several.

    Raises:
        InputError: If a run cannot be read or the page cannot be written.
        DiskFullError: If there is no room for it.
    """
    homes = [path.parent if path.is_file() else path for path in folders]
    runs = [
        (home.resolve().name, read_record(path)) for home, path in zip(homes, folders, strict=True)
    ]
    page = build_report(runs)
    to = out or (RunFolder(homes[0]).report_path if len(homes) == 1 else Path("comparison.html"))
    write_atomically(to, page.encode())
    return to


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("cloud_aggregator.reports", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = (
        words.percent, words.points, words.nats, words.size, words.energy, words.duration,
        words.number, words.clients, words.index, words.priced, words.score, words.gain,
        words.tokens, words.weights, words.evenness,
    )  # fmt: skip
    environment.filters.update({f.__name__: f for f in filters})
    environment.filters["figure_as"] = lambda value, name: environment.filters[name](value)
    environment.globals.update(
        palette=PALETTE, method_title=_method_title, basis=energy.basis, modelled=energy.MODELLED
    )
    return environment


def _one(name: str, run: RunRecord) -> dict[str, Any]:
    learned = of_stage(run, "instruction")
    found = series.tracks(learned)
    everyone = series.tracks(run)
    reward, alignment = stage_run(run, "reward"), stage_run(run, "alignment")
    views = {
        "reward": stage_views.reward_view(reward) if reward else None,
        "alignment": stage_views.alignment_view(alignment) if alignment else None,
    }
    rows = series.round_rows(run)
    source = series.source_of_costs(run)
    parts = energy.columns([run])
    entries = energy.each(run, parts)
    missed = [
        (record.round, client)
        for record in run.rounds
        for client in record.clients
        if client.status not in {"aggregated", "skipped"}
    ]
    return {
        "name": name,
        "run": run,
        "headlines": _headlines(run, learned, found, views),
        **views,
        "banner": _banner(run),
        "counted": counting_lines(run),
        "source": source,
        "tracks": found,
        "worst": [track.id for track in series.worst(found)],
        "rows": rows,
        "missed": missed[:_MOST_MISSED],
        "missed_more": len(missed[_MOST_MISSED:]),
        "uploads": sum(client.upload_bytes > 0 for r in run.rounds for client in r.clients),
        "wall_seconds": sum(r.observed.wall_seconds for r in run.rounds),
        "peak_memory": max((r.observed.peak_memory_bytes for r in run.rounds), default=0),
        "deployed": run.engine == "deployment",
        "retransmitted": sum(r.observed.retransmitted_bytes for r in run.rounds),
        "refused": _refused(run),
        "tuned": _tuned(run, learned),
        "fairness": fairness_lines(learned.summary),
        "beyond": any(track.beyond is not None for track in found),
        "learning": [*plots.per_round(learned, found), plots.before_and_after(found)],
        "data": plots.categories(found),
        "devices": cost_plots.devices(everyone, source),
        "costs": [
            cost_plots.bytes_per_round(run, rows),
            cost_plots.seconds_per_round(run, source),
        ],
        "parts": parts,
        "energy": energy_plots.per_round(run, everyone, parts),
        "energy_by_round": energy.by_round(run, parts),
        "energy_by_client": energy.by_client(run, parts),
        "energy_each": entries[:_MOST_ENTRIES],
        "energy_more": len(entries[_MOST_ENTRIES:]),
        "on_battery": any(entry.battery_left is not None for entry in entries),
    }


def fairness_of(folders: Sequence[Path]) -> list[str]:
    """Return how even each run is over its clients, and how personal their models are.

    Raises:
        InputError: If a run cannot be read.
    """
    said = []
    for path in folders:
        home = path.parent if path.is_file() else path
        lines = fairness_lines(of_stage(read_record(path), "instruction").summary)
        start = "" if len(folders) == 1 else f"{home.resolve().name}: "
        said += [f"{start}{line}" for line in lines]
    return said


def _tuned(run: RunRecord, learned: RunRecord) -> bool:
    """Say whether instruction tuning is a part of the run: its charts are shown."""
    return bool(learned.rounds) or "instruction" in run.stages


def _headlines(
    run: RunRecord, learned: RunRecord, found: Sequence[series.Track], views: dict[str, Any]
) -> list[words.Headline]:
    """Return what each stage came to, in their order."""
    first = words.headline(learned, found)
    later = [view["headline"] for view in views.values() if view]
    if not later:
        return [first]
    first = replace(first, text=f"Instruction tuning: {first.text[0].lower()}{first.text[1:]}")
    return [*([first] if _tuned(run, learned) else []), *later]


def _several(runs: Sequence[tuple[str, RunRecord]]) -> dict[str, Any]:
    learned = [(name, of_stage(run, "instruction")) for name, run in runs]
    rewards, reward_charts = stage_views.reward_views(runs)
    alignments, alignment_charts = stage_views.alignment_views(runs)
    parts = energy.columns(run for _, run in runs)
    totals = [energy.of_run(name, run, parts) for name, run in runs]
    return {
        "runs": [
            {
                "name": name,
                "run": run,
                "banner": _banner(run),
                "source": series.source_of_costs(run),
                "summary": alone.summary,
                "worst": comparison.worst_text(alone),
                "gap": gap(alone.summary.eval_accuracy_after, alone.summary.others_accuracy_after),
                "wall_seconds": sum(r.observed.wall_seconds for r in run.rounds),
                "virtual_seconds": modelled_seconds(run.rounds),
            }
            for (name, run), (_, alone) in zip(runs, learned, strict=True)
        ],
        "leader": comparison.leader(learned),
        "differences": comparison.not_comparable(runs),
        "charts": comparison.overlays(learned),
        "staged": any(len(run.stages) > 1 for _, run in runs),
        "rewards": rewards,
        "reward_charts": reward_charts,
        "alignments": alignments,
        "alignment_charts": alignment_charts,
        "parts": parts,
        "energy": energy_plots.of_runs(runs, parts),
        "totals": totals,
        "on_battery": any(row.battery_left is not None for row in totals),
        "clients": comparison.client_rows(learned),
        "most_clients": max(len(run.clients) for _, run in runs),
    }


def _banner(run: RunRecord) -> str:
    """Return what a reader must know of a run that is not done, or nothing."""
    count = len(run.rounds)
    done = f"{count or 'no'} finished round{'' if count == 1 else 's'}"
    extent = f"The figures are those of {done}." if count else "No round is finished."
    reason = f": {run.stop_reason}" if run.stop_reason else " (no reason recorded)"
    if run.status == "running":
        return f"This run was still running when its record was written; {done} so far."
    if run.status == "stopped":
        return f"This run was stopped before its end{reason}. {extent}"
    if run.status == "failed":
        return f"This run failed{reason}. {extent}"
    return ""


def _refused(run: RunRecord) -> dict[str, int]:
    """Return refused messages by code, over the run."""
    total: dict[str, int] = {}
    for record in run.rounds:
        for code, count in record.observed.refused.items():
            total[code] = total.get(code, 0) + count
    return total


def _method_title(name: str) -> str:
    return METHODS[name].title if name in METHODS else name


def _told_apart(runs: Sequence[tuple[str, RunRecord]]) -> list[tuple[str, RunRecord]]:
    """Return the runs under names of their own: an equal one gets a number."""
    told: dict[str, RunRecord] = {}
    for name, run in runs:
        own, count = name, 1
        while own in told:
            count += 1
            own = f"{name} ({count})"
        told[own] = run
    return list(told.items())
