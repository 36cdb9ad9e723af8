"""A round's figures over its clients: whose weights count for what."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from cloud_aggregator.records import ClientBefore, ClientRound, GlobalRound, Observed, RoundRecord
from cloud_aggregator.summary import (
    global_figures,
    reward_before,
    reward_change,
    summarise,
    weighted_reward,
)
from messaging.protocol import Costs, PairFigures, Preference, Report, ResponseFigures
from tests.cloud_aggregator.conftest import RUN, SESSION, device, record_of


def pairs(count: int, accuracy: float, loss: float = 0.5, longer: float = 0.4) -> PairFigures:
    """Return what a reward model is worth."""
    return PairFigures(
        pairs=count, loss=loss, accuracy=accuracy, longer_wins=longer, calibration_error=0.1
    )


def report(client: str, **fields: object) -> Report:
    """Return held-out results."""
    return Report(
        run=RUN,
        client=client,
        session=SESSION,
        round=1,
        phase="evaluate",
        examples=1,
        costs=Costs(),
        **fields,  # type: ignore[arg-type]
    )


def responses(helpfulness: float, harmlessness: float, count: int, kl: float) -> ResponseFigures:
    """Return what greedy responses scored."""
    return ResponseFigures(
        responses=count,
        scores={"helpfulness": helpfulness, "harmlessness": harmlessness},
        tokens=20.0,
        ended=0.5,
        kl=kl,
    )


def test_a_users_own_preference_weights_the_two_rewards() -> None:
    who = Preference(helpfulness=0.25, harmlessness=0.75)
    assert weighted_reward(who, 2.0, -2.0) == -1.0
    assert weighted_reward(who, 2.0, None) == 2.0  # one objective alone has all of the weight
    assert weighted_reward(who, None, 3.0) == 3.0
    assert weighted_reward(who, None, None) is None


def test_pairs_weight_reward_learning_and_responses_weight_alignment() -> None:
    alike = Preference(helpfulness=0.5, harmlessness=0.5)
    one_sided = Preference(helpfulness=1.0, harmlessness=0.0)
    devices = {
        "a": device("a").model_copy(update={"preference": alike}),
        "b": device("b").model_copy(update={"preference": one_sided}),
    }
    reports = {
        "a": report(
            "a",
            pairs={"helpfulness": pairs(10, 0.5, 1.0), "harmlessness": pairs(30, 0.9, 0.2)},
            responses=responses(1.0, 3.0, 1, 2.0),
        ),
        "b": report("b", responses=responses(5.0, -1.0, 3, 4.0)),
    }
    figures = global_figures(devices, reports)
    assert figures.reward_accuracy == pytest.approx((10 * 0.5 + 30 * 0.9) / 40)
    assert figures.reward_loss == pytest.approx((10 * 1.0 + 30 * 0.2) / 40)
    assert figures.reward_helpfulness == pytest.approx((1 * 1.0 + 3 * 5.0) / 4)
    assert figures.reward_harmlessness == pytest.approx((1 * 3.0 + 3 * -1.0) / 4)
    assert figures.weighted_reward == pytest.approx((1 * 2.0 + 3 * 5.0) / 4)
    assert figures.kl == pytest.approx((1 * 2.0 + 3 * 4.0) / 4)


def test_the_summary_counts_the_clients_whose_own_reward_rose() -> None:
    run = record_of(clients=[device("a"), device("b")])  # both weigh the two alike
    run.before = [
        ClientBefore(
            id=i, stage="alignment", eval_loss=None, eval_accuracy=None,
            reward_helpfulness=0.0, reward_harmlessness=1.0,
        )
        for i in "ab"
    ]  # fmt: skip
    after = {"a": (1.0, 1.0), "b": (0.0, 0.5)}
    run.rounds = [
        RoundRecord(
            stage="alignment",
            round=1,
            accepted=["a", "b"],
            virtual_seconds=1.0,
            clients=[
                ClientRound(
                    id=i,
                    status="aggregated",
                    reward_helpfulness=h,
                    reward_harmlessness=s,
                    kl=2.0,
                    response_tokens=9.0,
                )
                for i, (h, s) in after.items()
            ],
            global_=GlobalRound(),
            observed=Observed(),
        )
    ]
    summary = summarise(run)
    assert reward_before(run) == 0.5
    assert summary.weighted_reward_before == 0.5
    assert summary.weighted_reward_after == pytest.approx((1.0 + 0.25) / 2)
    assert (summary.clients_rewarded, summary.kl_after) == (1, 2.0)


def test_the_last_round_of_reward_learning_says_what_the_models_are_worth() -> None:
    run = record_of(clients=[device("a")])
    run.rounds = [
        RoundRecord(
            stage="reward",
            round=number,
            accepted=["a"],
            virtual_seconds=1.0,
            clients=[
                ClientRound(id="a", status="aggregated", pairs={"helpfulness": pairs(8, accuracy)})
            ],
            global_=GlobalRound(),
            observed=Observed(),
        )
        for number, accuracy in ((1, 0.5), (2, 0.75))
    ]
    summary = summarise(run)
    assert (summary.reward_accuracy_after, summary.longer_wins) == (0.75, 0.4)
    assert summary.weighted_reward_after is None


def test_the_reward_changes_by_what_it_does_on_each_client_that_is_there_then_and_now() -> None:
    run = record_of(clients=[device(i) for i in "abcd"])
    run.before = [
        ClientBefore(
            id=i, stage="alignment", eval_loss=None, eval_accuracy=None,
            reward_helpfulness=reward, reward_harmlessness=reward,
        )
        for i, reward in (("a", -4.0), ("b", 1.0), ("c", 9.0))
    ]  # fmt: skip
    reports = {
        "a": report("a", responses=responses(-4.0, -4.0, 1, 2.0)),
        "b": report("b", responses=responses(0.0, 0.0, 16, 2.0)),
        "d": report("d", responses=responses(-9.0, -9.0, 16, 2.0)),  # joined later; c has left
    }
    assert reward_change(run, reports) == -0.5  # (0 - 1) / 2
    assert reward_change(run, {"d": reports["d"]}) is None
    assert reward_change(record_of(), reports) is None


def test_a_client_counts_for_no_more_responses_than_a_device_may_be_asked_for() -> None:
    assert responses(0.0, 0.0, 10_000, 0.0).responses == 10_000
    with pytest.raises(ValidationError, match="responses"):
        responses(0.0, 0.0, 10_001, 0.0)
