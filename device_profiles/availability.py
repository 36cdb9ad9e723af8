"""When devices are there: traces of presence for whole fleets, modelled, none of them measured.

SI units: seconds of virtual time (0 is midnight of time zone 0), joules, watts. Each device's trace
is a function of (seed, device) alone: not of how many others there are, nor of who is asked first.
Traces are evaluated for the devices and the moment that are asked for, never for all at all times.

- ``always``: everybody, all the time.
- ``diurnal``: at night by the device's own time zone, when it is charged and its user sleeps.
  Source of the pattern: Bonawitz et al., Towards Federated Learning at Scale, 2019, section 9.
- ``churn``: there and away in turn, for times drawn from an exponential or a Weibull law.
- ``battery``: while its battery is at least ``threshold`` full; a task drains it, the night's
  charger fills it. A device without a battery is always there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from device_profiles.errors import InputError
from device_profiles.fading import Floats
from device_profiles.philox import first_words, numbered_keys, uniforms
from device_profiles.seeds import stream

Places = npt.NDArray[np.int64]

DAY_SECONDS = 86_400.0
HOUR_SECONDS = 3600.0
TRACES = ("always", "battery", "churn", "diurnal")

_NIGHT_BEGINS = 22.0  # o'clock, assumed
_NIGHT_SPREAD_HOURS = 1.0  # assumed: standard deviation among devices of a time zone
_ROUNDING = 1e-9


@dataclass(frozen=True, kw_only=True)
class Presence:
    """Of each device the first interval of presence that ends after a moment. Shape (n,) each.

    Attributes:
        begins: Seconds; a device is there at the moment if this is not after it.
        ends: Seconds, later than the moment; infinite if it stays.
    """

    begins: Floats
    ends: Floats


class Availability(Protocol):
    """A trace of all devices of a fleet."""

    def presence(self, places: Places, at: float) -> Presence:
        """Return when the devices at ``places`` are there, seen from second ``at``."""

    def joules_left(self, places: Places, at: float) -> Floats:
        """Return what the batteries of devices hold, infinite where there is none. Shape (n,)."""

    def spend(self, places: Places, joules: Floats, at: float) -> None:
        """Take from the batteries of devices what a task that begins at ``at`` costs them."""


@dataclass(frozen=True, kw_only=True)
class NightSettings:
    """Of ``diurnal`` and of the charger of ``battery``. ``hours``: of a night, above 0 to 24."""

    hours: float = 8.0

    def __post_init__(self) -> None:
        _within("night_hours", self.hours, 24.0, "hours")


@dataclass(frozen=True, kw_only=True)
class ChurnSettings:
    """Of ``churn``.

    Attributes:
        on_hours: Mean time that a device stays, > 0.
        off_hours: Mean time that it is away, > 0.
        shape: Of the Weibull law of both, 0.1 to 10; 1 is the exponential law.
    """

    on_hours: float = 2.0
    off_hours: float = 2.0
    shape: float = 1.0

    def __post_init__(self) -> None:
        _within("on_hours", self.on_hours, 1e5, "hours")
        _within("off_hours", self.off_hours, 1e5, "hours")
        if not 0.1 <= self.shape <= 10:
            raise InputError(
                f"weibull_shape = {self.shape}; give 0.1 to 10 (1 is the exponential law)"
            )


@dataclass(frozen=True, kw_only=True)
class BatterySettings:
    """Of ``battery``.

    Attributes:
        threshold: Share of a full battery below which a device is away, [0, 1).
        charge_watts: Of the charger at night, > 0.
        night: When that is.
    """

    threshold: float = 0.3
    charge_watts: float = 10.0
    night: NightSettings = field(default_factory=NightSettings)

    def __post_init__(self) -> None:
        if not 0 <= self.threshold < 1:
            raise InputError(
                f"battery_threshold = {self.threshold}; give a share of 0 or more, and below 1"
            )
        _within("charge_watts", self.charge_watts, 1e5, "watts")


class _Mains:
    """A device that is not limited by a battery."""

    def joules_left(self, places: Places, at: float) -> Floats:
        del at
        return np.full(places.size, np.inf)

    def spend(self, places: Places, joules: Floats, at: float) -> None:
        """Take nothing: there is no battery."""


class Always(_Mains):
    """Everybody, all the time."""

    def presence(self, places: Places, at: float) -> Presence:
        """Return an interval without an end."""
        del at
        return Presence(begins=np.zeros(places.size), ends=np.full(places.size, np.inf))


class Nights(_Mains):
    """The nights of devices in time zones of whole hours, all zones alike."""

    def __init__(self, devices: int, seed: int, settings: NightSettings) -> None:
        zones = stream(seed, "availability", "zone").integers(24, size=devices)
        spread = stream(seed, "availability", "night").standard_normal(devices)
        hours = _NIGHT_BEGINS - zones + _NIGHT_SPREAD_HOURS * spread
        self._begin: Floats = hours % 24.0 * HOUR_SECONDS - DAY_SECONDS
        self.length = settings.hours * HOUR_SECONDS

    def presence(self, places: Places, at: float) -> Presence:
        """Return the night that it is, or the next one."""
        into = (at - self._begin[places]) % DAY_SECONDS
        begins = np.where(into < self.length, at - into, at - into + DAY_SECONDS)
        ends = np.full(places.size, np.inf) if self.length >= DAY_SECONDS else begins + self.length
        return Presence(begins=begins, ends=ends)

    def seconds_by(self, places: Places, at: float | Floats) -> Floats:
        """Return how many seconds of night devices have had by ``at``, from an origin of theirs."""
        since = at - self._begin[places]
        days = np.floor(since / DAY_SECONDS)
        return np.asarray(
            days * self.length + np.minimum(since - days * DAY_SECONDS, self.length),
            dtype=np.float64,
        )

    def when(self, places: Places, seconds: Floats) -> Floats:
        """Return when devices have had so many ``seconds_by``; at the first such moment."""
        nights = np.ceil(seconds / self.length) - 1
        rest = seconds - nights * self.length
        return np.asarray(self._begin[places] + nights * DAY_SECONDS + rest, dtype=np.float64)


class Churn(_Mains):
    """There and away in turn; the first period has begun some time before second 0."""

    def __init__(self, devices: int, seed: int, settings: ChurnSettings) -> None:
        mean = math.gamma(1 + 1 / settings.shape)  # of the Weibull law at scale 1
        self._on_scale = settings.on_hours * HOUR_SECONDS / mean
        self._off_scale = settings.off_hours * HOUR_SECONDS / mean
        self._power = 1 / settings.shape
        self._keys = numbered_keys(seed, "availability", "churn", count=devices)
        self._cycle = np.zeros(devices, dtype=np.uint64)
        self._before, self._begin, self._on_end, self._end = np.empty((4, devices))
        self._restart(np.arange(devices))

    def presence(self, places: Places, at: float) -> Presence:
        """Return the period of presence that it is, or the next one."""
        past = places[self._before[places] > at]
        if past.size:
            self._restart(past)
        behind = places[self._on_end[places] <= at]
        while behind.size:
            self._cycle[behind] += np.uint64(1)
            on, off, _ = self._durations(behind)
            self._before[behind] = self._on_end[behind]
            self._begin[behind] = self._end[behind]
            self._on_end[behind] = self._begin[behind] + on
            self._end[behind] = self._on_end[behind] + off
            behind = behind[self._on_end[behind] <= at]
        return Presence(begins=self._begin[places], ends=self._on_end[places])

    def _restart(self, places: Places) -> None:
        self._cycle[places] = 0
        on, off, gone_by = self._durations(places)
        self._before[places] = -np.inf
        self._begin[places] = -gone_by * (on + off)
        self._on_end[places] = self._begin[places] + on
        self._end[places] = self._on_end[places] + off

    def _durations(self, places: Places) -> tuple[Floats, Floats, Floats]:
        """Return seconds there and away of the devices' present cycle, and a uniform number."""
        keys = self._keys[places]
        keys[:, 1] += self._cycle[places]  # each cycle has a stream of its own
        drawn = uniforms(first_words(keys))
        lengths = (-np.log1p(-drawn[:, :2])) ** self._power
        return self._on_scale * lengths[:, 0], self._off_scale * lengths[:, 1], drawn[:, 2]


