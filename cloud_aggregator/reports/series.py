"""A run's record turned over: one track a client, one row a round, and where figures come from.

Units: accuracy is a share in [0, 1], loss is nats, the rest bytes, seconds and joules.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cloud_aggregator.fairness import gap
from cloud_aggregator.records import ClientBefore, ClientRound, RoundRecord, RunRecord
from cloud_aggregator.summary import weighted_mean
from messaging.protocol import DeviceRecord

Values = tuple[float | None, ...]


def last_of(values: Sequence[float | None]) -> float | None:
    """Return the latest value after round 0 that was measured."""
    return next((value for value in reversed(values[1:]) if value is not None), None)


@dataclass(frozen=True, kw_only=True)
class Track:
    """One client through the run.

    Attributes:
        id: The client.
        device: What it said of itself; None if the record lacks it.
        accuracy: Before the first round, then after each; None where it was not measured.
        loss: Likewise.
        others: Likewise, accuracy on held-out examples of other clients.
        rounds: Its part of each round that it was in.
    """

    id: str
    device: DeviceRecord | None
    accuracy: Values
    loss: Values
    others: Values
    rounds: tuple[ClientRound, ...]

    @property
    def before(self) -> float | None:
        """Accuracy before the first round."""
        return self.accuracy[0]

    @property
    def after(self) -> float | None:
        """The latest accuracy after a round."""
        return last_of(self.accuracy)

    @property
    def beyond(self) -> float | None:
        """The latest accuracy on other clients' examples."""
        return last_of(self.others)

    @property
    def gap(self) -> float | None:
        """Accuracy on its own examples less that on others', the latest."""
        return gap(self.after, self.beyond)

    @property
    def change(self) -> float | None:
        """Accuracy after minus before."""
        after = self.after
        return None if self.before is None or after is None else after - self.before


@dataclass(frozen=True, kw_only=True)
class RoundRow:
    """One round in figures: counts of clients by status, means, sums over the clients."""

    record: RoundRecord
    counts: Counter[str]
    train_loss: float | None
    upload_bytes: int
    download_bytes: int


def tracks(run: RunRecord) -> list[Track]:
    """Return one track a client, in the order of the record."""
    devices = {device.id: device for device in run.clients}
    before: dict[str, ClientBefore] = {}
    for client in run.before:
        before.setdefault(client.id, client)
    rounds = [{client.id: client for client in record.clients} for record in run.rounds]
    ids = dict.fromkeys([*devices, *before, *(i for clients in rounds for i in clients)])
    found = []
    for name in ids:
        parts = [before.get(name), *(clients.get(name) for clients in rounds)]
        found.append(
            Track(
                id=name,
                device=devices.get(name),
                accuracy=tuple(_finite(p.eval_accuracy if p else None) for p in parts),
                loss=tuple(_finite(p.eval_loss if p else None) for p in parts),
                others=tuple(_finite(p.others_accuracy if p else None) for p in parts),
                rounds=tuple(clients[name] for clients in rounds if name in clients),
            )
        )
    return found


def best_first(clients: Iterable[Track]) -> list[Track]:
    """Return the clients by their latest accuracy, highest first; the unmeasured come last."""
    return sorted(clients, key=lambda t: (t.after is None, -(t.after or 0.0), t.id))


def worst(clients: Iterable[Track]) -> list[Track]:
    """Return the clients with the lowest latest accuracy: none, one, or all that tie."""
    measured = [(t.after, t) for t in clients if t.after is not None]
    lowest = min((value for value, _ in measured), default=None)
    return [track for value, track in measured if value == lowest]


def mean_accuracy(run: RunRecord) -> Values:
    """Return the example-weighted accuracy before the first round and after each."""
    weights = {device.id: device.held_out_examples for device in run.clients}
    before = weighted_mean([(c.eval_accuracy, weights.get(c.id, 0)) for c in run.before])
    return (before, *(_finite(r.global_.eval_accuracy) for r in run.rounds))


def mean_others(run: RunRecord) -> Values:
    """Return the accuracy on other clients' examples before the first round and after each."""
    weights = {device.id: device.held_out_examples for device in run.clients}
    before = weighted_mean([(c.others_accuracy, weights.get(c.id, 0)) for c in run.before])
    return (before, *(_finite(r.global_.others_accuracy) for r in run.rounds))


def mean_loss(run: RunRecord) -> Values:
    """Return the example-weighted loss before the first round and after each."""
    weights = {device.id: device.held_out_examples for device in run.clients}
    before = weighted_mean([(c.eval_loss, weights.get(c.id, 0)) for c in run.before])
    return (before, *(_finite(r.global_.eval_loss) for r in run.rounds))


def round_rows(run: RunRecord) -> list[RoundRow]:
    """Return one row a round; train loss is weighted by training examples, or by pairs."""
    examples = {device.id: device.examples for device in run.clients}
    pairs = {device.id: device.preference_pairs for device in run.clients}
    return [
        RoundRow(
            record=record,
            counts=Counter(client.status for client in record.clients),
            train_loss=weighted_mean(
                [
                    (c.train_loss, (pairs if record.stage == "reward" else examples).get(c.id, 0))
                    for c in record.clients
                ]
            ),
            upload_bytes=sum(client.upload_bytes for client in record.clients),
            download_bytes=sum(client.download_bytes for client in record.clients),
        )
        for record in run.rounds
    ]


def source_of_costs(run: RunRecord) -> str:
    """Return whether airtime, energy, compute and virtual time are modelled or measured."""
    kinds = Counter(device.costs for device in run.clients)
    if len(kinds) == 1:
        return next(iter(kinds))
    if not kinds:
        return "source not recorded"
    return f"modelled for {kinds['modelled']}, measured for {kinds['measured']} clients"


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
