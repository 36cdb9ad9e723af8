"""When the devices of an emulated run are there: whom a round can ask, and who leaves it early.

A round begins, in the devices' modelled time, when the one before it ended; where too few devices
are there, it begins as soon as enough are. Traces are ``device_profiles.availability``'s: modelled.
Everything follows from the keys, the seed and the moment, so a run that goes on after a break finds
the same devices there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, Protocol

import numpy as np
from pydantic import BeforeValidator

from cloud_aggregator.traces import TraceKeys
from device_profiles.availability import Availability
from device_profiles.config_files import check_belongs
from device_profiles.errors import InputError

_BELONGS = {
    "night_hours": "diurnal", "on_hours": "churn", "off_hours": "churn", "weibull_shape": "churn",
}  # fmt: skip
_MOST_MOMENTS = 10_000


def _named(value: object) -> object:
    """Return none for ``always``, as what is not given: the run has the same name."""
    return None if value == "always" else value


class PresenceKeys(TraceKeys):
    """Keys of an experiment, beside those of its trace.

    Attributes:
        availability: ``diurnal`` (at night, each in its time zone), ``churn`` (there and away in
            turn), or ``always``, which is what goes without saying.
    """

    availability: Annotated[Literal["diurnal", "churn"] | None, BeforeValidator(_named)] = None


@dataclass(frozen=True, kw_only=True)
class Moment:
    """The beginning of a round.

    Attributes:
        waited: Seconds for which fewer devices were there than it needs.
        stays: Who is there, and how many seconds each stays from then on.
    """

    waited: float
    stays: dict[str, float]


class WhoIsThere(Protocol):
    """Which devices are there when."""

    def moment(self, at: float, names: Iterable[str], least: int) -> Moment:
        """Return the first moment from ``at`` on with at least ``least`` of these devices there."""


class Traced:
    """Presence by a trace.

    Args:
        names: Every device of the run; the trace numbers them in client order.
        trace: Of so many devices.
    """

    def __init__(self, names: Sequence[str], trace: Availability) -> None:
        self._places = {name: place for place, name in enumerate(sorted(names))}
        self._trace = trace

    def moment(self, at: float, names: Iterable[str], least: int) -> Moment:
        """Return the first moment from ``at`` on with at least ``least`` of these devices there.

        Raises:
            InputError: If there is none for very long.
        """
        asked = sorted(names)
        places = np.array([self._places[name] for name in asked], dtype=np.int64)
        least = min(least, len(asked))
        began = at
        for _ in range(_MOST_MOMENTS):
            found = self._trace.presence(places, at)
            here = found.begins <= at
            lacking = least - int(here.sum())
            if lacking <= 0:
                rows = np.flatnonzero(here)
                stays = {asked[r]: float(found.ends[r] - at) for r in rows}
                return Moment(waited=at - began, stays=stays)
            at = float(np.sort(found.begins[~here])[lacking - 1])
            if not math.isfinite(at):
                break
        raise InputError(
            f"availability: {least} of {len(asked)} devices are not there at once from second "
            f"{began:.0f} of the run on; ask fewer (cohort, quorum), or let them stay longer"
        )


def presence_of(keys: PresenceKeys, names: Sequence[str], seed: int) -> Traced | None:
    """Return when the devices of a run are there; none where they always are.

    Raises:
        InputError: If a key is out of its range, or belongs to another trace.
    """
    for key, owner in _BELONGS.items():
        check_belongs(keys, key, "availability", (owner,))
    if keys.availability is None:
        return None
    return Traced(names, keys.trace_of(keys.availability, len(names), seed))
