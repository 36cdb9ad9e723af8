"""Keys of traces of presence, which simulations and emulated runs have in common."""

from __future__ import annotations

from typing import Any, Literal

from device_profiles.availability import Churn, ChurnSettings, Nights, NightSettings
from device_profiles.config_files import Config


class TraceKeys(Config):
    """Settings of ``diurnal`` and ``churn``; what is left out has the default named here.

    Attributes:
        night_hours: Of ``diurnal``: how long a device is there each night (8).
        on_hours: Of ``churn``: how long a device stays on average (2).
        off_hours: And how long it is away (2).
        weibull_shape: Of the law of both; 1 is the exponential law (1).
    """

    night_hours: float | None = None
    on_hours: float | None = None
    off_hours: float | None = None
    weibull_shape: float | None = None

    @property
    def night(self) -> NightSettings:
        """The nights.

        Raises:
            InputError: If they are out of their range.
        """
        return NightSettings(**given(hours=self.night_hours))

    def trace_of(
        self, name: Literal["diurnal", "churn"], devices: int, seed: int
    ) -> Nights | Churn:
        """Return the trace of that name, of so many devices.

        Raises:
            InputError: If a setting of it is out of its range.
        """
        if name == "diurnal":
            return Nights(devices, seed, self.night)
        law = given(on_hours=self.on_hours, off_hours=self.off_hours, shape=self.weibull_shape)
        return Churn(devices, seed, ChurnSettings(**law))


def given(**values: Any) -> dict[str, Any]:
    """Return the values that are not left out."""
    return {name: value for name, value in values.items() if value is not None}
