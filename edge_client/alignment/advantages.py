"""Rewards of whole responses, turned into what each of their tokens is better than expected.

The streams of all responses lie one after the other: entry by entry, one an action, in float64.
Shape letters: B responses, N actions of all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from device_profiles.errors import InputError

Stream = npt.NDArray[np.float64]

_SMALLEST_DEVIATION = 1e-8  # far below any that a reward model's scores have
_SUM_TOLERANCE = 1e-6


def gae(
    rewards: Stream, values: Stream, lengths: Sequence[int], *, gamma: float = 1, lam: float = 0.95
) -> Stream:
    """Return the generalised advantage estimate of each action. Shape (N,).

    ``A_t = sum_k (gamma lam)^k (r_{t+k} + gamma V_{t+k+1} - V_{t+k})`` within a response; behind
    its last action the value is 0, since the episode is over.

    Args:
        rewards: Shape (N,).
        values: Of the state before each action. Shape (N,).
        lengths: Actions of each response, at least 1; they sum to N.
        gamma: Discount, 0 to 1.
        lam: How far to trust rewards that came rather than the values, 0 to 1.

    Source: Schulman et al., High-dimensional continuous control using generalized advantage
    estimation, 2016, equation 16.
    """
    there = np.arange(max(lengths)) < np.asarray(lengths)[:, None]  # (B, T)
    reward, value = np.zeros(there.shape), np.zeros((there.shape[0], there.shape[1] + 1))
    reward[there], value[:, :-1][there] = rewards, values
    errors = reward + gamma * value[:, 1:] - value[:, :-1]  # zero where there is no action
    for t in range(errors.shape[1] - 2, -1, -1):
        errors[:, t] += gamma * lam * errors[:, t + 1]
    return errors[there]


def whiten(values: Stream) -> Stream:
    """Return values with mean 0 and standard deviation 1; all zero if they do not differ."""
    centred = values - values.mean()
    return np.asarray(centred / (centred.std() + _SMALLEST_DEVIATION))


def combine(
    advantages: Mapping[str, Stream], weights: Mapping[str, float], penalty: Stream | float
) -> Stream:
    """Return what the policy follows: ``sum_i w_i whiten(A_i) + A_kl``. Shape (N,).

    Whitening before weighting is what makes several critics differ from one of a combined reward:
    an objective counts by its weight, not by how far its scores spread.

    Args:
        advantages: Of each objective.
        weights: Of the same objectives.
        penalty: Advantage of the KL penalty, which keeps its scale.
    """
    return np.asarray(sum(weights[name] * whiten(a) for name, a in advantages.items()) + penalty)


def on_last(rewards: Sequence[float] | Stream, lengths: Sequence[int]) -> Stream:
    """Return a stream of zeros, but for each response's reward on its last action. Shape (N,)."""
    stream = np.zeros(sum(lengths))
    stream[np.cumsum(lengths) - 1] = rewards
    return stream


def leave_one_out(rewards: Stream, samples: int) -> Stream:
    """Return each reward less the mean of the others that answer the same prompt. Shape (B,).

    Args:
        rewards: The ``samples`` answers to a prompt follow one another. Shape (B,).
        samples: Answers to each prompt, at least 2.

    Source: Kool et al., Buy 4 REINFORCE samples, get a baseline for free!, 2019.
    """
    grouped = rewards.reshape(-1, samples)
    others = (grouped.sum(1, keepdims=True) - grouped) / (samples - 1)
    return np.asarray((grouped - others).reshape(-1))


def check_weights(weights: Mapping[str, float], objectives: Sequence[str]) -> None:
    """Refuse weights that are not one for each objective, of 0 to 1, with the sum 1.

    Raises:
        InputError: Naming what is wrong.
    """
    if set(weights) != set(objectives):
        raise InputError(
            f"preference weights for {', '.join(weights) or 'nothing'}; "
            f"give one for each of {', '.join(objectives)}"
        )
    for name, weight in weights.items():
        if not 0 <= weight <= 1:
            raise InputError(f"preference weight {name} = {weight:g}; choose 0 to 1")
    if abs(sum(weights.values()) - 1) > _SUM_TOLERANCE:
        shown = " + ".join(f"{name} {weight:g}" for name, weight in weights.items())
        raise InputError(
            f"preference weights {shown} = {sum(weights.values()):g}; choose weights with the sum 1"
        )
