"""When devices are there: rounds that wait for enough of them, and keys that fit each other."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cloud_aggregator.emulation.emulate import emulate
from cloud_aggregator.experiment import Experiment, load_experiment
from cloud_aggregator.presence import Moment, PresenceKeys, Traced, presence_of
from device_profiles.availability import DAY_SECONDS, Always, Places, Presence
from device_profiles.errors import InputError

ALWAYS = {"availability": "always"}
NAMES = [f"d{number:02d}" for number in range(40)]


class Shifts(Always):
    """Devices that are there once, from one moment to another."""

    def __init__(self, *shifts: tuple[float, float]) -> None:
        self._begins, self._ends = np.array(shifts, dtype=np.float64).T

    def presence(self, places: Places, at: float) -> Presence:
        """Return the shifts that are not over."""
        ends = self._ends[places]
        begins = np.where(ends > at, self._begins[places], math.inf)
        return Presence(begins=begins, ends=np.where(ends > at, ends, math.inf))


def test_a_round_begins_at_the_first_moment_with_enough_devices() -> None:
    traced = Traced(["c", "a", "b"], Shifts((0, 10), (4, 6), (8, 20)))  # a, b, c
    everyone = ["a", "b", "c"]
    for at, names, least, found in (
        (0.0, everyone, 1, Moment(waited=0.0, stays={"a": 10.0})),
        (0.0, everyone, 2, Moment(waited=4.0, stays={"a": 6.0, "b": 2.0})),
        # at 6 b has left, so the two are a and c
        (6.0, everyone, 2, Moment(waited=2.0, stays={"a": 2.0, "c": 12.0})),
        (5.0, ["c"], 1, Moment(waited=3.0, stays={"c": 12.0})),
        (5.0, [], 3, Moment(waited=0.0, stays={})),
        # one that is there alone is all that two can be asked of
        (12.0, ["c"], 2, Moment(waited=0.0, stays={"c": 8.0})),
    ):
        assert traced.moment(at, names, least) == found


def test_devices_that_never_are_there_at_once_are_told() -> None:
    traced = Traced(["a", "b"], Shifts((0, 10), (10, 20)))
    with pytest.raises(InputError, match="2 of 2 devices are not there at once"):
        traced.moment(0.0, ["a", "b"], 2)


@pytest.mark.parametrize("trace", ["diurnal", "churn"])
def test_moments_are_of_the_trace_and_belong_to_seed_and_time_alone(trace: str) -> None:
    keys = PresenceKeys.model_validate({"availability": trace})
    one, two = (presence_of(keys, NAMES, 5) for _ in range(2))
    assert one is not None
    assert two is not None
    counts: Counter[str] = Counter()
    moments = []
    for number in range(60):
        moments.append(one.moment(number * DAY_SECONDS / 7, NAMES, 1))
        counts.update([*moments[-1].stays])
        assert all(seconds > 0 for seconds in moments[-1].stays.values())
    # asked once, and late, another object says the same: nothing depends on who asked before
    assert two.moment(59 * DAY_SECONDS / 7, NAMES, 1) == moments[-1]
    assert moments[0] == one.moment(0.0, NAMES, 1)
    other = presence_of(keys, NAMES, 6)
    assert other is not None
    assert other.moment(0.0, NAMES, 1) != moments[0]
    share = sum(counts.values()) / (60 * len(NAMES))  # a third of a day; half of the time
    assert share == pytest.approx({"diurnal": 1 / 3, "churn": 1 / 2}[trace], abs=0.06)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"night_hours": 8.0}, "8.0 with availability left out; it belongs to 'diurnal'"),
        ({"availability": "diurnal", "on_hours": 1.0}, "'diurnal'; it belongs to 'churn'"),
        ({"availability": "diurnal", "night_hours": 25.0}, "night_hours = 25.0; give above 0"),
        ({"availability": "churn", "weibull_shape": 0.0}, "weibull_shape = 0.0; give 0.1 to 10"),
        ({"availability": "battery"}, "availability = 'battery'"),
    ],
)
def test_keys_out_of_their_range_or_of_another_trace_are_told(
    given: dict[str, Any], told: str
) -> None:
    with pytest.raises(InputError, match=told):
        load_experiment(None, given)


def test_an_experiment_without_a_trace_is_named_as_before() -> None:
    plain, always = (load_experiment(None, {"seed": 3, **w}) for w in ({}, ALWAYS))
    assert plain == always
    assert plain.run_name != load_experiment(None, {"seed": 3, "availability": "churn"}).run_name


def test_nights_of_a_whole_day_have_no_end() -> None:
    keys = PresenceKeys(availability="diurnal", night_hours=24.0)
    presence = presence_of(keys, NAMES, 5)
    assert presence is not None
    found = presence.moment(12345.0, NAMES, len(NAMES))
    assert found == Moment(waited=0.0, stays=dict.fromkeys(NAMES, math.inf))


def test_a_quorum_that_never_is_there_is_refused_before_anything_is_written(
    tmp_path: Path,
) -> None:
    experiment = Experiment(
        clients=10, cohort=10, partition="iid", availability="diurnal", night_hours=1.0
    )
    with pytest.raises(InputError, match="10 of 10 devices are not there at once"):
        emulate(experiment, tmp_path / "run")
    assert not (tmp_path / "run").exists()
