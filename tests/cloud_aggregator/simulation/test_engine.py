"""Virtual time: three devices worked out by hand in each mode, and what holds in every run."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from cloud_aggregator.simulation import engine
from cloud_aggregator.simulation.devices import Devices, Tasks
from cloud_aggregator.simulation.engine import simulate, staleness_weight
from cloud_aggregator.simulation.result import PARTS, Result
from cloud_aggregator.simulation.settings import Simulation, load_simulation
from device_profiles.availability import Places
from device_profiles.errors import InputError
from device_profiles.fading import Floats

RUNS = hypothesis_settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


class Timed(Devices):
    """Devices whose tasks take given seconds: 1 s down, 2 s up; 1, 2, 3 and 4 J; idle at 1 W."""

    def __init__(self, settings: Simulation, seconds: list[float], lost: set[int]) -> None:
        super().__init__(settings)
        self._seconds, self._lost = np.array(seconds), np.array(sorted(lost))

    def tasks(self, places: Places, number: int) -> Tasks:
        """Return the given times."""
        del number
        ones = np.ones(places.size)
        return Tasks(
            seconds=np.column_stack((ones, self._seconds[places] - 3, 2 * ones)),
            joules=np.outer(ones, [1.0, 2.0, 3.0, 4.0]),
            delivered=~np.isin(places, self._lost),
        )

    def idle_watts(self, places: Places) -> Floats:
        """Return 1 W each."""
        return np.ones(places.size)


def three(seconds: list[float], lost: tuple[int, ...] = (), **keys: Any) -> Result:
    settings = load_simulation(None, {"devices": 3, "cohort": 3, **keys})
    return simulate(settings, devices=Timed(settings, seconds, set(lost)))


def test_synchronous_rounds_of_three_by_hand() -> None:
    found = three([10, 20, 45], rounds=3, quorum=0.6)  # two of three; two of two
    # Device 2 is at work until 45, so round 2, from 20 to 40, asks two; round 3 again, to 60.
    assert [row.ended_at for row in found.rounds] == [20, 40, 60]
    assert [row.asked for row in found.rounds] == [3, 2, 2]
    assert [row.accepted for row in found.rounds] == [2, 2, 2]
    assert [row.late for row in found.rounds] == [1, 0, 0]
    # Device 0 waits 10 s for the end at 1 W; parts of each task are 1, 2, 3 and 4 J.
    assert found.rounds[0].joules == {
        "compute": 6, "transmit": 9, "circuit": 12, "receive": 3, "idle": 10,
    }  # fmt: skip
    assert found.rounds[1].total_joules == 2 * (1 + 2 + 3 + 4) + 10
    assert found.fairness.jain_participations == pytest.approx(6**2 / (3 * (9 + 9)))


def test_a_deadline_closes_a_round_and_a_lost_device_is_not_waited_for() -> None:
    late = three([10, 20, 45], rounds=1, deadline_seconds=15).rounds[0]
    assert (late.ended_at, late.accepted, late.late, late.lost) == (15, 1, 2, 0)
    lost = three([10, 20, 45], lost=(2,), rounds=1).rounds[0]
    assert (lost.ended_at, lost.accepted, lost.late, lost.lost) == (45, 2, 0, 1)
    assert lost.bytes_up == pytest.approx(lost.bytes_down * 2 / 3)  # all three received


def test_over_selection_by_hand() -> None:
    # Two wanted, 1.5 times as many asked: the second of three closes the round.
    row = three([10, 20, 45], rounds=1, cohort=2, over_selection=1.5).rounds[0]
    assert (row.asked, row.accepted, row.late, row.ended_at) == (3, 2, 1, 20)


def test_fedbuff_of_three_by_hand() -> None:
    found = three([10, 20, 45], rounds=3, mode="fedbuff", buffer_size=2)
    # 10 and 20 fill the first buffer; both start again and fill the second at 30 and 40, and again:
    # 45 is device 2, asked before two aggregations, and 50 device 0.
    assert [row.ended_at for row in found.rounds] == [20, 40, 50]
    assert [row.asked for row in found.rounds] == [3, 2, 2]
    assert [row.staleness for row in found.rounds] == [
        {"0": 2},
        {"0": 2},
        {"0": 1, "1": 0, "2-3": 1},
    ]
    assert found.rounds[2].mean_weight == pytest.approx((1 + 1 / math.sqrt(3)) / 2)
    assert found.unfinished == 1  # device 1, until 60


def test_fedasync_of_three_by_hand() -> None:
    found = three([10, 25, 48], rounds=2, mode="fedasync", mixing=0.8, staleness_exponent=1.0)
    # Updates come at 10, 20, 25 (asked two versions ago), then 30 (one), 40 and 48 (five).
    assert [row.ended_at for row in found.rounds] == [25, 48]
    assert [row.accepted for row in found.rounds] == [3, 3]
    assert [row.asked for row in found.rounds] == [5, 3]
    assert found.rounds[0].mean_weight == pytest.approx(0.8 * (1 + 1 + 1 / 3) / 3)
    assert found.rounds[1].mean_weight == pytest.approx(0.8 * (1 / 2 + 1 + 1 / 6) / 3)
    assert found.rounds[1].most_staleness == 5
    assert found.unfinished == 2


def test_a_lost_device_is_replaced_when_the_buffer_could_not_be_filled() -> None:
    # One of three is always lost, and three are needed: the others are asked a second time.
    row = three([10, 20, 45], lost=(2,), rounds=1, mode="fedbuff", buffer_size=3).rounds[0]
    assert (row.accepted, row.ended_at) == (3, 55)  # 10, 20, lost at 45, 45 + 10
    assert row.lost == 1


@pytest.mark.parametrize("mode", ["fedbuff", "fedasync"])
def test_a_run_whose_devices_never_stay_for_a_task_ends_with_a_sentence(
    mode: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They stay for 36 ms on average, and no downlink is so short."""
    monkeypatch.setattr(engine, "MOST_IN_VAIN", 50)
    settings = Simulation(
        mode=mode, devices=5, cohort=5, rounds=1, availability="churn", on_hours=1e-5
    )
    with pytest.raises(InputError, match=r"50 tasks in a row were lost.*fewer local_steps"):
        simulate(settings)


