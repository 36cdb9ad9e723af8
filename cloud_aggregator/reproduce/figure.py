"""The figure: for each experiment, accuracy over the rounds, and what a round's upload costs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from io import BytesIO
from statistics import fmean
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

from cloud_aggregator.reports.canvas import colour
from cloud_aggregator.reproduce.fig4 import CONTROL, FIGURE
from cloud_aggregator.reproduce.gather import Gathered, RoundFigures, RunFigures
from cloud_aggregator.reproduce.words import NO_EVIDENCE, amount, counted

_SHADES = dict(zip(FIGURE, ("c1", "c2", "c3", "c4", "other"), strict=True))
_LOGARITHMIC = 5.0  # largest over smallest, above which bars of equal scale hide the small ones
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "pwff",  # the same records give the same file
    "text.parse_math": False,
}


def draw(experiments: Sequence[Gathered], *, quick: bool) -> Figure:
    """Return the figure, one row an experiment; methods that are not in it stand in the tables."""
    with rc_context(STYLE):
        rows = len(experiments)
        layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12)
        figure = Figure(figsize=(12, 0.7 + 3.1 * rows), layout=layout, facecolor="white")
        grid = figure.subplots(rows, 3, squeeze=False, width_ratios=(1.4, 1, 1))
        for axes, gathered in zip(grid, experiments, strict=True):
            _learning(axes[0], gathered)
            _bars(axes[1], gathered, "uplink delay", "s", lambda r: r.uplink_seconds)
            _bars(axes[2], gathered, "uplink energy", "J", lambda r: r.uplink_joules)
        figure.supxlabel(
            "Lines and bars: mean over the seeds; band: lowest to highest seed. "
            "Delay and energy are of one client and round, and modelled.",
            fontsize=8.5, color=colour("muted"),
        )  # fmt: skip
        if quick:
            figure.suptitle(NO_EVIDENCE, color=colour("worst"), fontweight="bold")
        return figure


def svg(figure: Figure) -> bytes:
    """Return the figure as SVG: the same records give the same bytes."""
    return _saved(figure, format="svg", metadata={"Date": None})


def png(figure: Figure) -> bytes:
    """Return the figure as PNG."""
    return _saved(figure, format="png", dpi=150)


def _saved(figure: Figure, **how: Any) -> bytes:
    written = BytesIO()
    with rc_context(STYLE):
        if figure.get_layout_engine() is not None:
            _settle(figure)
        figure.savefig(written, **how)
    return written.getvalue()


def _settle(figure: Figure) -> None:
    """Lay a figure out once, in round numbers: the solver's last digits are its own each time."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for axes in figure.axes:
        left, bottom, width, height = (round(edge, 4) for edge in axes.get_position().bounds)
        axes.set_position((left, bottom, width, height))
    for text in figure.texts:
        x, y = text.get_position()
        text.set_position((round(x, 4), round(y, 4)))


def _learning(axes: Axes, gathered: Gathered) -> None:
    """Draw a line a method, the mean over its seeds, in a band from the lowest to the highest."""
    quieten(axes)
    for method in FIGURE:
        runs = [*gathered.runs.get(method, {}).values()]
        if not runs:
            continue
        curves = [[None if value is None else 100 * value for value in run.curve] for run in runs]
        band(axes, curves, method, colour(_SHADES[method]), dashed=method == CONTROL)
    axes.set_title(f"{gathered.name}, {counted(len(gathered.seeds), 'seed')}", loc="left")
    axes.set_xlabel("round")
    axes.set_ylabel(f"held-out accuracy, %\n({gathered.learning})")
    name_lines(axes)


def band(
    axes: Axes,
    curves: Sequence[Sequence[float | None]],
    label: str,
    shade: str,
    *,
    dashed: bool = False,
) -> None:
    """Draw the mean of curves, one a seed, in a band from the lowest to the highest.

    A round that not every seed has measured is left out.
    """
    columns = _complete(curves)
    places = [number for number, _ in columns]
    axes.fill_between(
        places,
        [min(column) for _, column in columns],
        [max(column) for _, column in columns],
        color=shade, alpha=0.15, linewidth=0,
    )  # fmt: skip
    axes.plot(
        places,
        [fmean(column) for _, column in columns],
        color=shade,
        linewidth=1.8,
        linestyle="--" if dashed else "-",
        label=label,
    )


def name_lines(axes: Axes) -> None:
    """Give an axis of rounds its legend, or say that nothing was run."""
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if axes.get_lines():
        axes.legend(frameon=False, loc="best", fontsize=8)
    else:
        axes.annotate("not run", (0.5, 0.5), xycoords="axes fraction", ha="center")


def _complete(curves: Sequence[Sequence[float | None]]) -> list[tuple[int, list[float]]]:
    """Return (round, value of each seed) for the rounds that every seed has measured."""
    columns = enumerate(zip(*curves, strict=False))  # a run may end early
    return [
        (number, [value for value in column if value is not None])
        for number, column in columns
        if None not in column
    ]


def _bars(
    axes: Axes, gathered: Gathered, title: str, unit: str, of: Callable[[RoundFigures], float]
) -> None:
    """Draw one bar a method: the mean over clients, rounds and seeds."""
    means = {m: _mean(gathered.runs[m].values(), of) for m in FIGURE if gathered.runs.get(m)}
    bars(
        axes,
        means,
        _SHADES,
        title=f"{title} a round",
        quantity=f"{title}, {unit}",
        source=gathered.priced,
    )


def bars(
    axes: Axes,
    means: Mapping[str, float],
    shades: Mapping[str, str],
    *,
    title: str,
    quantity: str,
    source: str,
) -> None:
    """Draw one bar a method, on a logarithmic scale where they are far apart.

    Args:
        axes: Empty.
        means: By method.
        shades: Names of colours, by method.
        title: Above it.
        quantity: Its name and unit.
        source: What it is computed at.
    """
    quieten(axes)
    axes.grid(visible=False, axis="y")
    positive = [value for value in means.values() if value > 0]
    logarithmic = bool(positive) and max(positive) / min(positive) > _LOGARITHMIC
    if logarithmic:
        axes.set_xscale("log")
        axes.set_xlim(min(positive) / 2, max(positive) * 3)
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    elif positive:
        axes.set_xlim(0, max(positive) * 1.25)
    for row, (method, value) in enumerate(means.items()):
        if value > 0:
            axes.barh(row, value, height=0.62, color=colour(shades[method]))
        axes.annotate(
            amount(value) if value > 0 else "0: sends nothing",
            (value or axes.get_xlim()[0], row),
            (4, 0), textcoords="offset points", va="center", fontsize=8, color=colour("muted"),
        )  # fmt: skip
    axes.set_yticks(range(len(means)), [*means])
    axes.set_ylim(max(len(means), 1) - 0.4, -0.6)
    axes.set_title(title, loc="left")
    scale = ", logarithmic" if logarithmic else ""
    axes.set_xlabel(f"{quantity}{scale}\n({source})", fontsize=8.5)


def _mean(runs: Iterable[RunFigures], of: Callable[[RoundFigures], float]) -> float:
    return fmean(run.mean(of) for run in runs)


def quieten(axes: Axes) -> None:
    """Leave of the frame what reads the figures."""
    axes.set_axisbelow(True)
    axes.grid(visible=True, color=colour("grid"), linewidth=0.7)
    axes.tick_params(length=0, colors=colour("muted"))
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set(color=colour("client"), linewidth=0.8)
