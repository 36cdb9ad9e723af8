"""The figure: the front of the two rewards, and each reward over the weight of helpfulness."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from cloud_aggregator.reports.canvas import colour
from cloud_aggregator.reproduce.figure import STYLE, quieten
from cloud_aggregator.reproduce.pareto.gather import FrontPoint, by_weight
from cloud_aggregator.reproduce.words import NO_EVIDENCE
from device_profiles.methods import OBJECTIVES

_SHADES = {"helpfulness": "c1", "harmlessness": "c2"}


def draw(points: Sequence[FrontPoint], learning: str, *, quick: bool) -> Figure:
    """Return the figure."""
    with rc_context(STYLE):
        layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12)
        figure = Figure(figsize=(11, 4.2), layout=layout, facecolor="white")
        front, over = figure.subplots(1, 2)
        _front(front, points)
        _over_weight(over, points)
        figure.supxlabel(
            f"Mean over the clients by the judge ({learning}); a large dot or line is the mean "
            "over the seeds, a small dot one seed.",
            fontsize=8.5, color=colour("muted"),
        )  # fmt: skip
        if quick:
            figure.suptitle(NO_EVIDENCE, color=colour("worst"), fontweight="bold")
        return figure


def _front(axes: Axes, points: Sequence[FrontPoint]) -> None:
    quieten(axes)
    means = []
    for weight, own in by_weight(points).items():
        helpful, harmless = ([p.of(name) for p in own] for name in OBJECTIVES)
        axes.plot(helpful, harmless, ".", color=colour("client"), markersize=5)
        means.append((weight, fmean(helpful), fmean(harmless)))
    axes.plot(
        [h for _, h, _ in means], [s for _, _, s in means], "o-", color=colour("c1"), linewidth=1.2
    )
    for weight, helpful_mean, harmless_mean in means:
        axes.annotate(
            f"{weight:g}", (helpful_mean, harmless_mean), (5, 5), textcoords="offset points"
        )
    axes.set_title("held-out rewards by weight of helpfulness", loc="left")
    axes.set_xlabel("helpfulness, deviations of the judge's scores")
    axes.set_ylabel("harmlessness, deviations")


def _over_weight(axes: Axes, points: Sequence[FrontPoint]) -> None:
    quieten(axes)
    table = by_weight(points)
    for name in OBJECTIVES:
        shade = colour(_SHADES[name])
        for weight, own in table.items():
            axes.plot([weight] * len(own), [p.of(name) for p in own], ".", color=shade, alpha=0.4)
        means = [fmean(p.of(name) for p in own) for own in table.values()]
        axes.plot([*table], means, "o-", color=shade, label=name)
    axes.set_title("each reward over the weight", loc="left")
    axes.set_xlabel("weight of helpfulness")
    axes.set_ylabel("judge's reward, deviations")
    axes.legend(frameon=False, loc="best", fontsize=8)
