"""Figures as text, as tables, claims and the drawing say them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from cloud_aggregator.reproduce.fig4 import OURS

NO_EVIDENCE = "Quick: too few rounds, steps and seeds to be evidence of anything."
NONE = "-"
_SHAPES = {"gpt2-small": "GPT-2-small shape", "base": "shape of the base itself"}


def named(method: str) -> str:
    """Return what a sentence calls a method."""
    return "PWFF" if method == OURS else method


def signed(value: float, digits: int = 2) -> str:
    """Return a number with its sign; what rounds to zero has none."""
    text = f"{value:+.{digits}f}"
    return f"{0:.{digits}f}" if float(text) == 0 else text.replace("-", "\u2212")


def mean_and_spread(values: Sequence[float], digits: int = 2) -> str:
    """Return the mean and, of two or more, the sample standard deviation; a dash for none."""
    if not values:
        return NONE
    mean = f"{statistics.fmean(values):.{digits}f}".replace("-", "\u2212")
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def mean_of_each(values: Sequence[float], digits: int = 2) -> str:
    """Return the mean difference with its sign and, of two or more, each; a dash for none."""
    if not values:
        return NONE
    mean = signed(statistics.fmean(values), digits)
    each = ", ".join(signed(value, digits) for value in values)
    return f"{mean} ({each})" if len(values) > 1 else mean


def amount(value: float | None) -> str:
    """Return a quantity to three digits: ``0``, ``8.25``, ``10.8``, ``110``, ``2,124``."""
    if value is None:
        return NONE
    if value == 0:
        return "0"
    digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:,.{digits}f}"


def joined(parts: Sequence[str]) -> str:
    """Return ``a``, ``a and b`` or ``a, b and c``."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def counted(number: int, word: str) -> str:
    """Return ``1 seed`` or ``3 seeds``."""
    return f"{number} {word}{'' if number == 1 else 's'}"


def learning_label(base: str, rank: int) -> str:
    """Return what the learning figures of an experiment are from."""
    return f"learning: {base}, rank {rank}"


def priced_label(shape: str, rank: int) -> str:
    """Return what delay and energy of an experiment are computed at."""
    return f"priced: {_SHAPES[shape]}, rank {rank}, modelled"
