"""Who is asked: devices check in that are there and free, and a rule chooses among them.

Nobody looks at the whole fleet where a part of it is enough: the rule ``uniform`` lets as many
check in as are asked, the others ``CHECK_INS`` times as many, drawn alike from those who could.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cloud_aggregator.simulation.devices import Devices
from cloud_aggregator.simulation.settings import Simulation
from device_profiles.availability import Availability, Places
from device_profiles.fading import Floats
from device_profiles.seeds import stream
from device_profiles.selection import (
    exploration_share,
    select_by_utility,
    select_cohort,
    update_past_rates,
    utilities,
)

CHECK_INS = 10

_DRAWN = 4  # devices that are looked at first, for one that is to check in
_EXAMPLES_SPREAD, _LOSS_SPREAD = 0.5, 0.3  # assumed: of logarithms, among devices


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Devices that are asked: their places, when, and when each would leave. Shape (n,)."""

    places: Places
    at: float
    ends: Floats


class Asking:
    """Chooses devices, and keeps what its rule must know of each of them.

    The statistical utility of rule ``utility`` needs losses, and nobody trains here. It is
    modelled: |B| * loss, both log-normal among devices, and the loss falls as one over the square
    root of one and the device's accepted updates.
    """

    def __init__(self, settings: Simulation, devices: Devices, trace: Availability) -> None:
        self._rule, self._seed = settings.selection, settings.seed
        self._devices, self._trace = devices, trace
        self.busy_until: Floats = np.zeros(devices.count)
        self.participations = np.zeros(devices.count, dtype=np.int64)
        self._last = np.zeros(devices.count, dtype=np.int64)
        self._past_rates: Floats = np.zeros(devices.count)
        drawn = stream(settings.seed, "worth").standard_normal((devices.count, 2))
        self._worth = np.exp(drawn @ (_EXAMPLES_SPREAD, _LOSS_SPREAD))
        self._preferred = 1.0
        if self._rule == "utility":
            everybody = np.arange(devices.count)
            self._preferred = float(np.median(devices.expected_seconds(everybody)))

    def ask(self, wanted: int, at: float, number: int) -> Asked:
        """Return at most ``wanted`` devices, at ``at``; fewer where fewer are there and free.

        ``number`` counts the askings from 1.
        """
        generator = stream(self._seed, "cohort", number)
        checked = self._check_ins(wanted, at, generator)
        if checked.size > wanted or (checked.size and self._rule == "proportional-fair"):
            checked = checked[self._chosen(min(wanted, checked.size), checked, number, generator)]
        places = np.sort(checked)
        self._last[places] = number
        return Asked(places=places, at=at, ends=self._trace.presence(places, at).ends)

    def somebody_at(self, at: float) -> float:
        """Return the first second from ``at`` on at which some device is there and free."""
        everybody = np.arange(self._devices.count)
        free = np.maximum(self.busy_until, at)
        begins = self._trace.presence(everybody, at).begins
        return float(np.maximum(free, begins).min())

    def _check_ins(self, wanted: int, at: float, generator: np.random.Generator) -> Places:
        """Return who checks in, in a drawn order."""
        count = self._devices.count
        enough = wanted * (1 if self._rule == "uniform" else CHECK_INS)
        if enough * _DRAWN < count:
            drawn = generator.integers(count, size=enough * _DRAWN)
            first = np.sort(np.unique(drawn, return_index=True)[1])
            ready = self._ready(drawn[first], at)
            if ready.size >= enough:
                return ready[:enough]
        return self._ready(generator.permutation(count), at)[:enough]

    def _ready(self, places: Places, at: float) -> Places:
        places = places[self.busy_until[places] <= at]
        return places[self._trace.presence(places, at).begins <= at]

    def _chosen(
        self, cohort: int, checked: Places, number: int, generator: np.random.Generator
    ) -> list[int]:
        """Return which of those who checked in are asked, as places among them."""
        if self._rule == "utility":
            seconds = self._devices.expected_seconds(checked)
            last = self._last[checked]
            falls = np.sqrt(1.0 + self.participations[checked])
            worth = utilities(
                self._worth[checked] / falls,
                seconds,
                np.maximum(last, 1),
                preferred_seconds=self._preferred,
                round_=number,
            )
            return select_by_utility(
                cohort,
                generator,
                worth=worth,
                seconds=seconds,
                tried=last > 0,
                exploration=exploration_share(number),
            )
        pilots = self._devices.pilot_rates(checked, number)
        past = self._past_rates[checked]
        chosen = select_cohort(self._rule, cohort, generator, pilot_rates=pilots, past_rates=past)
        if self._rule == "proportional-fair":
            rates = np.zeros(self._devices.count)
            rates[checked] = pilots
            served = [int(place) for place in checked[chosen]]
            self._past_rates = update_past_rates(self._past_rates, rates, served)
        return chosen