class Batteries:
    """Batteries that tasks drain and nights fill; full at second 0.

    Args:
        capacity_joules: Of each device, > 0, infinite where it has none. Shape (K,).
    """

    def __init__(self, capacity_joules: Floats, seed: int, settings: BatterySettings) -> None:
        self._capacity = np.asarray(capacity_joules, dtype=np.float64)
        self._left = self._capacity.copy()
        self._known_at = np.zeros(self._capacity.size)
        self._nights = Nights(self._capacity.size, seed, settings.night)
        self._watts = settings.charge_watts
        self._threshold = settings.threshold

    def presence(self, places: Places, at: float) -> Presence:
        """Return from when on a battery is full enough; it is then taken to stay so."""
        begins = np.full(places.size, 0.0)
        least = self._threshold * (1 - _ROUNDING) * self._capacity[places]
        left = self.joules_left(places, at)
        low = np.flatnonzero(left < least)
        if low.size:
            rows = places[low]
            charging = (self._threshold * self._capacity[rows] - left[low]) / self._watts
            reached = self._nights.when(rows, self._nights.seconds_by(rows, at) + charging)
            begins[low] = np.maximum(reached, np.nextafter(at, np.inf))
        return Presence(begins=begins, ends=np.full(places.size, np.inf))

    def joules_left(self, places: Places, at: float) -> Floats:
        """Return what the batteries hold. Shape (n,)."""
        known = self._known_at[places]
        nights = self._nights.seconds_by(places, at) - self._nights.seconds_by(places, known)
        filled = self._left[places] + self._watts * np.maximum(nights, 0.0)
        return np.asarray(np.minimum(filled, self._capacity[places]), dtype=np.float64)

    def spend(self, places: Places, joules: Floats, at: float) -> None:
        """Take what a task costs when it begins; a battery never holds less than nothing."""
        self._left[places] = np.maximum(self.joules_left(places, at) - joules, 0.0)
        self._known_at[places] = at


def _within(name: str, value: float, most: float, unit: str) -> None:
    if not 0 < value <= most:
        raise InputError(f"{name} = {value}; give above 0, at most {most:g} {unit}")
