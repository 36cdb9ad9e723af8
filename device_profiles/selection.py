"""Which n of K clients take part in a round, by what their pilots showed.

Rates in bit/s. Pure functions of plain values; a tie is broken by the generator, never by a
client's place in the list.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from device_profiles.config_files import choose
from device_profiles.errors import InputError

Floats = npt.NDArray[np.float64]

FORGETTING = 0.1


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
