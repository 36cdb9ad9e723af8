"""The chart of one figure over the rounds of a stage: clients, their mean, what it is beside."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from matplotlib.axes import Axes

from cloud_aggregator.records import RunRecord
from cloud_aggregator.reports import words
from cloud_aggregator.reports.axes import first_place, line, rounds_axis
from cloud_aggregator.reports.canvas import HALF, Chart, Key, colour, draw
from cloud_aggregator.reports.series import Values, last_of
from cloud_aggregator.reports.stages import Curves


@dataclass(frozen=True, kw_only=True)
class Lines:
    """What a chart over rounds shows.

    Attributes:
        name: Unique on the page.
        what: The figure in words.
        axis: Likewise, with its unit.
        text: The figure for people.
        scale: Turns the record's unit into the axis' one.
        marked: Which client is named by where it ends; none if empty.
        begins: Whether it is measured before the first round too.
        weighted: By what the mean is weighted; nothing where every client counts alike.
        beside: What stands beside the mean, dashed: its words and its values.
        dropped: What a round gave that was taken back, by round.
    """

    name: str
    what: str
    axis: str
    text: Callable[[float | None], str]
    scale: float = 1.0
    marked: Literal["lowest", "highest", ""] = ""
    begins: bool = True
    weighted: str = ""
    beside: tuple[str, Values] | None = None
    dropped: Mapping[int, float] = field(default_factory=dict)
    width: int = HALF
    height: int = 260


def over_rounds(run: RunRecord, curves: Curves, shown: Lines) -> Chart:
    """Return the lines of every client, their mean bold, one of them named, and what was dropped.

    Args:
        run: A run of one stage.
        curves: Of its clients.
        shown: What they are of.
    """
    title = f"{shown.what} per round"
    lines = {
        i: values for i, values in curves.clients.items() if any(v is not None for v in values)
    }
    if not lines:
        return Chart(title=title, caption=f"{shown.what}: not measured.")
    start = first_place(run)
    places = [float(start + n) for n in range(len(curves.mean))]
    named = _named(lines, shown.marked)
    beside = shown.beside

    def paint(axes: Axes) -> None:
        for values in lines.values():
            line(axes, values, shown.scale, colour("client"), 0.9, places=places, alpha=0.75)
        if named:
            line(axes, lines[named], shown.scale, colour("worst"), 1.8, places=places)
        if beside:
            more = {"linestyle": "--", "marker": ""} if len(places) > 2 else {"linestyle": "--"}
            line(axes, beside[1], shown.scale, colour("c2"), 2.0, places=places, **more)
        line(axes, curves.mean, shown.scale, colour("mean"), 3.0, places=places)
        for place, value in shown.dropped.items():
            axes.plot(place, shown.scale * value, "x", color=colour("worst"), ms=9, mew=2.4)
        rounds_axis(axes, run, first=0)
        axes.set_ylabel(shown.axis)

    word = "weighted mean" if shown.weighted else "mean"
    keys = [Key(colour="mean", label=f"{word} ({_ends(curves.mean, shown)})")]
    if beside:
        keys.append(Key(colour="c2", label=f"{beside[0]} ({shown.text(last_of(beside[1]))})",
                        mark="dash"))  # fmt: skip
    if named:
        figure = f"{shown.marked} at the end: {shown.text(last_of(lines[named]))}"
        keys.append(Key(colour="worst", label=f"{named} ({figure})"))
    keys.append(Key(colour="client", label=f"each of {words.clients(len(lines))}", mark="thin"))
    if shown.dropped:
        figures = words.listed([shown.text(value) for value in shown.dropped.values()])
        keys.append(Key(colour="worst", label=f"dropped with a round: {figures}", mark="cross"))
    caption = _caption(lines, shown, start)
    label = f"{title}. {'; '.join(key.label for key in keys)}."
    image = draw(paint, name=shown.name, label=label, width=shown.width, height=shown.height)
    return Chart(title=title, caption=caption, image=image, keys=tuple(keys))


def _named(lines: Mapping[str, Values], which: str) -> str:
    """Return the client that ends lowest or highest, the first of several."""
    ends = {i: end for i, values in lines.items() if (end := last_of(values)) is not None}
    if not which or not ends:
        return ""
    return (min if which == "lowest" else max)(ends, key=lambda i: ends[i])


def _ends(mean: Values, shown: Lines) -> str:
    after = f"{shown.text(last_of(mean))} after"
    return f"{shown.text(mean[0])} before, {after}" if shown.begins else after


def _caption(lines: Mapping[str, Values], shown: Lines, start: int) -> str:
    parts = [f"Round {start} is before the first round"] if shown.begins else []
    parts.append(
        f"the mean is weighted by {shown.weighted}"
        if shown.weighted
        else "the mean counts every client alike"
    )
    text = "; ".join(parts)
    gaps = any(None in values[0 if shown.begins else 1 :] for values in lines.values())
    return f"{text[0].upper()}{text[1:]}." + (" A gap: not measured." if gaps else "")
