"""What the charts' axes have in common: rows named by client, rounds along the bottom, lines."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from typing import Any, TypeVar

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from cloud_aggregator.records import RunRecord
from cloud_aggregator.reports.canvas import colour

MOST_ROWS = 40  # clients that a chart by client shows; the table has all

Item = TypeVar("Item")


def short(text: str, most: int = 18) -> str:
    """Return ``text`` as a label on an axis: printable, of the font's letters, not too long."""
    plain = "".join(c if c.isprintable() and c.isascii() else "?" for c in text)
    return plain if len(plain) <= most else f"{plain[: most - 6]}..{plain[-4:]}"


def cut(items: Sequence[Item]) -> tuple[list[Item], str]:
    """Return as many as a chart has rows for, both ends among them, and the words that say so."""
    if len(items) <= MOST_ROWS:
        return [*items], ""
    places = [n * (len(items) - 1) // (MOST_ROWS - 1) for n in range(MOST_ROWS)]
    said = f" Shown: {MOST_ROWS} of {len(items)}, evenly over the order; the table has all."
    return [items[place] for place in places], said


def row_height(rows: int) -> int:
    """Return the height of a chart with one row a client, in CSS pixels at scale 1."""
    return 64 + 18 * max(rows, 4)


def name_rows(axes: Axes, names: Sequence[str], marked: Sequence[str] = ()) -> None:
    """Put one name a row on the y axis, the first on top; ``marked`` ones in the warning colour."""
    axes.set_yticks(range(len(names)), [short(name) for name in names])
    for tick, name in zip(axes.get_yticklabels(), names, strict=True):
        tick.set_fontsize(10)
        if name in marked:
            tick.set_color(colour("worst"))
            tick.set_fontweight("bold")
    axes.set_ylim(max(len(names), 4) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.grid(visible=True, axis="x", color=colour("grid"), linewidth=0.8)


def bar_end(axes: Axes, text: str, value: float, row: int) -> None:
    """Write a figure beside the end of a row."""
    axes.annotate(
        text, (value, row), (7, 0), textcoords="offset points", va="center", fontsize=9.5,
        color=colour("muted"),
    )  # fmt: skip


def line(
    axes: Axes,
    values: Sequence[float | None],
    scale: float,
    shade: str,
    width: float,
    *,
    places: Sequence[float] | None = None,
    **more: Any,
) -> None:
    """Draw one line over ``places``, else from round 0 on; what was not measured is a gap."""
    heights = [math.nan if value is None else scale * value for value in values]
    dots = {"marker": "o", "markersize": 1.6 + width} if len(values) <= 25 else {}
    axes.plot(
        places or range(len(values)), heights, color=shade, linewidth=width, **{**dots, **more}
    )


def first_place(run: RunRecord) -> int:
    """Return where a chart begins: the round before a run's, or its one stage's, first round."""
    return run.rounds[0].round - 1 if run.rounds else 0


def rounds_axis(axes: Axes, run: RunRecord, *, first: int) -> None:
    """Let the x axis count rounds; a run of several stages has them named and divided."""
    start = first_place(run)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    axes.set_xlim(start + first - 0.4, start + max(len(run.rounds), 1) + 0.4)
    stages = [(stage, len(list(part))) for stage, part in groupby(r.stage for r in run.rounds)]
    counted = len(stages) > 1 or start > 0
    axes.set_xlabel("round, counted over the stages" if counted else "round")
    end = 0.5
    for stage, length in stages if len(stages) > 1 else []:
        axes.axvline(end, color=colour("client"), linewidth=0.8, linestyle=(0, (2, 3)))
        axes.annotate(
            stage, (end, 1.0), (3, 3), xycoords=("data", "axes fraction"),
            textcoords="offset points", fontsize=9, color=colour("muted"),
        )  # fmt: skip
        end += length
