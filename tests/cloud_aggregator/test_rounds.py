"""A round ends by quorum, by deadline, or when nobody is left; training ends when nothing improves.

Times are seconds since the round began.
"""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud_aggregator.rounds import Convergence, RoundRules, TrainingRound
from device_profiles.errors import InputError

FOUR = ["d", "b", "a", "c"]


def rules(quorum: float = 1.0, deadline: float = 100.0) -> RoundRules:
    return RoundRules(quorum=quorum, deadline_seconds=deadline)


@pytest.mark.parametrize(
    ("quorum", "cohort", "needed"),
    [
        (1.0, 4, 4),
        (0.5, 4, 2),
        (0.51, 4, 3),  # 2.04 updates
        (0.01, 4, 1),  # never none
        (0.8, 10, 8),
        (0.07, 100, 7),  # 0.07 * 100 is a rounding error above 7
        (0.1, 30, 3),
        (1 / 3, 3, 1),
        (2 / 3, 3, 2),
    ],
)
def test_the_quorum_is_the_share_rounded_up(quorum: float, cohort: int, needed: int) -> None:
    assert rules(quorum).needed(cohort) == needed


@pytest.mark.parametrize("quorum", [0.0, -0.5, 1.01, math.nan])
def test_a_quorum_that_is_no_share_is_refused(quorum: float) -> None:
    with pytest.raises(InputError, match=r"quorum = .*above 0"):
        rules(quorum)


@pytest.mark.parametrize("deadline", [0.0, -1.0, math.nan])
def test_a_deadline_that_is_over_at_the_start_is_refused(deadline: float) -> None:
    with pytest.raises(InputError, match="deadline_seconds = "):
        rules(deadline=deadline)


def test_the_round_closes_with_the_update_that_makes_the_quorum() -> None:
    training = TrainingRound(FOUR, rules(0.5))
    assert training.arrived("c", 3.0) == "accepted"
    assert training.closed_at is None
    assert training.arrived("a", 5.0) == "accepted"
    assert training.closed_at == 5.0
    assert training.arrived("b", 5.0) == "late"
    assert training.accepted == ["a", "c"]  # in client order, not in order of arrival
    assert [training.status(client) for client in "abcd"] == [
        "aggregated", "late", "aggregated", "lost",
    ]  # fmt: skip
    assert training.closed_at == 5.0


def test_the_deadline_closes_the_round_and_an_update_on_the_second_still_counts() -> None:
    training = TrainingRound(FOUR, rules(deadline=10.0))
    assert training.arrived("a", 10.0) == "accepted"
    training.passed(10.0)
    assert training.closed_at is None
    assert training.arrived("b", 10.5) == "late"
    assert training.closed_at == 10.0
    assert training.accepted == ["a"]


def test_time_alone_closes_the_round_at_its_deadline() -> None:
    training = TrainingRound(FOUR, rules(deadline=10.0))
    training.passed(9.0)
    assert training.closed_at is None
    training.passed(500.0)
    assert training.closed_at == 10.0
    assert training.accepted == []
    assert {training.status(client) for client in FOUR} == {"lost"}


def test_a_second_update_of_a_client_changes_nothing() -> None:
    training = TrainingRound(FOUR, rules(0.5))
    training.arrived("a", 1.0)
    assert training.arrived("a", 2.0) == "duplicate"
    assert training.closed_at is None  # one client is not a quorum of two
    training.arrived("b", 3.0)
    training.arrived("c", 4.0)
    assert training.arrived("c", 5.0) == "duplicate"
    assert training.accepted == ["a", "b"]


def test_a_stranger_is_neither_counted_nor_waited_for() -> None:
    training = TrainingRound(["a", "b"], rules())
    assert training.arrived("x", 1.0) == "stranger"
    training.refused("x", 1.0)
    training.arrived("a", 2.0)
    assert training.closed_at is None
    assert training.accepted == ["a"]


def test_nobody_waits_for_a_client_that_was_refused() -> None:
    training = TrainingRound(["a", "b", "c"], rules())
    training.arrived("a", 1.0)
    training.refused("b", 2.0)
    assert training.closed_at is None
    training.arrived("c", 3.0)
    assert training.closed_at == 3.0
    assert training.status("b") == "rejected"
    assert training.accepted == ["a", "c"]


def test_a_refused_client_may_come_again_with_a_better_update() -> None:
    training = TrainingRound(["a", "b"], rules())
    training.refused("a", 1.0)
    assert training.arrived("a", 2.0) == "accepted"
    assert training.closed_at is None
    assert training.status("a") == "aggregated"
    training.refused("a", 3.0)  # of another one, sent again: the first one counts
    assert training.status("a") == "aggregated"


