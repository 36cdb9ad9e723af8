"""A battery over rounds, by hand."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from device_profiles.battery import Battery, drain, full_battery
from device_profiles.errors import InputError


def test_a_battery_falls_to_nothing_and_says_in_which_round() -> None:
    course = drain(full_battery(10.0), [3.0, 4.0, 5.0, 1.0])
    assert course.left_joules == (7.0, 3.0, 0.0, 0.0)
    assert course.empty_in_round == 3


def test_a_battery_that_lasts_is_empty_in_no_round() -> None:
    course = drain(full_battery(10.0), [3.0, 4.0])
    assert (course.left_joules, course.empty_in_round) == ((7.0, 3.0), None)


def test_a_round_that_takes_the_very_last_joule_empties_it() -> None:
    assert drain(full_battery(10.0), [10.0]).empty_in_round == 1


def test_a_battery_that_is_empty_at_the_start_is_empty_in_round_0() -> None:
    course = drain(Battery(capacity_joules=10.0, left_joules=0.0), [1.0])
    assert (course.left_joules, course.empty_in_round) == ((0.0,), 0)


@given(
    capacity=st.floats(1e-3, 1e9),
    costs=st.lists(st.floats(0, 1e9), max_size=20),
)
def test_what_is_left_never_rises_and_is_never_below_0(capacity: float, costs: list[float]) -> None:
    left = drain(full_battery(capacity), costs).left_joules
    levels = [capacity, *left]
    assert all(a >= b >= 0 for a, b in zip(levels, left, strict=False))
    assert len(left) == len(costs)


@pytest.mark.parametrize(
    ("capacity", "left", "told"),
    [
        (0.0, 0.0, "capacity_joules = 0.0; give a value above 0"),
        (math.nan, 0.0, "capacity_joules = nan; give"),
        (5.0, 6.0, "left_joules = 6.0; give 0 to capacity_joules = 5"),
        (5.0, -1.0, "left_joules = -1.0; give 0 to"),
        (5.0, math.nan, "left_joules = nan; give 0 to"),
    ],
)
def test_a_battery_that_cannot_be_is_refused(capacity: float, left: float, told: str) -> None:
    with pytest.raises(InputError, match=f"^{told}"):
        Battery(capacity_joules=capacity, left_joules=left)


@pytest.mark.parametrize("joules", [-1.0, math.nan, math.inf])
def test_a_round_that_costs_what_nothing_can_is_refused(joules: float) -> None:
    with pytest.raises(InputError, match=f"^joules = {joules}; a round takes 0 or more"):
        full_battery(1.0).after(joules)
