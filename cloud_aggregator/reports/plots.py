"""The charts of what a run came to: accuracy and loss per round, by client, and on which data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes

from cloud_aggregator.records import RunRecord
from cloud_aggregator.reports import words
from cloud_aggregator.reports.axes import bar_end, cut, line, name_rows, rounds_axis, row_height
from cloud_aggregator.reports.canvas import Chart, Key, colour, draw
from cloud_aggregator.reports.series import Track, Values, best_first, last_of, worst


@dataclass(frozen=True, kw_only=True)
class Metric:
    """What a line chart shows; ``scale`` turns the record's unit into the axis' one."""

    name: str
    axis: str
    scale: float
    of: Callable[[Track], Values]
    is_worse: Callable[[float, float], bool]
    text: Callable[[float | None], str]
    worst_word: str


ACCURACY = Metric(
    name="accuracy",
    axis="held-out accuracy, %",
    scale=100.0,
    of=lambda track: track.accuracy,
    is_worse=lambda a, b: a < b,
    text=words.percent,
    worst_word="lowest",
)
LOSS = Metric(
    name="loss",
    axis="held-out loss, nats",
    scale=1.0,
    of=lambda track: track.loss,
    is_worse=lambda a, b: a > b,
    text=words.nats,
    worst_word="highest",
)


def per_round(run: RunRecord, clients: Sequence[Track], mean: Values, metric: Metric) -> Chart:
    """Return the lines of every client, their weighted mean bold, the worst one named."""
    title = f"Held-out {metric.name} per round"
    lines = [(t.id, metric.of(t)) for t in clients if any(v is not None for v in metric.of(t))]
    if not lines:
        return Chart(title=title, caption=f"Held-out {metric.name}: not measured.")
    lowest: tuple[str, Values] | None = None
    for client, values in lines:
        value, least = last_of(values), last_of(lowest[1]) if lowest else None
        if value is not None and (least is None or metric.is_worse(value, least)):
            lowest = (client, values)

    def paint(axes: Axes) -> None:
        for _, values in lines:
            line(axes, values, metric.scale, colour("client"), 0.9, alpha=0.75)
        if lowest:
            line(axes, lowest[1], metric.scale, colour("worst"), 1.8)
        line(axes, mean, metric.scale, colour("mean"), 3.0)
        rounds_axis(axes, run, first=0)
        axes.set_ylabel(metric.axis)

    ends = f"{metric.text(mean[0])} before, {metric.text(last_of(mean))} after"
    keys = [Key(colour="mean", label=f"weighted mean ({ends})")]
    if lowest:
        figure = f"{metric.worst_word} at the end: {metric.text(last_of(lowest[1]))}"
        keys.append(Key(colour="worst", label=f"{lowest[0]} ({figure})"))
    keys.append(Key(colour="client", label=f"each of {words.clients(len(lines))}", mark="thin"))
    gaps = any(value is None for _, values in lines for value in values)
    caption = "Round 0 is before the first round; the mean is weighted by held-out examples." + (
        " A gap: not measured." if gaps else ""
    )
    label = f"{title}. {'; '.join(key.label for key in keys)}."
    image = draw(paint, name=metric.name, label=label)
    return Chart(title=title, caption=caption, image=image, keys=tuple(keys))


def before_and_after(clients: Sequence[Track]) -> Chart:
    """Return each client's accuracy before and after as two points and a line, best on top."""
    title = "Held-out accuracy of each client, before and after"
    measured = [t for t in best_first(clients) if t.before is not None or t.after is not None]
    if not measured:
        return Chart(title=title, caption="Held-out accuracy: not measured.")
    shown, left_out = cut(measured)
    marked = [track.id for track in worst(shown)]

    def paint(axes: Axes) -> None:
        for row, track in enumerate(shown):
            shade = colour("worst" if track.id in marked else "mean")
            values = [100 * v for v in (track.before, track.after) if v is not None]
            axes.plot(values, [row] * len(values), color=shade, linewidth=1.8, alpha=0.55)
            if track.before is not None:
                axes.plot(values[0], row, "o", color=shade, mfc=colour("card"), ms=6, mew=1.5)
            if track.after is not None:
                axes.plot(values[-1], row, "o", color=shade, ms=7)
            if track.change is not None:
                bar_end(axes, words.points(track.change), max(values), row)
        name_rows(axes, [track.id for track in shown], marked)
        axes.margins(x=0.12)
        axes.set_xlabel("held-out accuracy, % (figures: change in points)")

    keys = (
        Key(colour="mean", label="before the first round", mark="ring"),
        Key(colour="mean", label="after the last round", mark="dot"),
        Key(colour="worst", label=f"lowest: {words.listed(marked)}", mark="dot"),
    )
    caption = f"Ordered by accuracy after the last round.{left_out}"
    image = draw(paint, name="change", label=f"{title}. {caption}", height=row_height(len(shown)))
    return Chart(title=title, caption=caption, image=image, keys=keys if marked else keys[:2])


def categories(clients: Sequence[Track]) -> Chart:
    """Return what each client's examples are about, as stacked shares of its own."""
    title = "Data of each client: examples by category"
    there = [(t.id, t.device.categories) for t in best_first(clients) if t.device]
    held = [(client, counts) for client, counts in there if sum(counts.values())]
    if not held:
        return Chart(title=title, caption="Categories of the examples: not recorded.")
    shown, left_out = cut(held)
    totals: dict[str, int] = {}
    for _, counts in held:
        for name, count in counts.items():
            totals[name] = totals.get(name, 0) + count
    ranked = sorted(totals, key=lambda name: (-totals[name], name))
    named = ranked if len(ranked) <= 8 else ranked[:7]
    stacks = [(f"c{n + 1}", [name]) for n, name in enumerate(named)]
    if ranked[len(named) :]:
        stacks.append(("other", ranked[len(named) :]))

    def paint(axes: Axes) -> None:
        sums = np.array([sum(counts.values()) for _, counts in shown])
        left = np.zeros(len(shown))
        for shade, names in stacks:
            part = np.array([sum(counts.get(n, 0) for n in names) for _, counts in shown])
            axes.barh(
                range(len(shown)), part, left=left, height=0.72, color=colour(shade),
                edgecolor=colour("card"), linewidth=0.8,
            )  # fmt: skip
            left += part
        for row, total in enumerate(sums):
            bar_end(axes, f"{total:,}", float(total), row)
        name_rows(axes, [client for client, _ in shown])
        axes.margins(x=0.1)
        axes.set_xlim(left=0)
        axes.set_xlabel("examples")

    keys = [
        Key(colour=s, label=n[0] if s != "other" else f"{len(n)} other categories", mark="square")
        for s, n in stacks
    ]
    caption = f"{len(totals)} categories; the clients are in the order of their accuracy.{left_out}"
    image = draw(paint, name="data", label=f"{title}. {caption}", height=row_height(len(shown)))
    return Chart(title=title, caption=caption, image=image, keys=tuple(keys))