def test_a_round_in_which_everybody_is_refused_ends_without_an_update() -> None:
    training = TrainingRound(["a", "b"], rules())
    training.refused("a", 1.0)
    training.refused("b", 4.0)
    assert training.closed_at == 4.0
    assert training.accepted == []


def test_a_refusal_after_the_deadline_does_not_move_the_end() -> None:
    training = TrainingRound(["a"], rules(deadline=10.0))
    training.refused("a", 12.0)
    assert training.closed_at == 10.0


def test_a_round_without_clients_is_over_at_once() -> None:
    assert TrainingRound([], rules()).closed_at == 0.0


ARRIVALS = st.dictionaries(
    st.sampled_from("abcdefgh"), st.floats(0.0, 20.0), min_size=1, max_size=8
)


@given(
    ARRIVALS.flatmap(lambda a: st.tuples(st.just(a), st.permutations(sorted(a)))),
    st.floats(0.01, 1.0),
    st.floats(1.0, 20.0),
)
def test_the_accepted_set_depends_on_the_arrival_times_alone(
    drawn: tuple[dict[str, float], list[str]], quorum: float, deadline: float
) -> None:
    """The first of them up to the quorum, if they came in time; ties in client order."""
    arrivals, cohort = drawn
    in_order = sorted(arrivals, key=lambda client: (arrivals[client], client))
    needed = rules(quorum).needed(len(arrivals))
    expected = [client for client in in_order if arrivals[client] <= deadline][:needed]
    training = TrainingRound(cohort, rules(quorum, deadline))
    for client in in_order:
        training.arrived(client, arrivals[client])
        training.arrived(client, arrivals[client])
    training.passed(math.inf)
    assert training.accepted == sorted(expected)
    assert training.closed_at is not None
    assert training.closed_at <= deadline


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["arrived", "refused", "passed"]),
        st.sampled_from("abcx"),
        st.floats(0.0, 20.0),
    )
)


@given(EVENTS, st.floats(0.01, 1.0))
def test_whatever_happens_a_round_ends_by_its_deadline_and_stays_ended(
    events: list[tuple[str, str, float]], quorum: float
) -> None:
    training = TrainingRound("abc", rules(quorum, 10.0))
    closed: list[float] = []
    for kind, client, at in sorted(events, key=lambda event: event[2]):
        before = training.accepted
        if kind == "passed":
            training.passed(at)
        else:
            getattr(training, kind)(client, at)
        if closed:
            assert (training.closed_at, training.accepted) == (closed[0], before)
        elif training.closed_at is not None:
            closed.append(training.closed_at)
    training.passed(10.5)
    assert training.closed_at is not None
    assert training.closed_at <= 10.0
    assert set(training.accepted) <= set("abc")
    assert len(training.accepted) <= rules(quorum).needed(3)


def converged_after(losses: list[float | None], *, epsilon: float, patience: int) -> int | None:
    convergence = Convergence(epsilon=epsilon, patience=patience)
    for count, loss in enumerate(losses, start=1):
        if convergence.observed(loss):
            return count
    return None


def test_training_has_converged_after_as_many_rounds_without_gain_as_it_may_wait() -> None:
    # best 2.0, then 1.5; 1.45 and 1.41 gain less than 0.1 on 1.5, so the fourth is the second
    losses: list[float | None] = [2.0, 1.5, 1.45, 1.41, 1.0]
    assert converged_after(losses, epsilon=0.1, patience=2) == 4


def test_small_gains_add_up_to_one_that_counts() -> None:
    # 1.95 waits (best 2.0), 1.89 is 0.11 below 2.0 and counts, then 1.85 and 1.80 wait, and 1.795
    losses: list[float | None] = [2.0, 1.95, 1.89, 1.85, 1.80]
    assert converged_after(losses, epsilon=0.1, patience=3) is None
    assert converged_after([*losses, 1.795], epsilon=0.1, patience=3) == 6


def test_the_same_loss_is_no_gain_even_where_any_gain_counts() -> None:
    assert converged_after([1.0, 1.0], epsilon=0.0, patience=1) == 2
    assert converged_after([1.0, 0.999], epsilon=0.0, patience=1) is None


def test_without_patience_training_never_converges() -> None:
    assert converged_after([1.0] * 50, epsilon=0.1, patience=0) is None


def test_a_round_without_a_loss_is_not_counted() -> None:
    assert converged_after([1.0, None, None, None, 1.0], epsilon=0.0, patience=1) == 5


@pytest.mark.parametrize(("epsilon", "patience"), [(-0.1, 1), (0.1, -1)])
def test_negative_convergence_settings_are_refused(epsilon: float, patience: int) -> None:
    with pytest.raises(InputError, match="give 0 or more"):
        Convergence(epsilon=epsilon, patience=patience)
