"""From a round's updates to the next global state: by the run's rule, stale ones and privacy in it.

One update is in memory at a time, and a block of each where a rule compares them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from cloud_aggregator.aggregation import aggregate, fewest_updates
from cloud_aggregator.aggregation.asynchronous import with_stale
from cloud_aggregator.counting import Counting
from cloud_aggregator.intake import Intake
from cloud_aggregator.privacy import private_mean
from messaging.layout import Layout, Vector

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Combined:
    """What became of a round's updates.

    Attributes:
        state: The next global state, shape (P,); none where nothing is released.
        unchanged: Why updates that were accepted moved nothing; empty where they did.
    """

    state: Vector | None
    unchanged: str = ""


def combine(
    counting: Counting,
    vector: Vector,
    intake: Intake,
    layout: Layout,
    *,
    average: str,
    noise: np.random.Generator | None = None,
) -> Combined:
    """Return what a closed round makes of the state that it began with.

    Args:
        counting: The run's rule.
        vector: The state. Shape (P,).
        intake: The round's updates.
        layout: Of P entries.
        average: Row of ``AGGREGATIONS``: what of the method is averaged.
        noise: Of this round, where the run is private: it is then released in any case.
    """
    if counting.privacy is not None and noise is not None:
        state = private_mean(vector, intake.accepted_updates(), counting.privacy, noise)
        return Combined(state=state)

    def updates() -> Iterator[tuple[Vector, int]]:
        return with_stale(intake.accepted_updates(), intake.stale_updates())

    closed = intake.folded()
    count = len(intake.round.accepted) + (len(closed.folded) if closed else 0)
    if not count:
        return Combined(state=None)
    fewest = fewest_updates(counting.rule, counting.robust)
    if count < fewest:
        unchanged = f"'{counting.rule}' takes {fewest} updates, and {count} came"
        log.warning("round %d changes nothing: %s", intake.number, unchanged)
        return Combined(state=vector, unchanged=unchanged)
    return Combined(
        state=aggregate(counting.rule, vector, updates, layout, counting.robust, average=average)
    )
