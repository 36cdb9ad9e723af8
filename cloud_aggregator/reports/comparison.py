"""Several runs side by side: who leads by which figure, and in what they are not comparable."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from cloud_aggregator.records import RunRecord
from cloud_aggregator.reports import words
from cloud_aggregator.reports.canvas import Chart
from cloud_aggregator.reports.cost_plots import overlay
from cloud_aggregator.reports.plots import ACCURACY
from cloud_aggregator.reports.series import mean_accuracy, round_rows, tracks, worst

Runs = Sequence[tuple[str, RunRecord]]
_TIE_DIGITS = 4  # of a share: 0.01 percentage points


@dataclass(frozen=True, kw_only=True)
class Respect:
    """Something that runs must agree in for their figures to be held against one another."""

    name: str
    key: Callable[[RunRecord], Hashable]
    text: Callable[[RunRecord], str]


@dataclass(frozen=True, kw_only=True)
class ClientRow:
    """One client in every run: its accuracy after each, and its differences from the first."""

    id: str
    after: tuple[float | None, ...]
    differences: tuple[float | None, ...]


def _split(run: RunRecord) -> str:
    data = run.data
    terms = [data.partition or "not recorded"]
    terms += [f"alpha {words.number(data.alpha)}"] if data.alpha is not None else []
    terms += [f"skew {words.number(data.skew)}"] if data.skew is not None else []
    return " ".join(terms)


def _hashes(run: RunRecord) -> str:
    return ", ".join(f"{name} {value[:8]}" for name, value in sorted(run.data.preferences.items()))


RESPECTS: tuple[Respect, ...] = (
    Respect(
        name="model",
        key=lambda run: (run.model.sha256, run.model.tokenizer_sha256),
        text=lambda run: f"{run.model.name} ({run.model.sha256[:8]})",
    ),
    Respect(
        name="data",
        key=lambda run: (
            run.data.source, run.data.sha256, run.data.examples, run.data.held_out_examples
        ),
        text=lambda run: f"{run.data.source} ({run.data.examples:,} examples)",
    ),
    Respect(
        name="preference data",
        key=lambda run: tuple(sorted(run.data.preferences.items())),
        text=lambda run: _hashes(run) or "none",
    ),
    Respect(
        name="partition of the data",
        key=lambda run: (run.data.partition, run.data.alpha, run.data.skew),
        text=_split,
    ),
    Respect(
        name="clients",
        key=lambda run: frozenset((client.id, client.profile) for client in run.clients),
        text=lambda run: words.clients(len(run.clients)),
    ),
    Respect(
        name="stages",
        key=lambda run: tuple(run.stages),
        text=lambda run: ", ".join(run.stages),
    ),
    Respect(
        name="the shape that costs are computed at",
        key=words.priced,
        text=lambda run: words.priced(run) or "the model's own",
    ),
    Respect(
        name="number of finished rounds",
        key=lambda run: len(run.rounds),
        text=lambda run: words.rounds(len(run.rounds)),
    ),
)  # fmt: skip


def leader(runs: Runs) -> str:
    """Return the sentence with the highest accuracy; runs equal to 0.01 points are a tie."""
    after = [(name, run.summary.eval_accuracy_after) for name, run in runs]
    measured = [(name, round(value, _TIE_DIGITS)) for name, value in after if value is not None]
    missing = [name for name, value in after if value is None]
    if not measured:
        return "Held-out accuracy is not measured in any of these runs."
    rest = f" Not measured in {words.listed(missing, 6)}." if missing else ""
    top = max(value for _, value in measured)
    first = [name for name, value in measured if value == top]
    others = [(name, value) for name, value in measured if value < top]
    figure = words.percent(top, 2)
    if len(measured) == 1:
        return f"Only {first[0]} has a held-out accuracy: {figure} (example-weighted).{rest}"
    text = f"Highest held-out accuracy at the end: {figure} (example-weighted), "
    text += f"{words.listed(first, 6)} tie" if len(first) > 1 else first[0]
    if others:
        name, value = max(others, key=lambda pair: pair[1])
        text += f"; next {words.percent(value, 2)}, {name}"
    return f"{text}.{rest}"


def not_comparable(runs: Runs) -> list[str]:
    """Return one sentence for each respect in which the runs differ."""
    said = []
    for respect in RESPECTS:
        groups: dict[Hashable, list[str]] = {}
        texts: dict[Hashable, str] = {}
        for name, run in runs:
            groups.setdefault(respect.key(run), []).append(name)
            texts[respect.key(run)] = respect.text(run)
        if len(groups) > 1:
            parts = [f"{words.listed(names, 6)}: {texts[key]}" for key, names in groups.items()]
            same = len(set(texts.values())) == 1
            said.append(
                f"Not comparable in {respect.name}: {'; '.join(parts)}"
                + (", but not the same ones." if same else ".")
            )
    return said + _unlike_holdings(runs) + _unchecked(runs)


def client_rows(runs: Runs) -> list[ClientRow]:
    """Return the clients that every run has, in the first run's order."""
    found = [{track.id: track.after for track in tracks(run)} for _, run in runs]
    rows = []
    for client in found[0]:
        if all(client in others for others in found):
            after = tuple(values[client] for values in found)
            first = after[0]
            rows.append(
                ClientRow(
                    id=client,
                    after=after,
                    differences=tuple(
                        None if first is None or value is None else value - first
                        for value in after[1:]
                    ),
                )
            )
    return rows


def worst_text(run: RunRecord) -> str:
    """Return the lowest accuracy of a client and whose it is."""
    lowest = worst(tracks(run))
    if not lowest:
        return words.NOT_MEASURED
    return f"{words.percent(lowest[0].after)} ({words.listed([t.id for t in lowest], 2)})"


def overlays(runs: Runs) -> list[Chart]:
    """Return accuracy over rounds, and over the bytes sent up until then."""
    lines = [(name, mean_accuracy(run)) for name, run in runs]
    rounds = [list(map(float, range(len(values)))) for _, values in lines]
    sent = [
        [0.0, *accumulate(row.upload_bytes / 1e6 for row in round_rows(run))] for _, run in runs
    ]
    shown = replace(ACCURACY, name="over-rounds")
    charts = [overlay(lines, places=rounds, axis="rounds", shown=shown)]
    if any(places[-1] for places in sent):
        axis, shown = "megabytes sent up, all clients", replace(ACCURACY, name="over-bytes")
        charts.append(overlay(lines, places=sent, axis=axis, shown=shown))
    return charts


def _unlike_holdings(runs: Runs) -> list[str]:
    """Say it if clients of one name hold different examples, as they do under another seed."""
    held = [{c.id: (c.examples, c.held_out_examples, c.categories) for c in r.clients}
            for _, r in runs]  # fmt: skip
    shared = set(held[0]).intersection(*held[1:])
    unlike = sorted(i for i in shared if any(h[i] != held[0][i] for h in held))
    if not unlike:
        return []
    return [
        f"Not comparable client by client: {words.listed(unlike)} "
        f"hold{'s' if len(unlike) == 1 else ''} different examples from run to run."
    ]


def _unchecked(runs: Runs) -> list[str]:
    names = [name for name, run in runs if run.data.sha256 is None]
    if not names:
        return []
    return [f"That the data are the same is not checked: no hash in {words.listed(names, 6)}."]
