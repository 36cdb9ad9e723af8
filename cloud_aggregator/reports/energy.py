"""Where the energy went: each part apart, and whether it is modelled or measured.

Units: joules; what a battery has left is a share in [0, 1].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from cloud_aggregator.records import ClientRound, RunRecord
from cloud_aggregator.reports.series import source_of_costs

MODELLED = "modelled"  # the radio, of real devices too: what they send goes over a modelled channel


@dataclass(frozen=True, kw_only=True)
class Part:
    """One thing that takes energy.

    Attributes:
        name: For identifiers on the page.
        title: For people.
        joules: Of a client's round.
        timed: Whether a real device times it; the power is its profile's all the same.
    """

    name: str
    title: str
    joules: Callable[[ClientRound], float]
    timed: bool = False


@dataclass(frozen=True, kw_only=True)
class EnergyRow:
    """Some clients' rounds together.

    Attributes:
        key: What stands in front: a round, a client, or both.
        joules: Sum of each part.
        battery_left: Of the one client; the lowest where there are several; none without a battery.
        basis: Whether training and waiting are modelled or measured.
    """

    key: tuple[str, ...]
    joules: tuple[float, ...]
    battery_left: float | None
    basis: str


PARTS = (
    Part(name="training", title="Training", joules=lambda c: c.compute_joules, timed=True),
    Part(name="radiated", title="Radiated", joules=lambda c: c.uplink_joules),
    Part(name="circuits", title="Radio circuits", joules=lambda c: c.uplink_circuit_joules),
    Part(name="reception", title="Reception", joules=lambda c: c.downlink_joules),
    Part(name="waiting", title="Waiting", joules=lambda c: c.idle_joules, timed=True),
)
#: No part of what was spent: what sending at once would have taken more.
SAVED = Part(name="saved", title="Uplink energy saved", joules=lambda c: c.uplink_joules_saved)


def basis(part: Part, source: str) -> str:
    """Return whether a part is modelled or measured, where what is timed is so by ``source``."""
    return source if part.timed else MODELLED


def columns(runs: Iterable[RunRecord]) -> tuple[Part, ...]:
    """Return the parts, and what was saved if any of these runs waited for a good channel."""
    waited = any(SAVED.joules(client) for run in runs for client in _clients(run))
    return (*PARTS, SAVED) if waited else PARTS


def total(part: Part, clients: Iterable[ClientRound]) -> float:
    """Return the sum of a part, in joules; it does not depend on the order."""
    return math.fsum(part.joules(client) for client in clients)


def of_run(name: str, run: RunRecord, parts: Sequence[Part]) -> EnergyRow:
    """Return a whole run as one row: the sums over clients and rounds, the emptiest battery."""
    return _row((name,), [*_clients(run)], parts, source_of_costs(run))


def by_round(run: RunRecord, parts: Sequence[Part]) -> list[EnergyRow]:
    """Return one row a round, over its clients."""
    source = source_of_costs(run)
    return [_row((str(n),), r.clients, parts, source) for n, r in enumerate(run.rounds, 1)]


def by_client(run: RunRecord, parts: Sequence[Part]) -> list[EnergyRow]:
    """Return one row a client, over its rounds, with what its battery has left after the last."""
    own: dict[str, list[ClientRound]] = {}
    for client in _clients(run):
        own.setdefault(client.id, []).append(client)
    return [_row((i,), entries, parts, _basis_of(run, i), last=True) for i, entries in own.items()]


def each(run: RunRecord, parts: Sequence[Part]) -> list[EnergyRow]:
    """Return one row for each client in each round."""
    return [
        _row((str(n), client.id), [client], parts, _basis_of(run, client.id))
        for n, record in enumerate(run.rounds, 1)
        for client in record.clients
    ]


def _row(
    key: tuple[str, ...],
    clients: Sequence[ClientRound],
    parts: Sequence[Part],
    source: str,
    *,
    last: bool = False,
) -> EnergyRow:
    left = [c.battery_left for c in clients if c.battery_left is not None]
    return EnergyRow(
        key=key,
        joules=tuple(total(part, clients) for part in parts),
        battery_left=(left[-1] if last else min(left)) if left else None,
        basis=source,
    )


def _clients(run: RunRecord) -> Iterable[ClientRound]:
    return (client for record in run.rounds for client in record.clients)


def _basis_of(run: RunRecord, client: str) -> str:
    said = {device.id: device.costs for device in run.clients}
    return said.get(client, "source not recorded")
