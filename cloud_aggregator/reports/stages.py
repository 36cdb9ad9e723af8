"""A run's later stages turned over: reward learning by objective, alignment by client.

Units: accuracies, calibration errors and ended responses are shares in [0, 1]; losses and KL are
nats; rewards are re-centred scores (deviations of the reference set's scores); lengths are tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from cloud_aggregator.records import ClientBefore, ClientRound, GlobalRound, RoundRecord, RunRecord
from cloud_aggregator.reports.series import Values, last_of
from cloud_aggregator.summary import of_stage, weighted_mean, weighted_reward
from messaging.protocol import Objective, PairFigures, Preference

OBJECTIVES: tuple[Objective, ...] = ("helpfulness", "harmlessness")  # in the order of the page

#: What is shown of alignment, by its words: the record's name for it.
FIGURES: dict[str, str] = {
    "weighted reward": "weighted_reward",
    "helpfulness": "reward_helpfulness",
    "harmlessness": "reward_harmlessness",
    "KL": "kl",
    "response length": "response_tokens",
    "ended responses": "responses_ended",
    "accuracy": "eval_accuracy",
    "loss": "eval_loss",
}

OfPairs = Callable[[PairFigures], float]
Measured = ClientRound | ClientBefore | GlobalRound


@dataclass(frozen=True, kw_only=True)
class Curves:
    """One figure over the rounds of a stage.

    Attributes:
        clients: By client, before the stage's first round, then after each; None where it was not
            measured.
        mean: Over the clients, likewise.
    """

    clients: dict[str, Values]
    mean: Values


@dataclass(frozen=True, kw_only=True)
class PairRow:
    """A client's latest held-out results of one reward model."""

    id: str
    objective: Objective
    figures: PairFigures


@dataclass(frozen=True, kw_only=True)
class Aligned:
    """One client's figure when alignment began and at its end."""

    id: str
    preference: Preference | None
    before: dict[str, float | None]
    after: dict[str, float | None]

    @property
    def change(self) -> float | None:
        """Weighted reward at the end minus that at the beginning."""
        before, after = self.before["weighted reward"], self.after["weighted reward"]
        return None if before is None or after is None else after - before


def stage_run(run: RunRecord, stage: str) -> RunRecord | None:
    """Return that stage of a run alone; none where it has no round of it."""
    found = next((record.stage for record in run.rounds if record.stage == stage), None)
    return of_stage(run, found) if found else None


def objectives(run: RunRecord) -> list[Objective]:
    """Return the objectives that a run learned reward models of."""
    there = {name for r in run.rounds for client in r.clients for name in client.pairs}
    return [name for name in OBJECTIVES if name in there]


def of_pairs(run: RunRecord, chosen: Sequence[Objective], of: OfPairs) -> Curves:
    """Return a figure of reward models over the rounds, weighted by held-out pairs.

    Args:
        run: That stage of a run.
        chosen: The objectives, one or several.
        of: What is shown of a client's held-out results.
    """
    clients: dict[str, Values] = {}
    for client in _ids(run):
        own = [_entry(record, client) for record in run.rounds]
        clients[client] = (None, *(_over(_pairs([c] if c else [], chosen), of) for c in own))
    return Curves(
        clients=clients,
        mean=(None, *(_over(_pairs(r.clients, chosen), of) for r in run.rounds)),
    )


def pair_accuracy(run: RunRecord) -> Curves:
    """Return the accuracy on the pairs of all objectives, before the first round too."""
    after = of_pairs(run, objectives(run), lambda figures: figures.accuracy)
    weights = dict.fromkeys(after.clients, 0)
    for row in pair_rows(run):
        weights[row.id] += row.figures.pairs
    before = {c.id: c.reward_accuracy for c in run.before}
    first = weighted_mean([(before.get(i), weight) for i, weight in weights.items()])
    clients = {i: (before.get(i), *values[1:]) for i, values in after.clients.items()}
    return Curves(clients=clients, mean=(first, *after.mean[1:]))


def pair_rows(run: RunRecord) -> list[PairRow]:
    """Return each client's latest results, one row an objective."""
    last: dict[str, ClientRound] = {}
    for record in run.rounds:
        last.update({client.id: client for client in record.clients if client.pairs})
    return [
        PairRow(id=i, objective=name, figures=last[i].pairs[name])
        for i in _ids(run)
        if i in last
        for name in OBJECTIVES
        if name in last[i].pairs
    ]


def of_responses(run: RunRecord, figure: str) -> Curves:
    """Return a figure of alignment over the rounds: its mean counts every client alike.

    Args:
        run: That stage of a run.
        figure: A name of ``FIGURES``.
    """
    before = {client.id: client for client in run.before}
    who = _preferences(run)
    clients: dict[str, Values] = {}
    for client in _ids(run):
        there = [_entry(record, client) for record in run.rounds]
        parts = [before.get(client), *there]
        clients[client] = tuple(_value(part, figure, who) if part else None for part in parts)
    columns = zip(*clients.values(), strict=True)
    mean = tuple(weighted_mean([(v, 1) for v in column]) for column in columns)
    return Curves(clients=clients, mean=mean or (None,) * (len(run.rounds) + 1))


def dropped(run: RunRecord, figure: str) -> dict[int, float]:
    """Return, by round that was taken back, the figure of the state that was dropped."""
    return {
        record.round: value
        for record in run.rounds
        if record.dropped and (value := _value(record.dropped, figure, {})) is not None
    }


def aligned(run: RunRecord) -> list[Aligned]:
    """Return every client at the beginning and at the end of alignment."""
    who = _preferences(run)
    curves = {name: of_responses(run, name).clients for name in FIGURES}
    return [
        Aligned(
            id=client,
            preference=who.get(client),
            before={name: values[client][0] for name, values in curves.items()},
            after={name: last_of(values[client]) for name, values in curves.items()},
        )
        for client in _ids(run)
    ]


def _value(part: Measured, figure: str, who: Mapping[str, Preference]) -> float | None:
    """Return a figure of a client in a round, before the first one, or of all clients."""
    if figure == "weighted reward" and not isinstance(part, GlobalRound):
        if part.id not in who:
            return None
        scores = part.reward_helpfulness, part.reward_harmlessness
        return _finite(weighted_reward(who[part.id], *scores))
    return _finite(getattr(part, FIGURES[figure], None))  # not all have all


def _preferences(run: RunRecord) -> dict[str, Preference]:
    return {device.id: device.preference for device in run.clients}


def _pairs(clients: Sequence[ClientRound], chosen: Sequence[Objective]) -> list[PairFigures]:
    return [client.pairs[name] for client in clients for name in chosen if name in client.pairs]


def _over(pairs: Sequence[PairFigures], of: OfPairs) -> float | None:
    return weighted_mean([(of(figures), figures.pairs) for figures in pairs])


def _entry(record: RoundRecord, client: str) -> ClientRound | None:
    return next((entry for entry in record.clients if entry.id == client), None)


def _ids(run: RunRecord) -> list[str]:
    entries = (client.id for record in run.rounds for client in record.clients)
    return [*dict.fromkeys([*(device.id for device in run.clients), *entries])]


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
