"""The figure: for each experiment, the judge's reward over alignment, and what an upload costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from cloud_aggregator.reports.canvas import colour
from cloud_aggregator.reproduce.fig5.gather import Gathered, RewardRun
from cloud_aggregator.reproduce.fig5.plan import ABLATIONS, METHODS_OF_FIG5
from cloud_aggregator.reproduce.figure import STYLE, band, bars, name_lines, quieten
from cloud_aggregator.reproduce.words import NO_EVIDENCE, counted

_ORDER = (*METHODS_OF_FIG5, *ABLATIONS)
_SHADES = dict(zip(_ORDER, ("c1", "c2", "c3", "other", "c4", "c7", "c8"), strict=True))


def draw(experiments: Sequence[Gathered], *, quick: bool) -> Figure:
    """Return the figure, one row an experiment."""
    with rc_context(STYLE):
        rows = len(experiments)
        layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12)
        figure = Figure(figsize=(13.5, 0.7 + 3.1 * rows), layout=layout, facecolor="white")
        grid = figure.subplots(rows, 3, squeeze=False, width_ratios=(1.3, 1, 1))
        for axes, gathered in zip(grid, experiments, strict=True):
            _rewards(axes[0], gathered)
            _costs(axes[1], gathered, "uplink energy a round", lambda run: run.uplink_joules)
            _costs(axes[2], gathered, "uplink energy a run", lambda run: run.total_joules)
        figure.supxlabel(
            "Lines and bars: mean over the seeds; band: lowest to highest seed. shepherd has no "
            "alignment: its line is where stage 1 ends. Energy is of one client, and modelled.",
            fontsize=8.5, color=colour("muted"),
        )  # fmt: skip
        if quick:
            figure.suptitle(NO_EVIDENCE, color=colour("worst"), fontweight="bold")
        return figure


def _rewards(axes: Axes, gathered: Gathered) -> None:
    quieten(axes)
    longest = max(
        (len(run.points) for by_seed in gathered.runs.values() for run in by_seed.values()),
        default=1,
    )
    for method in _ORDER:
        runs = [*gathered.runs.get(method, {}).values()]
        if runs:
            level = not any(run.aligned for run in runs)
            curves = [run.curve * longest if level else run.curve for run in runs]
            band(axes, curves, method, colour(_SHADES[method]), dashed=level)
    axes.set_title(f"{gathered.name}, {counted(len(gathered.seeds), 'seed')}", loc="left")
    axes.set_xlabel("round of alignment")
    axes.set_ylabel(f"judge's reward, helpful + harmless\n({gathered.learning})")
    name_lines(axes)


def _costs(axes: Axes, gathered: Gathered, title: str, of: Callable[[RewardRun], float]) -> None:
    means = {
        method: fmean(of(run) for run in gathered.runs[method].values())
        for method in _ORDER
        if gathered.runs.get(method)
    }
    bars(axes, means, _SHADES, title=title, quantity=f"{title}, J", source=gathered.priced)
