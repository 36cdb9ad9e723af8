"""Figures of held-out pairs, worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from device_profiles.errors import InputError
from edge_client.reward.evaluation import calibration_error, evaluate_pairs


def logit(probability: float) -> float:
    return math.log(probability / (1 - probability))


def test_accuracy_counts_a_tie_as_one_half() -> None:
    # won, lost, tied, won: (1 + 0 + 0.5 + 1) / 4
    found = evaluate_pairs([2, 0, 1, 5], [1, 3, 1, 4], [1] * 4, [1] * 4)
    assert (found.accuracy, found.pairs) == (0.625, 4)


def test_length_rules_count_tokens_and_ties() -> None:
    # longer, longer, shorter, equal: 'longer' is right in (1 + 1 + 0 + 0.5) / 4
    found = evaluate_pairs([0] * 4, [0] * 4, [9, 8, 1, 5], [1, 2, 7, 5])
    assert (found.longer_wins, found.shorter_wins) == (0.625, 0.375)


def test_brier_and_loss_are_those_of_the_probabilities() -> None:
    # p = 0.9 and 0.2: ((0.1)^2 + (0.8)^2) / 2, -(ln 0.9 + ln 0.2) / 2
    found = evaluate_pairs([logit(0.9), logit(0.2)], [0, 0], [1, 1], [1, 1])
    assert found.brier == pytest.approx(0.325, abs=1e-12)  # rounding of a logit and back
    assert found.loss == pytest.approx(-(math.log(0.9) + math.log(0.2)) / 2, abs=1e-12)


def test_only_differences_of_scores_count() -> None:
    chosen, rejected = np.array([3.0, -1.0]), np.array([1.0, 0.5])
    lengths = [[2, 1], [1, 2]]
    assert evaluate_pairs(chosen, rejected, *lengths) == evaluate_pairs(
        chosen + 8, rejected + 8, *lengths
    )


def test_probabilities_that_come_true_as_often_as_they_say_are_calibrated() -> None:
    # four pairs that are said to be settled at 3 to 1; three of them come out that way
    assert calibration_error(np.array([0.75, 0.75, 0.75, 0.25])) == 0.0


def test_calibration_error_is_the_gap_in_each_bin_by_its_share() -> None:
    # bin 0.9: says 0.95 twice, comes true once of two (0.05 is the same pair the other way round);
    # bin 0.6: says 0.65, comes true. Gaps 0.45 (2 pairs) and 0.35 (1 pair), mirrored alike.
    found = calibration_error(np.array([0.95, 0.05, 0.65]))
    assert found == pytest.approx((2 * 0.45 + 1 * 0.35) / 3, abs=1e-12)


def test_being_sure_is_calibrated_only_where_it_is_right() -> None:
    # always sure and always right is calibrated; always sure and always wrong cannot be worse
    assert calibration_error(np.ones(5)) == 0.0
    assert calibration_error(np.zeros(5)) == 1.0


def test_scores_far_apart_overflow_nothing() -> None:
    found = evaluate_pairs([1e4, -1e4], [0, 0], [1, 1], [1, 1])
    # certain and right, certain and wrong
    assert (found.loss, found.brier, found.calibration_error) == (5000.0, 0.5, 0.5)


@pytest.mark.parametrize(
    ("chosen", "rejected", "tokens", "sentence"),
    [
        ([], [], [], "at least 1 pair"),
        ([1.0], [1.0, 2.0], [1], r"pairs of shapes \(1,\) and \(2,\)"),
        ([1.0, 2.0], [1.0, 2.0], [1], "scores of 2 pairs and lengths of 1"),
        ([math.nan], [1.0], [1], "a score is not finite: training diverged"),
    ],
)
def test_scores_that_cannot_be_judged_are_refused(
    chosen: list[float], rejected: list[float], tokens: list[int], sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence):
        evaluate_pairs(chosen, rejected, tokens, tokens)
