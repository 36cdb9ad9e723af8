"""What a simulation found: a row a round, totals and fairness. All of it is modelled.

SI units: seconds of virtual time, joules, bytes.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from cloud_aggregator.simulation.settings import Simulation
from device_profiles.fading import Floats
from device_profiles.selection import jain_index

BASIS = "modelled"
PARTS = ("compute", "transmit", "circuit", "receive", "idle")


@dataclass(frozen=True, kw_only=True)
class RoundRow:
    """One round, or as many aggregations as one row tells of.

    Attributes:
        number: From 1.
        ended_at: Virtual second.
        seconds: That it took.
        asked: Tasks that were sent.
        accepted: Updates that counted.
        late: That came after the end of their round, and are left out.
        lost: Devices that left, ran out of energy, or whose update did not arrive.
        staleness: How many accepted updates had which staleness: 0, 1, 2-3, 4-7 and so on.
        mean_staleness: Of the accepted; 0 without any.
        most_staleness: Likewise.
        mean_weight: Of the accepted, by staleness (``fedasync``: with alpha); 0 without any.
        joules: By part; of each task in the row in which it ended, in rounds in its own round.
        bytes_up: Of updates that arrived, in time or not.
        bytes_down: Of global states, as far as they were received.
    """

    number: int
    ended_at: float
    seconds: float
    asked: int
    accepted: int
    late: int
    lost: int
    staleness: dict[str, int]
    mean_staleness: float
    most_staleness: int
    mean_weight: float
    joules: dict[str, float]
    bytes_up: float
    bytes_down: float

    @property
    def total_joules(self) -> float:
        """Of all parts."""
        return math.fsum(self.joules.values())


@dataclass(frozen=True, kw_only=True)
class Fairness:
    """How even a run was among all devices of the fleet.

    Attributes:
        jain_participations: Jain's index over accepted updates; none without any.
        jain_rates: Over the mean uplink rate that each had in its accepted updates, bit/s, of the
            devices with any.
        worst_decile_participations: Mean of the tenth of the devices with the fewest, over the
            mean of all.
        worst_decile_rate: Mean rate of the tenth with the lowest rates, bit/s, of those with any.
        never: Share of the devices that have none.
    """

    jain_participations: float | None
    jain_rates: float | None
    worst_decile_participations: float | None
    worst_decile_rate: float | None
    never: float


@dataclass(frozen=True, kw_only=True)
class Result:
    """A simulated run. ``unfinished``: tasks that were still under way at its end, not counted."""

    settings: Simulation
    rounds: tuple[RoundRow, ...]
    fairness: Fairness
    unfinished: int

    def totals(self) -> dict[str, Any]:
        """Return the sums over all rounds, and the virtual seconds."""
        rows = self.rounds
        joules = {part: math.fsum(row.joules[part] for row in rows) for part in PARTS}
        return {
            "seconds": rows[-1].ended_at if rows else 0.0,
            **{name: sum(getattr(row, name) for row in rows) for name in _COUNTS},
            "joules": joules,
            "total_joules": math.fsum(joules.values()),
        }

    def to_json(self) -> str:
        """Return everything; the same result gives the same text."""
        content = {
            "basis": BASIS,
            "settings": self.settings.model_dump(exclude_none=True),
            "totals": self.totals(),
            "unfinished": self.unfinished,
            "fairness": asdict(self.fairness),
            "rounds": [asdict(row) for row in self.rounds],
        }
        return json.dumps(content, indent=1, allow_nan=False)

    def to_csv(self) -> str:
        """Return the rounds as a table; joules a column a part."""
        out = io.StringIO()
        plain = ("number", "ended_at", "seconds", *_COUNTS, "mean_staleness", "mean_weight")
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow([*plain, *(f"{part}_joules_{BASIS}" for part in PARTS)])
        for row in self.rounds:
            writer.writerow([*(getattr(row, k) for k in plain), *(row.joules[p] for p in PARTS)])
        return out.getvalue()


_COUNTS = ("asked", "accepted", "late", "lost", "bytes_up", "bytes_down")


def fairness(participations: Floats, bits: Floats, seconds: Floats) -> Fairness:
    """Return how even a run was.

    Args:
        participations: Accepted updates of each device. Shape (N,).
        bits: Of its accepted updates. Shape (N,).
        seconds: That their uplinks took. Shape (N,).
    """
    served = seconds > 0
    if not participations.any():
        return Fairness(
            jain_participations=None,
            jain_rates=None,
            worst_decile_participations=None,
            worst_decile_rate=None,
            never=1.0,
        )
    rates = bits[served] / seconds[served]
    return Fairness(
        jain_participations=jain_index(participations),
        jain_rates=jain_index(rates) if rates.size else None,
        worst_decile_participations=_worst(participations) / float(participations.mean()),
        worst_decile_rate=_worst(rates) if rates.size else None,
        never=float((participations == 0).mean()),
    )


def count_staleness(staleness: Sequence[int]) -> dict[str, int]:
    """Return how many are of staleness 0, 1, 2-3, 4-7 and so on, up to the largest."""
    digits = np.array([age.bit_length() for age in staleness], dtype=np.int64)
    return {_bin(bits): int(count) for bits, count in enumerate(np.bincount(digits))}


def _bin(bits: int) -> str:
    """Return the numbers of so many binary digits."""
    return str(bits) if bits < 2 else f"{2 ** (bits - 1)}-{2**bits - 1}"


def _worst(values: Floats) -> float:
    """Return the mean of the lowest tenth, of one value at least."""
    return float(np.sort(values)[: max(1, values.size // 10)].mean())
