"""Traces of presence: by the share of time there, by hand, and whoever is asked for first."""

from __future__ import annotations

import numpy as np
import pytest

from device_profiles.availability import (
    DAY_SECONDS,
    HOUR_SECONDS,
    Always,
    Availability,
    Batteries,
    BatterySettings,
    Churn,
    ChurnSettings,
    Nights,
    NightSettings,
)
from device_profiles.errors import InputError

DEVICES = 4_000
ALL = np.arange(DEVICES)


def there(trace: Availability, at: float) -> float:
    """Return the share of the devices that are there."""
    return float((trace.presence(ALL, at).begins <= at).mean())


def test_always_is_always() -> None:
    assert there(Always(), 1e9) == 1.0
    assert np.isinf(Always().presence(ALL, 0.0).ends).all()


def test_a_night_of_eight_hours_is_a_third_of_all_devices_and_of_each_day() -> None:
    nights = Nights(DEVICES, 1, NightSettings(hours=8))
    # All zones are alike: a binomial count, at any hour.
    spread = (1 / 3 * 2 / 3 / DEVICES) ** 0.5
    for hour in (0, 7, 31):
        assert there(nights, hour * HOUR_SECONDS) == pytest.approx(1 / 3, abs=5 * spread)
    place = np.array([5])
    hours = [nights.presence(place, t).begins[0] <= t for t in np.arange(0, DAY_SECONDS, 60.0)]
    assert sum(hours) == pytest.approx(8 * 60, abs=1)


def test_a_night_ends_as_long_after_its_beginning_and_comes_again_a_day_later() -> None:
    nights = Nights(DEVICES, 1, NightSettings(hours=8))
    now = nights.presence(ALL, 0.0)
    assert (now.ends > 0).all()
    assert now.ends - now.begins == pytest.approx(np.full(DEVICES, 8 * HOUR_SECONDS))
    next_day = nights.presence(ALL, DAY_SECONDS)
    assert next_day.begins - now.begins == pytest.approx(np.full(DEVICES, DAY_SECONDS))


@pytest.mark.parametrize("shape", [1.0, 0.5, 3.0])
def test_churn_is_there_for_its_share_of_the_time(shape: float) -> None:
    churn = Churn(DEVICES, 2, ChurnSettings(on_hours=1.0, off_hours=3.0, shape=shape))
    # After 200 mean periods nothing is left of how it began: there with probability 1/4.
    assert there(churn, 800 * HOUR_SECONDS) == pytest.approx(
        0.25, abs=5 * (0.25 * 0.75 / DEVICES) ** 0.5
    )


def test_a_trace_belongs_to_its_device_whoever_else_is_asked_for() -> None:
    for kind in (
        lambda n: Churn(n, 3, ChurnSettings(on_hours=0.5, off_hours=0.5)),
        lambda n: Nights(n, 3, NightSettings()),
    ):
        one, other = kind(50), kind(50)
        times = np.linspace(0, 20 * HOUR_SECONDS, 30)
        in_order = [one.presence(np.arange(50), t) for t in times]
        for place in reversed(range(50)):  # one by one, and backwards in time
            for moment in reversed(range(30)):
                found = other.presence(np.array([place]), times[moment])
                assert found.begins[0] == in_order[moment].begins[place]
                assert found.ends[0] == in_order[moment].ends[place]
    few = Churn(7, 3, ChurnSettings()).presence(np.arange(7), 1e5)
    many = Churn(50, 3, ChurnSettings()).presence(np.arange(7), 1e5)
    assert few.begins.tolist() == many.begins.tolist()


def test_a_battery_is_drained_by_tasks_and_filled_at_night() -> None:
    settings = BatterySettings(threshold=0.5, charge_watts=1.0, night=NightSettings(hours=24))
    capacity = np.array([1000.0, np.inf])  # in a night without end a charger of 1 W
    batteries, both = Batteries(capacity, 4, settings), np.arange(2)
    batteries.spend(both, np.array([800.0, 800.0]), at=0.0)
    assert batteries.joules_left(both, 0.0).tolist() == [200.0, np.inf]
    away = batteries.presence(both, 0.0)
    assert away.begins[0] == pytest.approx(300.0)  # 300 J more to half of it
    assert away.begins[1] == 0.0
    assert batteries.joules_left(both, 100.0)[0] == pytest.approx(300.0)
    assert batteries.presence(both, 301.0).begins[0] <= 301.0
    assert batteries.joules_left(both, 5000.0)[0] == 1000.0  # and not more than full
    batteries.spend(both, np.array([1e9, 1e9]), at=5000.0)
    assert batteries.joules_left(both, 5000.0).tolist() == [0.0, np.inf]


def test_a_battery_is_not_charged_by_day() -> None:
    settings = BatterySettings(threshold=0.5, charge_watts=1.0, night=NightSettings(hours=8))
    batteries = Batteries(np.full(DEVICES, 2e5), 4, settings)
    batteries.spend(ALL, np.full(DEVICES, 2e5), at=0.0)
    # Every whole day has eight hours of night, whatever the zone.
    assert batteries.joules_left(ALL, 2 * DAY_SECONDS) == pytest.approx(
        np.full(DEVICES, 2 * 8 * HOUR_SECONDS)
    )
    back = batteries.presence(ALL, 0.0).begins  # 1e5 J are three nights and 13,600 s of the fourth
    assert (back > 3 * DAY_SECONDS - 8 * HOUR_SECONDS).all()
    rows = np.array([7])
    assert batteries.joules_left(rows, float(back[7])) == pytest.approx(1e5)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: NightSettings(hours=0), "night_hours = 0; give above 0, at most 24 hours"),
        (lambda: ChurnSettings(on_hours=-1), "on_hours = -1; give above 0"),
        (lambda: ChurnSettings(shape=0.01), "weibull_shape = 0.01; give 0.1 to 10"),
        (lambda: BatterySettings(threshold=1.0), "battery_threshold = 1.0; give a share"),
        (lambda: BatterySettings(charge_watts=0), "charge_watts = 0; give above 0"),
    ],
)
def test_settings_out_of_range_are_refused(make, told: str) -> None:  # noqa: ANN001 - a lambda
    with pytest.raises(InputError, match=f"^{told}"):
        make()
