"""What a run may ask of its aggregation, and what is refused before anything is trained."""

from __future__ import annotations

from typing import Any

import pytest

from cloud_aggregator.counting import AGGREGATION_NAMES, CountingKeys, check_counting
from cloud_aggregator.rounds import RoundRules
from device_profiles.errors import InputError

PRIVATE = {"clip_norm": 1.0, "noise_multiplier": 1.0, "delta": 1e-5}


def refusal(
    *, method: str = "pwff", wanted: int = 10, quorum: float = 1.0, has_cohort: bool = False,
    **keys: Any,
) -> str:  # fmt: skip
    """Return the sentence by which keys are refused; empty if they are not."""
    rules = RoundRules(quorum=quorum, deadline_seconds=10.0)
    try:
        check_counting(
            CountingKeys(**keys),
            rules,
            method=method,
            stages=["instruction"],
            wanted=wanted,
            has_cohort=has_cohort,
        )
    except InputError as err:
        return str(err)
    return ""


NEEDED: dict[str, dict[str, object]] = {
    "norm-clipped": {"clip_norm": 1.0},
    "trimmed-mean": {"trim_share": 0.2},
    "krum": {"byzantine": 2},
}


@pytest.mark.parametrize("name", AGGREGATION_NAMES)
def test_each_rule_goes_with_its_setting_and_with_nothing_else(name: str) -> None:
    mine = NEEDED.get(name, {})
    assert refusal(aggregation=name, **mine) == ""
    if mine:
        (setting,) = mine
        assert f"aggregation '{name}' needs {setting}, and it is not given" in refusal(
            aggregation=name
        )
    for other, settings in NEEDED.items():
        if other != name:
            (setting,) = settings
            said = refusal(aggregation=name, **mine, **settings)
            assert f"is for aggregation '{other}', and the run's is '{name}'" in said


def test_staleness_is_of_fedbuff_alone_and_has_a_default() -> None:
    rules = RoundRules(quorum=1.0, deadline_seconds=1.0)
    assert "max_staleness = 3 is for aggregation 'fedbuff'" in refusal(max_staleness=3)
    assert CountingKeys(aggregation="fedbuff").counting(rules, 1).max_staleness == 5
    kept = CountingKeys(aggregation="fedbuff", max_staleness=2).counting(rules, 1)
    assert (kept.rule, kept.max_staleness) == ("mean", 2)
    assert CountingKeys().counting(rules, 1).max_staleness is None


def test_an_unknown_rule_is_told_with_the_nearest() -> None:
    assert "unknown aggregation 'medain'; did you mean 'median'?" in refusal(aggregation="medain")


def test_krum_that_no_round_can_feed_is_refused() -> None:
    # 2 * 3 + 3 = 9 updates; 80 % of 10 end a round
    said = refusal(aggregation="krum", byzantine=3, quorum=0.8)
    assert "takes 9 updates, and a round of 10 clients ends with 8" in said
    assert refusal(aggregation="krum", byzantine=3, quorum=0.9) == ""


def test_rules_that_compare_entries_do_not_go_with_products_of_factors() -> None:
    said = refusal(method="fedlora-product", aggregation="median")
    assert "an entry says nothing by itself" in said
    assert refusal(method="fedlora-product", aggregation="fedbuff") == ""


def test_over_selection_needs_a_cohort() -> None:
    assert "over_selection = 1.5 without a cohort" in refusal(over_selection=1.5)
    assert refusal(over_selection=1.5, has_cohort=True) == ""


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"aggregation": "fedbuff"}, "may count twice in one round"),
        ({"aggregation": "median"}, "choose the rule mean and a method that averages tensors"),
        ({"aggregation": "norm-clipped", "clip_norm": 1.0}, "privacy clips itself"),
        ({"method": "fedlora-product"}, "with differential privacy"),
        ({"method": "local-only"}, "of which no update leaves a device"),
    ],
)
def test_what_would_void_the_guarantee_is_refused(keys: dict[str, Any], said: str) -> None:
    assert said in refusal(privacy=PRIVATE, **keys)


@pytest.mark.parametrize(
    ("field", "value"),
    [("clip_norm", 0.0), ("noise_multiplier", 0.001), ("delta", 1.0), ("delta", 0.0)],
)
def test_a_privacy_setting_out_of_its_bounds_is_told(field: str, value: float) -> None:
    assert f"privacy.{field} = {value}" in refusal(privacy={**PRIVATE, field: value})


def test_a_sum_is_divided_by_as_many_as_end_a_round_if_nothing_else_is_said() -> None:
    rules = RoundRules(quorum=0.8, deadline_seconds=1.0)
    privacy = CountingKeys(privacy=PRIVATE).counting(rules, 10).privacy
    assert privacy is not None
    assert privacy.expected_clients == 8
    given = CountingKeys(privacy={**PRIVATE, "expected_clients": 20}).counting(rules, 10).privacy
    assert given is not None
    assert given.expected_clients == 20