def test_weights_of_stale_updates() -> None:
    fedbuff, fedasync = (load_simulation(None, {"mode": mode}) for mode in ("fedbuff", "fedasync"))
    assert [staleness_weight(fedbuff, age) for age in (0, 3, 8)] == pytest.approx([1, 1 / 2, 1 / 3])
    assert [staleness_weight(fedasync, age) for age in (0, 3)] == pytest.approx([0.6, 0.3])
    assert staleness_weight(load_simulation(None, {}), 9) == 1.0


@st.composite
def drawn_runs(draw: st.DrawFn) -> Simulation:
    """A small run of any kind."""
    devices = draw(st.integers(1, 60))
    options: dict[str, Any] = {
        "devices": devices,
        "cohort": draw(st.integers(1, devices)),
        "rounds": draw(st.integers(1, 5)),
        "seed": draw(st.integers(0, 99)),
        "mode": draw(st.sampled_from(["synchronous", "fedbuff", "fedasync"])),
        "availability": draw(st.sampled_from(["always", "diurnal", "churn", "battery"])),
        "selection": draw(
            st.sampled_from(["uniform", "best-channel", "proportional-fair", "utility"])
        ),
        "fleet": draw(st.sampled_from(["mixed", "laptops", "jetsons-and-phones"])),
        "speed_spread": draw(st.sampled_from([0.0, 1.0])),
    }
    if options["availability"] == "churn":
        options |= {"on_hours": draw(st.sampled_from([0.03, 1.0])), "off_hours": 0.2}
    if options["mode"] == "synchronous":
        options |= {"quorum": draw(st.floats(0.1, 1)), "over_selection": draw(st.floats(1, 2))}
        options["deadline_seconds"] = draw(st.sampled_from([30.0, 300.0, 1e5]))
    return load_simulation(None, options)


@RUNS
@given(settings=drawn_runs())
def test_what_holds_in_every_run(settings: Simulation) -> None:
    times, at_work = [0.0], dict[int, float]()
    asked = np.zeros(settings.devices)
    accepted = np.zeros(settings.devices)
    devices = Devices(settings)

    def told(event: str, **fields: Any) -> None:
        if event == "row":
            return
        times.append(fields["at"])
        if event == "accepted":
            np.add.at(accepted, fields["places"], 1)
            return
        places, at = fields["places"], fields["at"]
        assert len(set(places.tolist())) == places.size <= max(settings.cohort, settings.asked)
        if settings.availability in ("diurnal", "churn"):  # a battery's depends on the run
            fresh = settings.trace(devices.capacity_joules)
            assert (fresh.presence(places, at).begins <= at).all()
        assert all(at_work.get(place, 0.0) <= at for place in places.tolist())
        np.add.at(asked, places, 1)

    found = simulate(settings, told, devices)
    assert times == sorted(times)
    ends = [row.ended_at for row in found.rounds]
    assert ends == sorted(ends)
    assert len(ends) == settings.rounds
    assert (accepted <= asked).all()
    totals = found.totals()
    assert accepted.sum() == totals["accepted"]
    done = totals["accepted"] + totals["late"] + totals["lost"]
    assert done + found.unfinished == totals["asked"] == asked.sum()
    for row in found.rounds:
        assert min(row.joules.values()) >= 0
        assert row.total_joules == pytest.approx(sum(row.joules[part] for part in PARTS))
        assert sum(row.staleness.values()) == row.accepted
        assert row.seconds >= 0
        assert row.late >= 0
    assert totals["total_joules"] == pytest.approx(sum(r.total_joules for r in found.rounds))


@RUNS
@given(settings=drawn_runs())
def test_the_same_seed_gives_the_same_result(settings: Simulation) -> None:
    assert simulate(settings).to_json() == simulate(settings).to_json()


@pytest.mark.parametrize("selection", ["uniform", "best-channel", "utility"])
def test_fedbuff_with_the_whole_cohort_is_synchronous(selection: str) -> None:
    common = {"devices": 50, "cohort": 8, "rounds": 6, "selection": selection, "seed": 3}
    sets: list[list[tuple[float, list[int]]]] = []
    for mode in ({"mode": "synchronous"}, {"mode": "fedbuff", "buffer_size": 8}):
        here: list[tuple[float, list[int]]] = []

        def told(event: str, here: list[tuple[float, list[int]]] = here, **fields: Any) -> None:
            if event == "accepted":
                here.append((fields["at"], sorted(fields["places"].tolist())))

        simulate(load_simulation(None, {**common, **mode}), told)
        sets.append(here)
    assert sets[0] == sets[1]
    assert len(sets[0]) == 6
