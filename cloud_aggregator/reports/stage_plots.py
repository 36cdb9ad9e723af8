"""The charts of reward learning and of alignment."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from cloud_aggregator.records import RunRecord
from cloud_aggregator.reports import words
from cloud_aggregator.reports.canvas import THIRD, Chart
from cloud_aggregator.reports.round_lines import Lines, over_rounds
from cloud_aggregator.reports.stages import (
    Aligned,
    aligned,
    dropped,
    objectives,
    of_pairs,
    of_responses,
    pair_accuracy,
    pair_rows,
)
from cloud_aggregator.reports.two_points import Ends, TwoPoints, two_points
from cloud_aggregator.summary import weighted_mean
from messaging.protocol import Objective

LONGER = "the longer one wins"
_COIN = math.log(2)  # nats a pair: what it costs to know nothing
_SMALL: dict[str, Any] = {"width": THIRD, "height": 230}
_PAIRS = "held-out pairs"

PAIRS = Lines(
    name="pairs", what="Pair accuracy, all objectives", axis="held-out pairs, %",
    text=words.percent, scale=100.0, marked="lowest", weighted=_PAIRS,
)  # fmt: skip
#: Reward beside KL and length, then each objective and how responses end.
REWARDS = {
    "weighted reward": Lines(
        name="weighted-reward", what="Weighted reward", axis="deviations", text=words.score,
        marked="lowest", **_SMALL,
    ),
    "KL": Lines(
        name="kl", begins=False, what="KL from stage 1", axis="nats a response", text=words.nats,
        marked="highest", **_SMALL,
    ),
    "response length": Lines(
        name="length", begins=False, what="Response length", axis="tokens", text=words.tokens,
        **_SMALL,
    ),
    "helpfulness": Lines(
        name="helpfulness", what="Helpfulness", axis="deviations", text=words.score,
        marked="lowest", **_SMALL,
    ),
    "harmlessness": Lines(
        name="harmlessness", what="Harmlessness", axis="deviations", text=words.score,
        marked="lowest", **_SMALL,
    ),
    "ended responses": Lines(
        name="ended", begins=False, what="Responses that ended by themselves", axis="share, %",
        text=words.percent, scale=100.0, **_SMALL,
    ),
}  # fmt: skip
_KEPT = {
    "accuracy": Lines(
        name="kept-accuracy", what="Held-out accuracy in alignment", axis="held-out accuracy, %",
        text=words.percent, scale=100.0, marked="lowest",
    ),
    "loss": Lines(
        name="kept-loss", what="Held-out loss in alignment", axis="held-out loss, nats",
        text=words.nats, marked="highest",
    ),
}  # fmt: skip


def reward_learning(run: RunRecord) -> list[Chart]:
    """Return pair accuracy over the rounds, and each client's beside 'the longer one wins'."""
    chosen = objectives(run)
    longer = of_pairs(run, chosen, lambda figures: figures.longer_wins).mean
    lines = replace(PAIRS, beside=(LONGER, longer))
    return [over_rounds(run, pair_accuracy(run), lines), _against_longer(run)]


def of_objective(run: RunRecord, objective: Objective) -> list[Chart]:
    """Return accuracy, Bradley-Terry loss and calibration error of one objective's models."""
    accuracy, loss, error, longer = (
        of_pairs(run, [objective], of)
        for of in (
            lambda figures: figures.accuracy,
            lambda figures: figures.loss,
            lambda figures: figures.calibration_error,
            lambda figures: figures.longer_wins,
        )
    )
    common: dict[str, Any] = {"weighted": _PAIRS, "begins": False, **_SMALL}
    coin = (None, *[_COIN] * len(run.rounds))
    title = objective.capitalize()
    return [
        over_rounds(run, accuracy, Lines(
            name=f"{objective}-accuracy", what=f"{title}: pair accuracy", axis="held-out pairs, %",
            text=words.percent, scale=100.0, marked="lowest", beside=(LONGER, longer.mean),
            **common,
        )),
        over_rounds(run, loss, Lines(
            name=f"{objective}-loss", what=f"{title}: Bradley-Terry loss", axis="nats a pair",
            text=words.nats, marked="highest", beside=("a coin", coin), **common,
        )),
        over_rounds(run, error, Lines(
            name=f"{objective}-calibration", what=f"{title}: calibration error", axis="share, %",
            text=words.percent, scale=100.0, marked="highest", **common,
        )),
    ]  # fmt: skip


def alignment(run: RunRecord) -> list[Chart]:
    """Return reward beside KL and length, then the two objectives and how responses end."""
    return _responses(run, REWARDS)


def each_aligned(run: RunRecord) -> Chart:
    """Return each client's weighted reward before and after, with its own weights."""
    rows = sorted(aligned(run), key=_by_reward)
    return two_points(
        [
            Ends(
                id=row.id,
                first=row.before["weighted reward"],
                last=row.after["weighted reward"],
                beside=f" ({words.weights(row.preference)})" if row.preference else "",
            )
            for row in rows
        ],
        TwoPoints(
            name="rewarded",
            title="Weighted reward of each client, before and after",
            missing="Weighted reward: not measured.",
            axis="weighted reward, deviations",
            scale=1.0,
            text=words.gain,
            first="when alignment began",
            last="at its end",
            caption="Figures: change, and in brackets the user's own weights of helpfulness : "
            "harmlessness. Ordered by the reward at the end.",
        ),
    )


def kept(run: RunRecord) -> list[Chart]:
    """Return what alignment did to what instruction tuning had taught: accuracy and loss."""
    return [chart for chart in _responses(run, _KEPT) if chart.image]


def _responses(run: RunRecord, shown: Mapping[str, Lines]) -> list[Chart]:
    return [
        over_rounds(run, of_responses(run, name), replace(lines, dropped=dropped(run, name)))
        for name, lines in shown.items()
    ]


def _against_longer(run: RunRecord) -> Chart:
    """Return each client's reward models beside the rule that the longer response is better."""
    rows = pair_rows(run)
    found: list[Ends] = []
    for client in dict.fromkeys(row.id for row in rows):
        own = [row.figures for row in rows if row.id == client]
        found.append(
            Ends(
                id=client,
                first=weighted_mean([(f.longer_wins, f.pairs) for f in own]),
                last=weighted_mean([(f.accuracy, f.pairs) for f in own]),
            )
        )
    return two_points(
        sorted(found, key=lambda ends: (-(ends.last or 0.0), ends.id)),
        TwoPoints(
            name="longer",
            title=f"Reward models of each client beside '{LONGER}'",
            missing="Pair accuracy: not measured.",
            axis="held-out pairs, % (figures: difference in points)",
            scale=100.0,
            text=words.points,
            first=LONGER,
            last="reward models, after the last round",
            caption="Pairs of all objectives; ordered by the accuracy of the reward models.",
        ),
    )


def _by_reward(row: Aligned) -> tuple[bool, float, str]:
    after = row.after["weighted reward"]
    return (after is None, -(after or 0.0), row.id)
