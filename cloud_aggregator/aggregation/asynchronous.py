"""Late updates among those of a round: buffered aggregation with a weight for staleness.

An update that is folded in tau rounds after the one that it was trained for moves the global state
by s(tau) = (1 + tau)^-1/2 of what it would have moved it in time. Source: Nguyen et al. 2022,
Federated Learning with Buffered Asynchronous Aggregation (FedBuff), algorithm 1 and section 5. As
there, what is scaled is the update, and the sum is divided by the clients' whole weight: otherwise
a round in which nothing but stale updates came would follow them as if they were fresh. Deviation:
a client weighs by its examples, and the buffer is a round.

Because it is the update that is scaled, every aggregation takes stale updates as it takes others.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from messaging.layout import Vector

#: After as many rounds an update is of no use: what it was trained from is too long ago.
MAX_STALENESS = 5


@dataclass(frozen=True, kw_only=True)
class StaleUpdate:
    """An update that is folded into a later round than the one it was trained for.

    Attributes:
        client: Whose it is.
        round: That it was trained for.
        staleness: Rounds between that one and the one that it is folded into, >= 1.
        vector: The first entries of the layout, all or fewer.
        examples: That it was trained on.
    """

    client: str
    round: int
    staleness: int
    vector: Vector
    examples: int


def staleness_weight(staleness: int) -> float:
    """Return the share (1 + staleness)^-1/2 by which a stale update counts.

    Args:
        staleness: Rounds, >= 0.

    Raises:
        ValueError: If it is negative.
    """
    if staleness < 0:
        raise ValueError(f"staleness = {staleness} rounds; give 0 or more")
    return float((1.0 + staleness) ** -0.5)


def with_stale(
    fresh: Iterable[tuple[Vector, int]], stale: Iterable[StaleUpdate]
) -> Iterator[tuple[Vector, int]]:
    """Yield (update, examples) for an aggregation: stale ones, scaled, and then those of the round.

    That is the order of (round, client), so the bits of a sum over them do not depend on when any
    of them arrived. One update is in memory at a time.

    Args:
        fresh: Of the round, in client order.
        stale: Of earlier rounds, in the order of (round, client).

    Raises:
        ValueError: If stale updates come in another order, or one comes twice.
    """
    last = (-1, "")
    for update in stale:
        place = (update.round, update.client)
        if place <= last:
            raise ValueError(f"stale update of {place} after {last}; give them in order, each once")
        last = place
        scaled = update.vector.astype(np.float64) * staleness_weight(update.staleness)
        yield scaled.astype(np.float32), update.examples
    yield from fresh
