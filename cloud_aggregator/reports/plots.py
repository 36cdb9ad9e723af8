"""The charts of what a run came to: accuracy and loss per round, by client, and on which data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from matplotlib.axes import Axes

from cloud_aggregator.records import RunRecord
from cloud_aggregator.reports import words
from cloud_aggregator.reports.axes import bar_end, cut, name_rows, row_height
from cloud_aggregator.reports.canvas import Chart, Key, colour, draw
from cloud_aggregator.reports.round_lines import Lines, over_rounds
from cloud_aggregator.reports.series import (
    Track,
    best_first,
    mean_accuracy,
    mean_loss,
    mean_others,
)
from cloud_aggregator.reports.stages import Curves
from cloud_aggregator.reports.two_points import Ends, TwoPoints, two_points

ACCURACY = Lines(
    name="accuracy",
    what="Held-out accuracy",
    axis="held-out accuracy, %",
    text=words.percent,
    scale=100.0,
    marked="lowest",
    weighted="held-out examples",
)
LOSS = Lines(
    name="loss",
    what="Held-out loss",
    axis="held-out loss, nats",
    text=words.nats,
    marked="highest",
    weighted="held-out examples",
)


def per_round(run: RunRecord, clients: Sequence[Track]) -> list[Chart]:
    """Return accuracy and loss over the rounds of a run of one stage."""
    accuracy = Curves(clients={t.id: t.accuracy for t in clients}, mean=mean_accuracy(run))
    loss = Curves(clients={t.id: t.loss for t in clients}, mean=mean_loss(run))
    others = mean_others(run)
    beside = ("the same models on other clients' data", others) if any(others[1:]) else None
    shown = replace(ACCURACY, beside=beside)
    return [over_rounds(run, accuracy, shown), over_rounds(run, loss, LOSS)]


def before_and_after(clients: Sequence[Track]) -> Chart:
    """Return each client's accuracy before and after as two points and a line, best on top."""
    return two_points(
        [Ends(id=t.id, first=t.before, last=t.after) for t in best_first(clients)],
        TwoPoints(
            name="change",
            title="Held-out accuracy of each client, before and after",
            missing="Held-out accuracy: not measured.",
            axis="held-out accuracy, % (figures: change in points)",
            scale=100.0,
            text=words.points,
            first="before the first round",
            last="after the last round",
            caption="Ordered by accuracy after the last round.",
        ),
    )


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
