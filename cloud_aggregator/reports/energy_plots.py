"""The charts of energy: each part of it round by round, batteries, and runs beside one another."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from cloud_aggregator.records import ClientRound, RunRecord
from cloud_aggregator.reports import energy, words
from cloud_aggregator.reports.axes import bar_end, cut, line, name_rows, rounds_axis, row_height
from cloud_aggregator.reports.canvas import SERIES, THIRD, Chart, Key, colour, draw
from cloud_aggregator.reports.energy import SAVED, Part
from cloud_aggregator.reports.series import Track, Values, source_of_costs

_UNITS = (("MJ", 1e6), ("kJ", 1e3), ("J", 1.0))
_HEIGHT = 200


def per_round(run: RunRecord, clients: Sequence[Track], parts: Sequence[Part]) -> list[Chart]:
    """Return one chart a part, then the batteries if there are any: each client, each round."""
    source = source_of_costs(run)
    charts = [_part(run, clients, part, energy.basis(part, source)) for part in parts]
    battery = _battery(run, clients)
    return [*charts, battery] if battery else charts


def of_runs(runs: Sequence[tuple[str, RunRecord]], parts: Sequence[Part]) -> list[Chart]:
    """Return one chart a part with a bar for each run: joules of a client in a round, on average.

    The mean is over the clients of the record, asked or not: runs of other lengths can be compared.
    """
    charts = []
    for part in parts:
        means = []
        for name, run in runs:
            entries = [client for record in run.rounds for client in record.clients]
            mean = energy.total(part, entries) / len(entries) if entries else None
            means.append((name, mean, energy.basis(part, source_of_costs(run))))
        charts.append(_beside(part, means))
    return charts


def _part(run: RunRecord, clients: Sequence[Track], part: Part, source: str) -> Chart:
    title = f"{part.title} ({source})"
    lines = {t.id: _values(run, t, part.joules) for t in clients if t.rounds}
    spent = {i: sum(v for v in values if v is not None) for i, values in lines.items()}
    if not any(v for values in lines.values() for v in values):
        return Chart(title=title, caption=f"{part.title}: none recorded.")
    unit, scale = _unit(v for values in lines.values() for v in values)
    most = max(spent, key=lambda i: spent[i])
    mean = _mean([*lines.values()])

    def paint(axes: Axes) -> None:
        for values in lines.values():
            _line(axes, values, 1 / scale, "client", 0.9)
        _line(axes, lines[most], 1 / scale, "worst", 1.6)
        _line(axes, mean, 1 / scale, "mean", 2.6)
        rounds_axis(axes, run, first=1)
        if min(v for values in lines.values() for v in values if v is not None) >= 0:
            axes.set_ylim(bottom=0)
        axes.set_ylabel(f"{unit} a client")

    keys = (
        Key(colour="mean", label="mean over the clients"),
        Key(colour="worst", label=f"most: {most} ({words.energy(spent[most])} in all)"),
        Key(colour="client", label="each client", mark="thin"),
    )
    caption = f"Total over clients and rounds: {words.energy(sum(spent.values()))}."
    if part is SAVED:
        caption += (
            " By waiting for good coherence blocks, against sending at once over the same channel;"
            " below 0 where it cost more."
        )
    image = draw(paint, name=part.name, label=f"{title}. {caption}", width=THIRD, height=_HEIGHT)
    return Chart(title=title, caption=caption, image=image, keys=keys)


def _battery(run: RunRecord, clients: Sequence[Track]) -> Chart | None:
    """Return what is left in the batteries after each round; none if no client has one."""
    lines = {t.id: _values(run, t, lambda part: part.battery_left) for t in clients}
    lines = {i: values for i, values in lines.items() if any(v is not None for v in values)}
    if not lines:
        return None
    title = f"Battery left ({energy.MODELLED})"
    last = {i: [v for v in values if v is not None][-1] for i, values in lines.items()}
    least = min(last, key=lambda i: last[i])

    def paint(axes: Axes) -> None:
        for values in lines.values():
            _line(axes, values, 100.0, "client", 0.9)
        _line(axes, lines[least], 100.0, "worst", 1.6)
        rounds_axis(axes, run, first=1)
        axes.set_ylabel("left, %")

    keys = (
        Key(colour="worst", label=f"least: {least} ({words.percent(last[least])} at the end)"),
        Key(colour="client", label=f"each of {words.clients(len(lines))} on battery", mark="thin"),
    )
    caption = "A full battery less all parts of the energy, of this round and those before."
    image = draw(paint, name="battery", label=f"{title}. {caption}", width=THIRD, height=_HEIGHT)
    return Chart(title=title, caption=caption, image=image, keys=keys)


def _beside(part: Part, means: Sequence[tuple[str, float | None, str]]) -> Chart:
    sources = list(dict.fromkeys(source for _, _, source in means))
    title = f"{part.title} ({sources[0] if len(sources) == 1 else 'see the table'})"
    if not any(mean for _, mean, _ in means):
        return Chart(title=title, caption=f"{part.title}: none recorded.")
    shown, left_out = cut(means)
    unit, scale = _unit(mean for _, mean, _ in shown)

    def paint(axes: Axes) -> None:
        for row, (_, mean, _) in enumerate(shown):
            if mean is None:
                bar_end(axes, words.NOT_MEASURED, 0.0, row)
                continue
            axes.barh(row, mean / scale, height=0.66, color=colour(SERIES[row % len(SERIES)]))
            bar_end(axes, words.energy(mean), max(mean / scale, 0.0), row)
        name_rows(axes, [name for name, _, _ in shown])
        axes.xaxis.set_major_locator(MaxNLocator(nbins=4, steps=[1, 2, 5, 10]))
        axes.margins(x=0.25)
        axes.set_xlabel(f"{unit} a client and round")

    caption = f"Mean over clients and rounds.{left_out}"
    name, height = f"runs-{part.name}", row_height(len(shown))
    image = draw(paint, name=name, label=f"{title}. {caption}", width=THIRD, height=height)
    return Chart(title=title, caption=caption, image=image)


def _values(run: RunRecord, track: Track, of: Callable[[ClientRound], float | None]) -> Values:
    """Return a figure of a client after each round; None where the record lacks the client."""
    own = [{c.id: c for c in record.clients}.get(track.id) for record in run.rounds]
    return tuple(None if entry is None else of(entry) for entry in own)


def _mean(lines: Sequence[Values]) -> Values:
    """Return the plain mean of the lines at each round."""
    found: list[float | None] = []
    for values in zip(*lines, strict=True):
        there = [v for v in values if v is not None]
        found.append(sum(there) / len(there) if there else None)
    return tuple(found)


def _line(axes: Axes, values: Values, scale: float, shade: str, width: float) -> None:
    places = [float(n) for n in range(1, len(values) + 1)]
    line(axes, values, scale, colour(shade), width, places=places)


def _unit(joules: Iterable[float | None]) -> tuple[str, float]:
    """Return the unit that suits the largest, and how many joules it is."""
    largest = max(abs(value) for value in joules if value is not None)
    return next((pair for pair in _UNITS if largest >= pair[1]), _UNITS[-1])
