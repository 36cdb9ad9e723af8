"""The chart of two figures a client: before and after, or a model beside a rule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes

from cloud_aggregator.reports import words
from cloud_aggregator.reports.axes import bar_end, cut, name_rows, row_height
from cloud_aggregator.reports.canvas import Chart, Key, colour, draw


@dataclass(frozen=True, kw_only=True)
class Ends:
    """One client's two figures, and what stands beside their difference."""

    id: str
    first: float | None
    last: float | None
    beside: str = ""

    @property
    def change(self) -> float | None:
        """The last minus the first."""
        return None if self.first is None or self.last is None else self.last - self.first


@dataclass(frozen=True, kw_only=True)
class TwoPoints:
    """What such a chart shows.

    Attributes:
        name: Unique on the page.
        title: For people.
        missing: What is said where no client has either figure.
        axis: The figure with its unit.
        scale: Turns the record's unit into the axis' one.
        text: A difference for people.
        first: What the ring is.
        last: What the dot is.
        caption: What the order is.
    """

    name: str
    title: str
    missing: str
    axis: str
    scale: float
    text: Callable[[float | None], str]
    first: str
    last: str
    caption: str


def two_points(clients: Sequence[Ends], shown: TwoPoints) -> Chart:
    """Return two points and a line a client, in their order; the lowest at the end are marked."""
    measured = [c for c in clients if c.first is not None or c.last is not None]
    if not measured:
        return Chart(title=shown.title, caption=shown.missing)
    rows, left_out = cut(measured)
    lowest = min((c.last for c in rows if c.last is not None), default=None)
    marked = [c.id for c in rows if c.last is not None and c.last == lowest]

    def paint(axes: Axes) -> None:
        for row, client in enumerate(rows):
            shade = colour("worst" if client.id in marked else "mean")
            values = [shown.scale * v for v in (client.first, client.last) if v is not None]
            axes.plot(values, [row] * len(values), color=shade, linewidth=1.8, alpha=0.55)
            if client.first is not None:
                axes.plot(values[0], row, "o", color=shade, mfc=colour("card"), ms=6, mew=1.5)
            if client.last is not None:
                axes.plot(values[-1], row, "o", color=shade, ms=7)
            if client.change is not None:
                text = f"{shown.text(client.change)}{client.beside}"
                bar_end(axes, text, max(values), row)
        name_rows(axes, [client.id for client in rows], marked)
        axes.margins(x=0.3 if any(client.beside for client in rows) else 0.12)
        axes.set_xlabel(shown.axis)

    keys = (
        Key(colour="mean", label=shown.first, mark="ring"),
        Key(colour="mean", label=shown.last, mark="dot"),
        Key(colour="worst", label=f"lowest: {words.listed(marked)}", mark="dot"),
    )
    caption = f"{shown.caption}{left_out}"
    image = draw(
        paint, name=shown.name, label=f"{shown.title}. {caption}", height=row_height(len(rows))
    )
    return Chart(title=shown.title, caption=caption, image=image, keys=keys if marked else keys[:2])
