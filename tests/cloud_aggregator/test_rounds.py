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


# -- devices that are asked, vanish, and are replaced ---------------------------------------------


@pytest.mark.parametrize(
    ("over_selection", "quorum", "wanted", "asked"),
    [
        (1.0, 1.0, 10, 10),
        (1.3, 1.0, 10, 13),
        (1.25, 0.5, 10, 10),  # 6.25 would be fewer than are wanted
        (3.0, 0.5, 10, 15),
        (1.1, 1.0, 10, 11),  # 1.1 * 10 is a rounding error above 11
        (1.01, 1.0, 10, 11),
    ],
)
def test_more_are_asked_than_are_needed_by_over_selection(
    over_selection: float, quorum: float, wanted: int, asked: int
) -> None:
    rule = RoundRules(quorum=quorum, deadline_seconds=1.0, over_selection=over_selection)
    assert rule.asked(wanted) == asked


@pytest.mark.parametrize("over_selection", [0.99, -1.0, math.nan, math.inf])
def test_an_over_selection_that_asks_too_few_or_endlessly_many_is_refused(
    over_selection: float,
) -> None:
    with pytest.raises(InputError, match="over_selection = "):
        RoundRules(quorum=1.0, deadline_seconds=1.0, over_selection=over_selection)


def test_the_quorum_is_of_those_wanted_and_not_of_those_asked() -> None:
    training = TrainingRound("abcdef", rules(0.5), wanted=4)
    training.arrived("f", 1.0)
    assert training.closed_at is None
    training.arrived("b", 2.0)
    assert training.closed_at == 2.0
    assert training.arrived("a", 3.0) == "late"


def test_a_vanished_client_leaves_a_vacancy_until_it_is_replaced() -> None:
    training = TrainingRound("abc", rules(deadline=100.0))
    training.lost("b", 10.0)
    training.lost("x", 10.0)  # was not asked
    assert training.vacancies(10.0) == ["b"]
    training.replaced("b", "d", 11.0)
    assert training.vacancies(11.0) == []
    assert training.cohort == ["a", "b", "c", "d"]
    for client, at in (("a", 12.0), ("c", 13.0), ("d", 14.0)):
        assert training.arrived(client, at) == "accepted"
    assert training.closed_at == 14.0
    assert training.status("b") == "lost"


def test_a_vanished_client_that_nobody_replaced_is_waited_for_and_counts() -> None:
    training = TrainingRound("ab", rules(deadline=100.0))
    training.lost("b", 10.0)
    training.arrived("a", 20.0)
    assert training.closed_at is None
    assert training.arrived("b", 99.0) == "accepted"
    assert training.closed_at == 99.0


def test_who_comes_back_in_time_leaves_no_vacancy_and_counts_though_it_was_replaced() -> None:
    training = TrainingRound("abc", rules(deadline=100.0))
    training.lost("a", 1.0)
    training.lost("b", 1.0)
    training.returned("a", 2.0)
    assert training.vacancies(3.0) == ["b"]
    training.replaced("b", "d", 3.0)
    assert training.arrived("b", 4.0) == "accepted"
    training.arrived("a", 5.0)
    training.arrived("c", 6.0)
    assert training.accepted == ["a", "b", "c"]
    assert training.arrived("d", 7.0) == "late"


def test_there_is_time_for_another_while_the_rest_is_as_long_as_the_first_update_took() -> None:
    training = TrainingRound("abc", rules(deadline=100.0))
    training.lost("c", 1.0)
    assert training.vacancies(50.0) == ["c"]  # half of the deadline, where none has come
    assert training.vacancies(50.5) == []
    training.arrived("a", 60.0)
    assert training.vacancies(60.0) == []  # it took 60 s, and 40 are left
    quick = TrainingRound("abc", rules(deadline=100.0))
    quick.lost("c", 1.0)
    quick.arrived("a", 5.0)
    assert quick.vacancies(95.0) == ["c"]
    assert quick.vacancies(95.5) == []


