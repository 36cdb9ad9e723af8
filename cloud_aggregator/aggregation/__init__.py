"""How accepted updates become the next global state: two tables, and the one way through both.

``AGGREGATIONS`` says what is averaged of shared LoRA (a method's choice), ``RULES`` whose word
counts for how much (a run's choice).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from cloud_aggregator.aggregation.mean import mean_of_tensors
from cloud_aggregator.aggregation.product import mean_of_products
from cloud_aggregator.aggregation.robust import (
    RobustSettings,
    Updates,
    clipped,
    fewest_for_krum,
    krum,
    median,
    told,
    trimmed_mean,
)
from device_profiles.config_files import choose
from device_profiles.errors import InputError
from messaging.layout import Layout, Vector

#: (global state, (update, examples) in client order, layout) -> next global state.
Aggregate = Callable[[Vector, Iterable[tuple[Vector, int]], Layout], Vector]
Average = Literal["tensors", "product"]

AGGREGATIONS: dict[str, Aggregate] = {"tensors": mean_of_tensors, "product": mean_of_products}


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One row of the table of rules: one of two functions.

    Attributes:
        each: What becomes of each update before any average, one at a time.
        change: The change of the global state, in place of an average. Shape (P,).
        needs: The field of ``RobustSettings`` that it takes.
    """

    each: Callable[[Iterable[tuple[Vector, int]], RobustSettings], Iterable[tuple[Vector, int]]] = (
        lambda updates, _settings: updates
    )
    change: Callable[[Updates, int, RobustSettings], Vector] | None = None
    needs: str = ""


RULES: dict[str, Rule] = {
    "mean": Rule(),
    "norm-clipped": Rule(each=clipped, needs="clip_norm"),
    "trimmed-mean": Rule(change=trimmed_mean, needs="trim_share"),
    "median": Rule(change=median),
    "krum": Rule(change=krum, needs="byzantine"),
}


def check_rule(rule: str, settings: RobustSettings, *, average: str, private: bool = False) -> None:
    """Refuse before a run begins what cannot be aggregated in it.

    Args:
        rule: Row of ``RULES``.
        settings: What it is told.
        average: Row of ``AGGREGATIONS`` that the method asks for.
        private: Whether client-level differential privacy is on.

    Raises:
        InputError: If the rule is unknown, lacks its setting, or does not go with the others.
    """
    row = RULES[choose("aggregation rule", rule, RULES)]
    if row.needs and getattr(settings, row.needs) is None:
        raise InputError(
            f"aggregation '{rule}' needs {row.needs}, and it is not given; give it a value "
            f"(--{row.needs.replace('_', '-')}), or choose another rule"
        )
    if average != "tensors" and row.change is not None:
        raise InputError(
            f"rule '{rule}' compares updates entry by entry, and the method averages the products "
            "B A: their factors are free up to a turn, so an entry says nothing by itself; choose "
            "the rule mean or norm-clipped, or a method that averages tensors"
        )
    if private and (rule != "mean" or average != "tensors"):
        raise InputError(
            f"rule '{rule}' on '{average}' with differential privacy: how far one device moves the "
            "result is known for the plain mean of tensors alone, which privacy clips itself; "
            "choose the rule mean and a method that averages tensors, or leave [privacy] out"
        )


def fewest_updates(rule: str, settings: RobustSettings) -> int:
    """Return how many accepted updates a rule needs; with fewer, a round changes nothing."""
    if rule == "krum":
        return fewest_for_krum(told(settings.byzantine, "byzantine"))
    return 1


def aggregate(
    rule: str,
    vector: Vector,
    updates: Updates,
    layout: Layout,
    settings: RobustSettings,
    *,
    average: str = "tensors",
) -> Vector:
    """Return the next global state. Shape (P,).

    Args:
        rule: Row of ``RULES``.
        vector: The global state that the updates were trained from. Shape (P,).
        updates: Begins a pass over the accepted updates in client order; ``mean`` and
            ``norm-clipped`` take one pass, the others several.
        layout: Of P entries.
        settings: What the rule is told.
        average: Row of ``AGGREGATIONS``.

    Raises:
        InputError: As ``check_rule``, or if there are fewer updates than the rule needs.
        ValueError: If there is no update, or one is longer than P.
    """
    check_rule(rule, settings, average=average)
    row = RULES[rule]
    if row.change is not None:
        return vector + row.change(updates, layout.size, settings)
    return AGGREGATIONS[average](vector, row.each(updates(), settings), layout)
