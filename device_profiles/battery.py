"""A device's battery over the rounds of a run, in joules; it is not charged in between."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from device_profiles.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Battery:
    """A battery.

    Attributes:
        capacity_joules: When full, > 0.
        left_joules: Now, 0 to ``capacity_joules``.
    """

    capacity_joules: float
    left_joules: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.capacity_joules) and self.capacity_joules > 0):
            raise InputError(f"capacity_joules = {self.capacity_joules}; give a value above 0")
        if not 0 <= self.left_joules <= self.capacity_joules:
            raise InputError(
                f"left_joules = {self.left_joules}; give 0 to capacity_joules = "
                f"{self.capacity_joules:g}"
            )

    @property
    def empty(self) -> bool:
        """Whether nothing is left."""
        return self.left_joules == 0

    def after(self, joules: float) -> Battery:
        """Return the battery after so much was taken from it; it never holds less than nothing.

        Raises:
            InputError: If ``joules`` is negative or not finite.
        """
        if not (math.isfinite(joules) and joules >= 0):
            raise InputError(f"joules = {joules}; a round takes 0 or more")
        left = max(0.0, self.left_joules - joules)
        return Battery(capacity_joules=self.capacity_joules, left_joules=left)


@dataclass(frozen=True, kw_only=True)
class Drain:
    """A battery over rounds: what is left after each, and the one (from 1) in which it is empty."""

    left_joules: tuple[float, ...]
    empty_in_round: int | None


def full_battery(capacity_joules: float) -> Battery:
    """Return a full battery.

    Raises:
        InputError: If the capacity is not above 0.
    """
    return Battery(capacity_joules=capacity_joules, left_joules=capacity_joules)


def drain(battery: Battery, joules_a_round: Iterable[float]) -> Drain:
    """Return how a battery does over rounds of these costs, the first being round 1.

    A battery that is empty before the first round is empty in round 0.

    Raises:
        InputError: If a cost is negative or not finite.
    """
    left: list[float] = []
    empty_in = 0 if battery.empty else None
    for number, joules in enumerate(joules_a_round, start=1):
        battery = battery.after(joules)
        left.append(battery.left_joules)
        if battery.empty and empty_in is None:
            empty_in = number
    return Drain(left_joules=tuple(left), empty_in_round=empty_in)
