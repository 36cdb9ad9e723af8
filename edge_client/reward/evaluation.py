"""What a reward model is worth on held-out pairs, beside rules that look at length alone.

A model says that the chosen response wins with probability sigmoid(r_chosen - r_rejected).
Shape letters: N pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from device_profiles.errors import InputError

CALIBRATION_BINS = 10

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class PairEvaluation:
    """Held-out results over ``pairs`` pairs.

    Attributes:
        accuracy: Share in which the chosen response scores higher; a tie counts one half.
        loss: Mean of -log sigmoid(r_chosen - r_rejected), nats; without margin.
        brier: Mean squared distance of the probability to what happened, 0 to 1; 0.25 is a guess.
        calibration_error: Expected calibration error in 10 equal bins, 0 to 1.
        longer_wins: Accuracy of 'the longer one wins', by response tokens; a tie counts one half.
        shorter_wins: Likewise, of 'the shorter one wins'.
    """

    pairs: int
    accuracy: float
    loss: float
    brier: float
    calibration_error: float
    longer_wins: float
    shorter_wins: float


def evaluate_pairs(
    chosen: Sequence[float] | Any,
    rejected: Sequence[float] | Any,
    chosen_tokens: Sequence[int],
    rejected_tokens: Sequence[int],
) -> PairEvaluation:
    """Return what scores say of at least 1 pair.

    Args:
        chosen: Scores of the responses that were preferred. Shape (N,).
        rejected: Of the others.
        chosen_tokens: Length of their responses. Shape (N,).
        rejected_tokens: Likewise.

    Raises:
        InputError: If there is no pair, the lengths differ, or a score is not finite.
    """
    ahead = _difference(chosen, rejected)
    longer = wins(_difference(chosen_tokens, rejected_tokens))
    if len(longer) != len(ahead):
        raise InputError(f"scores of {len(ahead)} pairs and lengths of {len(longer)}; give both")
    probability = _sigmoid(ahead)
    return PairEvaluation(
        pairs=len(ahead),
        accuracy=float(wins(ahead).mean()),
        loss=float(np.logaddexp(0.0, -ahead).mean()),
        brier=float(((1 - probability) ** 2).mean()),
        calibration_error=calibration_error(probability),
        longer_wins=float(longer.mean()),
        shorter_wins=float(1 - longer.mean()),
    )


def wins(ahead: Floats) -> Floats:
    """Return 1 for each positive difference, one half for each tie, else 0. Shape (N,)."""
    return 0.5 * (1 + np.sign(ahead))


def calibration_error(probability: Floats) -> float:
    """Return the expected calibration error of probabilities that the chosen response wins.

    Which side is named first says nothing, so each pair counts in both orders: as p, which
    happened, and as 1 - p, which did not. The error is the mean over these 2 N predictions of the
    distance, in their bin, between the mean probability and how often it happened.

    Args:
        probability: Of at least 1 pair, each from 0 to 1. Shape (N,).

    Source: Guo et al. 2017, On Calibration of Modern Neural Networks, equation 3.
    """
    both = np.concatenate([probability, 1 - probability])
    happened = np.repeat([1.0, 0.0], len(probability))
    bins = np.minimum((CALIBRATION_BINS * both).astype(np.int64), CALIBRATION_BINS - 1)
    gaps = np.bincount(bins, weights=both - happened, minlength=CALIBRATION_BINS)
    return float(np.abs(gaps).sum() / len(both))


def _difference(chosen: Any, rejected: Any) -> Floats:
    first, second = (np.asarray(values, np.float64) for values in (chosen, rejected))
    if first.ndim != 1 or first.shape != second.shape or not len(first):
        raise InputError(
            f"pairs of shapes {first.shape} and {second.shape}; give one value for each side of at "
            "least 1 pair"
        )
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise InputError("a score is not finite: training diverged; choose a lower learning_rate")
    return first - second


def _sigmoid(values: Floats) -> Floats:
    return np.exp(-np.logaddexp(0.0, -values))
