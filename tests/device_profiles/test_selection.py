"""Cohorts by hand and by the order statistics of ten users; fairness by its bounds."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from device_profiles.errors import InputError
from device_profiles.selection import (
    SELECTIONS,
    exploration_share,
    jain_index,
    select_by_utility,
    select_cohort,
    update_past_rates,
    utilities,
)

Shares = st.lists(st.floats(0, 1e9), min_size=1, max_size=30).filter(any)


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_the_best_channels_are_those_of_the_highest_pilots() -> None:
    pilots = [3.0, 9.0, 1.0, 7.0, 8.0]
    assert select_cohort("best-channel", 2, generator(), pilot_rates=pilots) == [1, 4]
    assert select_cohort("best-channel", 5, generator(), pilot_rates=pilots) == [0, 1, 2, 3, 4]


def test_proportional_fair_weighs_a_pilot_by_what_its_client_had() -> None:
    # 9/9, 4/2, 6/4, 1/10: the second and the third.
    chosen = select_cohort(
        "proportional-fair", 2, generator(), pilot_rates=[9, 4, 6, 1], past_rates=[9, 2, 4, 10]
    )
    assert chosen == [1, 2]


def test_proportional_fair_asks_first_who_never_had_any() -> None:
    chosen = select_cohort(
        "proportional-fair", 1, generator(), pilot_rates=[9, 1e-3], past_rates=[1e-9, 0]
    )
    assert chosen == [1]


@pytest.mark.parametrize("rule", ["uniform", "best-channel", "proportional-fair"])
def test_equal_clients_are_asked_equally_often(rule: str) -> None:
    draw, rounds = generator(1), 6_000
    asked = np.zeros(6)
    for _ in range(rounds):
        asked[select_cohort(rule, 2, draw, pilot_rates=[5.0] * 6, past_rates=[1.0] * 6)] += 1
    # Each with probability 2/6: a binomial count.
    spread = math.sqrt(rounds * (1 / 3) * (2 / 3))
    assert asked.tolist() == pytest.approx([rounds / 3] * 6, abs=5 * spread)


def test_uniform_does_not_look_at_pilots() -> None:
    chosen = [
        select_cohort("uniform", 3, generator(s), pilot_rates=np.arange(9.0)) for s in range(20)
    ]
    turned = [
        select_cohort("uniform", 3, generator(s), pilot_rates=np.arange(9.0)[::-1])
        for s in range(20)
    ]
    assert chosen == turned


def test_the_best_of_ten_has_the_rate_and_gain_of_theory() -> None:
    # Reference: E[max of ten gains] = H10 = 2.928968, rate 3.261299 bit/s/Hz; best of two 2.275350.
    draw, n = generator(2), 20_000
    gains = draw.standard_exponential((n, 10))
    rates = np.log2(1 + 10**0.5 * gains)
    best = [select_cohort("best-channel", 1, draw, pilot_rates=row)[0] for row in rates]
    rows = np.arange(n)
    for values, known in ((gains[rows, best], 2.928968), (rates[rows, best], 3.261299)):
        assert values.mean() == pytest.approx(known, abs=5 * values.std() / n**0.5)
    pairs = [select_cohort("best-channel", 1, draw, pilot_rates=row[:2])[0] for row in rates]
    two = rates[rows, pairs]
    assert two.mean() == pytest.approx(2.275350, abs=5 * two.std() / n**0.5)


def test_proportional_fair_serves_unequal_clients_alike_and_best_channel_does_not() -> None:
    # One client 20 dB above the other nine: in proportion to its mean no channel is better.
    draw, rounds = generator(3), 3_000
    snrs = np.array([100.0] + [1.0] * 9)
    turns: dict[str, np.ndarray] = {}
    for rule in ("best-channel", "proportional-fair"):
        past, turns[rule] = np.zeros(10), np.zeros(10)
        for _ in range(rounds):
            pilots = snrs * draw.standard_exponential(10)  # in proportion to the gain
            chosen = select_cohort(rule, 1, draw, pilot_rates=pilots, past_rates=past)
            past = update_past_rates(past, pilots, chosen, forgetting=0.01)
            turns[rule][chosen] += 1
    assert jain_index(turns["proportional-fair"]) > 0.98
    # The strong client wins unless its gain is below a hundredth of the best of nine.
    assert jain_index(turns["best-channel"]) < 0.12


def test_past_rates_are_an_exponential_average_by_hand() -> None:
    after = update_past_rates([10.0, 10.0], [30.0, 50.0], [1], forgetting=0.1)
    assert after.tolist() == pytest.approx([9.0, 14.0])  # 0.9*10; 0.9*10 + 0.1*50
    assert update_past_rates([10.0], [30.0], [0], forgetting=1.0).tolist() == [30.0]


def test_fairness_by_hand() -> None:
    assert jain_index([4.0]) == 1.0
    assert jain_index([1.0, 1.0, 1.0]) == pytest.approx(1.0)
    assert jain_index([5.0, 0.0, 0.0, 0.0]) == pytest.approx(0.25)
    # Sum 6, sum of squares 14.
    assert jain_index([1.0, 2.0, 3.0]) == pytest.approx(6**2 / (3 * 14))


@given(shares=Shares)
def test_fairness_is_between_one_over_k_and_one(shares: list[float]) -> None:
    rounding = 1e-12
    assert 1 / len(shares) - rounding <= jain_index(shares) <= 1 + rounding


@given(shares=Shares, factor=st.floats(1e-6, 1e6))
def test_fairness_does_not_depend_on_the_unit(shares: list[float], factor: float) -> None:
    scaled = [factor * share for share in shares]
    if any(scaled):
        assert jain_index(scaled) == pytest.approx(jain_index(shares), rel=1e-9)


def test_fairness_of_extreme_shares_does_not_overflow() -> None:
    assert jain_index([1e300, 1e300]) == pytest.approx(1.0)
    assert jain_index([1e-300, 0.0]) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("rule", "cohort", "pilots", "past", "told"),
    [
        (
            "best",
            1,
            [1.0],
            None,
            "unknown selection 'best'; choose one of best-channel, p",
        ),
        ("uniform", 0, [1.0, 1.0], None, "cohort = 0 of 2 clients; give 1 to 2"),
        ("uniform", 3, [1.0, 1.0], None, "cohort = 3 of 2 clients; give 1 to 2"),
        ("best-channel", 1, [1.0, -2.0], None, r"pilot_rates\[1\] = -2.0; give 0 or more"),
        ("best-channel", 1, [math.nan], None, r"pilot_rates\[0\] = nan; give 0 or more"),
        ("best-channel", 1, [], None, r"pilot_rates of shape \(0,\); give one number a client"),
        ("proportional-fair", 1, [1.0], None, "past_rates is missing; 'proportional-fair'"),
        ("proportional-fair", 1, [1.0], [1.0, 2.0], "past_rates of 2 clients, pilot_rates of 1"),
    ],
)
def test_what_cannot_be_chosen_from_is_refused(
    rule: str, cohort: int, pilots: list[float], past: list[float] | None, told: str
) -> None:
    with pytest.raises(InputError, match=f"^{told}"):
        select_cohort(rule, cohort, generator(), pilot_rates=pilots, past_rates=past)


def test_other_numbers_out_of_range_are_refused() -> None:
    with pytest.raises(InputError, match=r"^forgetting = 0.0; give above 0, at most 1"):
        update_past_rates([1.0], [1.0], [0], forgetting=0.0)
    with pytest.raises(InputError, match=r"^shares are all 0; "):
        jain_index([0.0, 0.0])
    assert sorted(SELECTIONS) == ["best-channel", "proportional-fair", "uniform"]


def test_utility_by_hand() -> None:
    # ln of round e**10 is 10: uncertainty sqrt(0.1 * 10 / L) = 1 and 1/2. Twice too slow: 1/4.
    worth = utilities(
        [3.0, 3.0, 3.0],
        [10.0, 20.0, 5.0],
        [1, 1, 4],
        preferred_seconds=10.0,
        round_=round(math.exp(10)),
    )
    assert worth.tolist() == pytest.approx([4.0, 1.0, 3.5], rel=1e-5)  # the round is whole


def test_exploration_falls_from_nine_tenths_to_a_fifth() -> None:
    assert exploration_share(1) == 0.9
    assert exploration_share(2) == pytest.approx(0.882)
    assert exploration_share(1000) == 0.2


def test_utility_takes_the_worthiest_and_explores_the_rest() -> None:
    tried = np.array([True, True, True, False, False])
    common = {"worth": [9.0, 1.0, 8.9, 0.0, 0.0], "seconds": [1.0] * 5, "tried": tried}
    for seed in range(20):
        # Two of the three known are within 0.95 of the second best.
        assert select_by_utility(2, generator(seed), exploration=0.0, **common) == [0, 2]
        explored = select_by_utility(2, generator(seed), exploration=1.0, **common)
        assert explored == [3, 4]
        # Five of five: what one kind lacks the other fills.
        assert select_by_utility(5, generator(seed), exploration=0.0, **common) == [0, 1, 2, 3, 4]


def test_exploration_prefers_fast_clients_in_proportion() -> None:
    draw, rounds = generator(4), 4_000
    asked = sum(
        select_by_utility(
            1,
            draw,
            worth=[0.0, 0.0],
            seconds=[1.0, 3.0],
            tried=np.zeros(2, dtype=np.bool_),
            exploration=1.0,
        )
        == [0]
        for _ in range(rounds)
    )
    # With 1/1 and 1/3 the first is asked with probability 3/4: a binomial count.
    assert asked == pytest.approx(0.75 * rounds, abs=5 * math.sqrt(rounds * 0.75 * 0.25))


def test_utility_out_of_range_is_refused() -> None:
    with pytest.raises(InputError, match=r"^seconds and preferred_seconds must be above 0"):
        utilities([1.0], [0.0], [1], preferred_seconds=1.0, round_=1)
    with pytest.raises(InputError, match=r"^exploration = 1\.5; give a share of 0 to 1"):
        select_by_utility(
            1, generator(), worth=[1.0], seconds=[1.0], tried=np.array([True]), exploration=1.5
        )
