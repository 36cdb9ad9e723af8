"""Which n of K clients take part in a round, by their pilots or by what they are worth.

Rates in bit/s, times in seconds. Pure functions of plain values; a tie is broken by the generator,
never by a client's place in the list.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from device_profiles.config_files import choose
from device_profiles.errors import InputError

Floats = npt.NDArray[np.float64]

FORGETTING = 0.1

#: Of ``utility``; all six are Oort's.
SLOWNESS_PENALTY = 2.0
UNCERTAINTY = 0.1
FIRST_EXPLORATION, EXPLORATION_FACTOR, LEAST_EXPLORATION = 0.9, 0.98, 0.2
NEARLY_BEST = 0.95


def select_cohort(
    rule: str,
    cohort: int,
    generator: np.random.Generator,
    *,
    pilot_rates: npt.ArrayLike,
    past_rates: npt.ArrayLike | None = None,
) -> list[int]:
    """Return the places of the ``cohort`` clients to ask, in ascending order.

    Args:
        rule: ``uniform``: any, alike. ``best-channel``: of the highest pilot rates.
            ``proportional-fair``: of the highest pilot rate over past rate; who never had any
            comes first.
        cohort: How many, 1 to all.
        generator: Decides ``uniform``, and ties.
        pilot_rates: Of each client in this round, >= 0. Shape (K,).
        past_rates: What each had on average, >= 0 (``update_past_rates``). Shape (K,). Needed by
            ``proportional-fair`` only.

    Raises:
        InputError: If the rule is unknown, or a number is out of its range.
    """
    choose("selection", rule, SELECTIONS)
    pilots = _rates("pilot_rates", pilot_rates)
    if not 1 <= cohort <= pilots.size:
        raise InputError(f"cohort = {cohort} of {pilots.size} clients; give 1 to {pilots.size}")
    if past_rates is None:
        if rule == "proportional-fair":
            raise InputError("past_rates is missing; 'proportional-fair' weighs each client by it")
        past_rates = np.zeros(pilots.size)
    past = _rates("past_rates", past_rates)
    if past.size != pilots.size:
        raise InputError(f"past_rates of {past.size} clients, pilot_rates of {pilots.size}")
    priority = SELECTIONS[rule](pilots, past)
    shuffled = generator.permutation(pilots.size)
    order = shuffled[np.argsort(-priority[shuffled], kind="stable")]
    return sorted(int(place) for place in order[:cohort])


def utilities(
    statistical: npt.ArrayLike,
    seconds: npt.ArrayLike,
    last_rounds: npt.ArrayLike,
    *,
    preferred_seconds: float,
    round_: int,
) -> Floats:
    """Return what asking each client is worth: (U + sqrt(0.1 ln R / L)) * min(1, T / t)^2.

    U is the statistical utility: |B| sqrt(sum of squared losses over B / |B|) of the examples B
    that the client trained on. R is the round, L the last one in which it took part: who has not
    been asked for long becomes worth more. T is the time that a round should take, t the client's.

    Args:
        statistical: U of each, >= 0. Shape (K,).
        seconds: t of each, > 0. Shape (K,).
        last_rounds: L of each, >= 1. Shape (K,).
        preferred_seconds: T, > 0.
        round_: R, >= 1.

    Source: Lai, Zhu, Madhyastha and Chowdhury, Oort: Efficient Federated Learning via Guided
    Participant Selection, OSDI 2021, equation 1 and algorithm 1. Its pacer, which adapts T, is left
    to the caller.

    Raises:
        InputError: If a number is out of its range.
    """
    worth = _rates("statistical", statistical)
    slow, last = _rates("seconds", seconds), _rates("last_rounds", last_rounds)
    if not preferred_seconds > 0 or not slow.all():
        raise InputError("seconds and preferred_seconds must be above 0; give times that pass")
    if round_ < 1 or (last < 1).any():
        raise InputError("round_ and last_rounds must be 1 or more; leave out who never took part")
    worth = worth + np.sqrt(UNCERTAINTY * math.log(round_) / last)
    penalty = np.minimum(1.0, preferred_seconds / slow) ** SLOWNESS_PENALTY
    return np.asarray(worth * penalty, dtype=np.float64)


def exploration_share(round_: int) -> float:
    """Return the share of a cohort that ``select_by_utility`` takes from clients not tried yet."""
    return max(LEAST_EXPLORATION, FIRST_EXPLORATION * EXPLORATION_FACTOR ** (round_ - 1))


def select_by_utility(
    cohort: int,
    generator: np.random.Generator,
    *,
    worth: npt.ArrayLike,
    seconds: npt.ArrayLike,
    tried: npt.NDArray[np.bool_],
    exploration: float,
) -> list[int]:
    """Return the places of the ``cohort`` clients to ask, in ascending order.

    A share ``exploration`` comes from those not tried yet, the faster the likelier. The rest comes
    from those whose worth is at least 0.95 of the worth that would just be enough, with a
    probability in proportion to it. Where one kind is too few, the other fills up.

    Args:
        cohort: How many, 1 to all.
        generator: Decides both draws.
        worth: ``utilities`` of those tried; of the others it is not looked at. Shape (K,).
        seconds: That each takes, > 0. Shape (K,).
        tried: Who took part before. Shape (K,).
        exploration: [0, 1] (``exploration_share``).

    Source: as ``utilities``, algorithm 1. Deviation: worth is not clipped at a percentile.

    Raises:
        InputError: If a number is out of its range.
    """
    value, slow = _rates("worth", worth), _rates("seconds", seconds)
    if not 1 <= cohort <= value.size:
        raise InputError(f"cohort = {cohort} of {value.size} clients; give 1 to {value.size}")
    if not 0 <= exploration <= 1:
        raise InputError(f"exploration = {exploration}; give a share of 0 to 1")
    known, new = np.flatnonzero(tried), np.flatnonzero(~tried)
    exploring = min(round(exploration * cohort), new.size)
    exploring = max(exploring, cohort - known.size)
    kept = cohort - exploring
    if kept:
        enough = NEARLY_BEST * np.partition(value[known], known.size - kept)[known.size - kept]
        known = known[value[known] >= enough]
    chosen = np.concatenate(
        (
            known[_weighted(value[known], kept, generator)],
            new[_weighted(1 / slow[new], exploring, generator)],
        )
    )
    return [int(place) for place in np.sort(chosen)]


def _weighted(weights: Floats, count: int, generator: np.random.Generator) -> npt.NDArray[np.int64]:
    """Return ``count`` places, drawn one after the other in proportion to weights >= 0.

    Exponential times at these rates: the first ``count`` to ring. Source: Efraimidis and Spirakis,
    Weighted Random Sampling with a Reservoir, 2006.
    """
    rings = np.full(weights.size, np.inf)
    times = generator.standard_exponential(weights.size)
    np.divide(times, weights, out=rings, where=weights > 0)
    return np.asarray(np.argsort(rings, kind="stable")[:count], dtype=np.int64)


def update_past_rates(
    past_rates: npt.ArrayLike,
    pilot_rates: npt.ArrayLike,
    chosen: list[int],
    forgetting: float = FORGETTING,
) -> Floats:
    """Return the average rates after a round: (1 - f) * past + f * (pilot rate if chosen, or 0).

    Args:
        past_rates: Before the round. Shape (K,).
        pilot_rates: In the round. Shape (K,).
        chosen: Places of the clients that were asked.
        forgetting: f, above 0 to 1: about the last 1/f rounds count.

    Raises:
        InputError: If a number is out of its range.
    """
    if not 0 < forgetting <= 1:
        raise InputError(f"forgetting = {forgetting}; give above 0, at most 1")
    past, pilots = _rates("past_rates", past_rates), _rates("pilot_rates", pilot_rates)
    served = np.zeros(past.size)
    served[chosen] = pilots[chosen]
    return np.asarray((1 - forgetting) * past + forgetting * served, dtype=np.float64)


def jain_index(shares: npt.ArrayLike) -> float:
    """Return how even shares are: (sum x)^2 / (K sum x^2), from 1/K (one has all) to 1 (all equal).

    Source: Jain, Chiu and Hawe, A Quantitative Measure of Fairness, 1984.

    Raises:
        InputError: If there is no share above 0, or a negative one.
    """
    x = _rates("shares", shares)
    if not x.any():
        raise InputError("shares are all 0; fairness needs something that is shared")
    x = x / x.max()  # so that no square overflows or vanishes
    return float(x.sum() ** 2 / (x.size * (x @ x)))


def _uniform(pilots: Floats, _past: Floats) -> Floats:
    return np.zeros_like(pilots)


def _best_channel(pilots: Floats, _past: Floats) -> Floats:
    return pilots


def _proportional_fair(pilots: Floats, past: Floats) -> Floats:
    return np.divide(pilots, past, out=np.full_like(pilots, np.inf), where=past > 0)


SELECTIONS: dict[str, Callable[[Floats, Floats], Floats]] = {
    "uniform": _uniform,
    "best-channel": _best_channel,
    "proportional-fair": _proportional_fair,
}


def _rates(name: str, values: npt.ArrayLike) -> Floats:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise InputError(f"{name} of shape {array.shape}; give one number a client")
    wrong = np.flatnonzero(~(np.isfinite(array) & (array >= 0)))
    if wrong.size:
        raise InputError(f"{name}[{wrong[0]}] = {array[wrong[0]]}; give 0 or more")
    return array
