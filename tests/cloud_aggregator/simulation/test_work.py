"""How far tasks get, by hand; and the end of a round against the round's own state machine."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud_aggregator.rounds import RoundRules, TrainingRound
from cloud_aggregator.simulation.devices import Tasks
from cloud_aggregator.simulation.work import carry_out, closing_time, waiting_joules


def one_task(stays: float = math.inf, left: float = math.inf) -> tuple[float, bool, list[float]]:
    tasks = Tasks(
        seconds=np.array([[10.0, 100.0, 20.0]]),
        joules=np.array([[5.0, 200.0, 30.0, 10.0]]),
        delivered=np.array([True]),
    )
    done = carry_out(tasks, np.array([stays]), np.array([left]))
    return float(done.seconds[0]), bool(done.lost[0]), done.joules[0].tolist()


def test_a_device_that_stays_finishes() -> None:
    assert one_task() == (130.0, False, [5, 200, 30, 10])
    assert one_task(stays=130.0, left=245.0) == (130.0, False, [5, 200, 30, 10])


def test_a_device_that_leaves_has_spent_what_it_did() -> None:
    assert one_task(stays=4.0) == (4.0, True, [2, 0, 0, 0])
    assert one_task(stays=60.0) == (60.0, True, [5, 100, 0, 0])
    assert one_task(stays=125.0) == (125.0, True, [5, 200, 22.5, 7.5])


def test_a_battery_that_ends_takes_the_device_away() -> None:
    seconds, lost, joules = one_task(left=105.0)  # 5 J received, 100 of 200 J trained
    assert (seconds, lost) == (pytest.approx(60.0), True)
    assert sum(joules) == pytest.approx(105.0)
    seconds, _, joules = one_task(left=225.0)  # and half of the uplink's 40 J
    assert (seconds, sum(joules)) == (pytest.approx(120.0), pytest.approx(225.0))


def test_who_has_answered_waits_while_it_is_there() -> None:
    tasks = Tasks(seconds=np.ones((3, 3)), joules=np.ones((3, 4)), delivered=np.ones(3, bool))
    done = carry_out(tasks, np.array([math.inf, 5.0, 2.0]), np.full(3, math.inf))
    # Done at 3, 3 and never; the round closes at 10, and the second leaves at 5.
    waited = waiting_joules(done, 10.0, np.array([math.inf, 5.0, 2.0]), np.array([2.0, 2.0, 2.0]))
    assert waited.tolist() == [14.0, 4.0, 0.0]


ENDS = st.lists(st.tuples(st.integers(0, 20), st.booleans()), min_size=1, max_size=10)


@given(ends=ENDS, quorum=st.floats(0.05, 1), deadline=st.sampled_from([5.0, 12.0, math.inf]))
def test_a_round_ends_as_its_state_machine_says(
    ends: list[tuple[int, bool]], quorum: float, deadline: float
) -> None:
    rules = RoundRules(quorum=quorum, deadline_seconds=deadline)
    names = [f"{place:02d}" for place in range(len(ends))]
    machine = TrainingRound(names, rules)
    # At one second arrivals come first, in client order: with whole seconds ties are common.
    for at, lost, name in sorted((at, lost, n) for (at, lost), n in zip(ends, names, strict=True)):
        if lost:
            machine.refused(name, float(at))
        else:
            machine.arrived(name, float(at))
    machine.passed(1e9)
    closes, accepted = closing_time(
        np.array([float(at) for at, _ in ends]),
        np.array([lost for _, lost in ends]),
        needed=rules.needed(len(ends)),
        deadline_seconds=deadline,
    )
    assert closes == machine.closed_at
    assert [names[place] for place in np.flatnonzero(accepted)] == machine.accepted
