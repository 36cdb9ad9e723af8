"""When a stage is over, and when a round of alignment is taken back."""

from __future__ import annotations

import math
from typing import Any

import pytest

from cloud_aggregator.records import GlobalRound, Observed, RoundRecord
from cloud_aggregator.stages import StagePlan, check_room, collapse, measure, stage_end
from device_profiles.errors import InputError
from messaging.protocol import AlignmentSettings, Stage
from tests.cloud_aggregator.conftest import plan_of


def a_round(stage: Stage = "alignment", taken_back: str = "", **figures: Any) -> RoundRecord:
    """Return a round of nobody with these figures."""
    return RoundRecord(
        stage=stage,
        round=1,
        accepted=[],
        virtual_seconds=0.0,
        clients=[],
        global_=GlobalRound(**figures),
        taken_back=taken_back,
        observed=Observed(),
    )


def aligning(**changes: Any) -> StagePlan:
    """Return a plan of alignment."""
    settings = AlignmentSettings(kl_limit=10.0)
    return plan_of(**{"stage": "alignment", "alignment": settings, **changes})


def test_each_stage_makes_something_else_smaller() -> None:
    figures = GlobalRound(eval_loss=3.0, reward_loss=0.5, weighted_reward=0.75)
    assert [measure(s, figures) for s in ("instruction", "reward", "alignment")] == [
        3.0,
        0.5,
        -0.75,
    ]
    assert measure("alignment", GlobalRound()) is None


def test_a_stage_ends_after_its_rounds_and_not_before() -> None:
    plan = aligning(rounds=2)
    assert stage_end(plan, []) == ""
    assert stage_end(plan, [a_round()]) == ""
    assert stage_end(plan, [a_round(), a_round()]) == "rounds"


def test_a_stage_has_converged_when_its_own_measure_no_longer_improves() -> None:
    plan = aligning(rounds=9, patience=2, epsilon=0.1)
    rising = [a_round(weighted_reward=r) for r in (0.0, 0.2, 0.4)]
    assert stage_end(plan, rising) == ""
    # 0.45 and 0.49 are less than 0.1 above the best, 0.4
    assert stage_end(plan, [*rising, a_round(weighted_reward=0.45)]) == ""
    flat = [*rising, a_round(weighted_reward=0.45), a_round(weighted_reward=0.49)]
    assert stage_end(plan, flat) == "converged"


def test_a_round_that_was_taken_back_ends_its_stage() -> None:
    assert stage_end(aligning(rounds=9), [a_round(), a_round(taken_back="kl-limit")]) == "kl-limit"


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"kl": 9.9, "change": -0.5}, ""),
        ({"kl": 10.1, "change": 5.0}, "kl-limit"),
        ({"kl": 1.0, "drift": 10.1}, "kl-limit"),  # rollouts are drawn before the last update
        ({"kl": 1.0, "change": -1.99}, ""),
        ({"kl": 1.0, "change": -2.01}, "reward-collapse"),
        ({}, ""),
    ],
)
def test_a_round_is_taken_back_beyond_either_limit(given: dict[str, float], why: str) -> None:
    figures = dict(given)
    plan = aligning(reward_drop=2.0)
    change = figures.pop("change", None)
    assert collapse(plan, change, GlobalRound(**figures)) == why


def test_without_limits_or_a_beginning_nothing_is_taken_back() -> None:
    far = GlobalRound(kl=1e5, weighted_reward=-1e5)
    assert collapse(plan_of(stage="alignment"), -1e5, far) == ""
    assert collapse(aligning(reward_drop=1.0), None, GlobalRound(weighted_reward=-math.pi)) == ""


def test_a_response_leaves_room_for_a_token_of_the_prompt_and_the_end_token() -> None:
    check_room(AlignmentSettings(max_new_tokens=62), 64, "a.toml")
    with pytest.raises(InputError, match=r"^a\.toml: max_new_tokens = 63 .*; give at most 62$"):
        check_room(AlignmentSettings(max_new_tokens=63), 64, "a.toml")