def test_where_replacements_are_off_nobody_is_replaced() -> None:
    rule = RoundRules(quorum=1.0, deadline_seconds=100.0, replacements=False)
    training = TrainingRound("ab", rule)
    training.lost("a", 1.0)
    assert training.vacancies(1.0) == []
    with pytest.raises(ValueError, match="'a' has left no vacancy"):
        training.replaced("a", "c", 1.0)


def test_nobody_takes_a_place_that_is_not_free_or_has_one_already() -> None:
    training = TrainingRound("abc", rules())
    with pytest.raises(ValueError, match="no vacancy"):
        training.replaced("a", "d", 1.0)
    training.lost("a", 1.0)
    with pytest.raises(ValueError, match="'b' was asked"):
        training.replaced("a", "b", 1.0)


def test_a_set_that_was_recorded_wins_over_what_arrives() -> None:
    training = TrainingRound("abcd", rules(0.5))
    training.arrived("a", 1.0)
    training.refused("c", 1.5)
    training.recorded(["d", "c"], 7.0)
    assert training.closed_at == 7.0
    assert training.accepted == ["c", "d"]
    assert [training.status(c) for c in "abcd"] == ["late", "lost", "aggregated", "aggregated"]
    assert training.arrived("b", 8.0) == "late"
    assert training.arrived("c", 8.0) == "duplicate"
    assert training.accepted == ["c", "d"]
    with pytest.raises(ValueError, match="'x' was accepted"):
        training.recorded(["x"], 7.0)


KINDS = st.sampled_from(["arrived", "refused", "lost", "returned", "replaced", "passed"])
HAPPENINGS = st.lists(st.tuples(KINDS, st.sampled_from("abcx"), st.floats(0.0, 20.0)), max_size=40)


def played(
    events: list[tuple[str, str, float]], quorum: float, wanted: int
) -> tuple[TrainingRound, list[str]]:
    """Return a round after these events, and every client that was told ``accepted``."""
    training = TrainingRound("abc", rules(quorum, 10.0), wanted=wanted)
    taken: list[str] = []
    spare = iter(f"spare{i:02}" for i in range(len(events)))
    for kind, client, at in events:
        if kind == "passed":
            training.passed(at)
        elif kind == "replaced":
            for gone in training.vacancies(at)[:1]:
                training.replaced(gone, next(spare), at)
        elif kind == "arrived":
            # x stands for whoever was asked last in another's place
            who = max(training.cohort) if client == "x" else client
            if training.arrived(who, at) == "accepted":
                taken.append(who)
        else:
            getattr(training, kind)(client, at)
    training.passed(10.5)
    return training, taken


@given(HAPPENINGS, st.floats(0.01, 1.0), st.integers(1, 6))
def test_whatever_happens_a_round_ends_and_counts_nobody_twice(
    events: list[tuple[str, str, float]], quorum: float, wanted: int
) -> None:
    in_order = sorted(events, key=lambda event: event[2])
    training, taken = played(in_order, quorum, wanted)
    assert training.closed_at is not None
    assert training.closed_at <= 10.0
    assert len(taken) == len(set(taken))
    assert training.accepted == sorted(taken)
    assert set(taken) <= set(training.cohort)
    assert len(training.cohort) == len(set(training.cohort))
    assert len(taken) <= rules(quorum).needed(wanted)
    assert not set(taken) & set(training.late)
    assert training.vacancies(10.5) == []
    assert played(in_order, quorum, wanted)[0].accepted == training.accepted


@given(HAPPENINGS, st.floats(0.01, 1.0), st.integers(1, 3))
def test_vanishing_alone_changes_nobodys_update(
    events: list[tuple[str, str, float]], quorum: float, wanted: int
) -> None:
    """Without a replacement, who vanished and came back is as if it had been there."""
    kept = [e for e in sorted(events, key=lambda event: event[2]) if e[0] != "replaced"]
    quiet = [e for e in kept if e[0] not in {"lost", "returned"}]
    stirred, calm = played(kept, quorum, wanted)[0], played(quiet, quorum, wanted)[0]
    assert (stirred.accepted, stirred.closed_at) == (calm.accepted, calm.closed_at)


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
