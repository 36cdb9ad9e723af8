"""Who trains in a round: a cohort, chosen by chance or by what each client's pilot shows.

Everything is recomputed from the record and the run's seed, so a run that goes on after a break
chooses as it would have. A device whose battery is empty is not asked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from cloud_aggregator.records import ClientRound, RoundRecord
from cloud_aggregator.rounds import RoundRules
from device_profiles.channel import Link, pilot_rate
from device_profiles.seeds import stream
from device_profiles.selection import (
    exploration_share,
    select_by_utility,
    select_cohort,
    update_past_rates,
    utilities,
)
from messaging.protocol import DeviceRecord

Selection = Literal["uniform", "best-channel", "proportional-fair", "utility"]


@dataclass(frozen=True, kw_only=True)
class CohortRule:
    """How many clients a round wants, and how those that are asked are chosen."""

    size: int
    selection: Selection
    seed: int


def least_there(rules: RoundRules, cohort: CohortRule | None) -> int:
    """Return how many devices have to be there for a round of an emulated run to begin."""
    return rules.needed(cohort.size) if cohort else 1


def able(devices: Mapping[str, DeviceRecord], rounds: Sequence[RoundRecord]) -> list[str]:
    """Return the devices that are not known to have an empty battery, in client order."""
    empty = {c.id for r in rounds[-1:] for c in r.clients if c.battery_left == 0.0}
    return sorted(set(devices) - empty)


def choose_cohort(
    rule: CohortRule,
    devices: Mapping[str, DeviceRecord],
    rounds: Sequence[RoundRecord],
    *,
    size: int | None = None,
) -> list[str]:
    """Return the clients of the round after ``rounds``, in client order.

    ``proportional-fair`` divides a pilot rate by what the client had in the rounds before;
    ``utility`` goes by loss, examples and time of each client's last training (Oort).

    Args:
        rule: How they are chosen.
        devices: Of whom.
        rounds: So far.
        size: How many, where more are asked than are wanted; by default the rule's.
    """
    if rule.selection == "utility":
        return _choose_by_utility(rule, devices, rounds, rule.size if size is None else size)
    names = sorted(devices)
    past = np.zeros(len(names))
    # Only one rule looks back, and one at no channel: pilots of every round before are dear.
    for number, record in enumerate(rounds if rule.selection == "proportional-fair" else [], 1):
        asked = {c.id for c in record.clients if c.status != "skipped"}
        chosen = [place for place, name in enumerate(names) if name in asked]
        past = update_past_rates(past, _pilots(rule, devices, names, number), chosen)
    number = len(rounds) + 1
    there = able(devices, rounds)
    if not there:
        return []
    places = [names.index(name) for name in there]
    blind = rule.selection == "uniform"
    pilots = [0.0] * len(there) if blind else _pilots(rule, devices, there, number)
    selected = select_cohort(
        rule.selection,
        min(rule.size if size is None else size, len(there)),
        stream(rule.seed, "cohort", number),
        pilot_rates=pilots,
        past_rates=past[places],
    )
    return [there[place] for place in selected]


def _choose_by_utility(
    rule: CohortRule,
    devices: Mapping[str, DeviceRecord],
    rounds: Sequence[RoundRecord],
    size: int,
) -> list[str]:
    """Return the clients that promise most in the time that they take, and some not tried yet.

    A training's loss is known as its mean, so U is examples times mean loss: what it is where all
    examples have the same loss, and less than Oort's otherwise. The preferred time is the median of
    the last times; of who was not tried, the pilot's rate says who is fast.
    """
    there, number = able(devices, rounds), len(rounds) + 1
    if not there:
        return []
    last: dict[str, tuple[int, ClientRound]] = {}
    for record in rounds:
        last.update({c.id: (record.round, c) for c in record.clients if c.train_loss is not None})
    worth = np.zeros(len(there))
    seconds = 1 / np.maximum(_pilots(rule, devices, there, number), 1e-9)
    known = [place for place, name in enumerate(there) if name in last]
    if known:
        took = [last[there[p]] for p in known]
        times = np.maximum([c.compute_seconds + c.uplink_seconds for _, c in took], 1e-9)
        losses = np.array([c.train_loss for _, c in took], np.float64)
        worth[known] = utilities(
            np.array([devices[there[p]].examples for p in known]) * losses,
            times,
            [round_ for round_, _ in took],
            preferred_seconds=float(np.median(times)),
            round_=number,
        )
    chosen = select_by_utility(
        min(size, len(there)),
        stream(rule.seed, "cohort", number),
        worth=worth,
        seconds=seconds,
        tried=np.isin(np.arange(len(there)), known),
        exploration=exploration_share(number),
    )
    return [there[place] for place in chosen]


def choose_replacement(seed: int, number: int, free: Sequence[str]) -> str:
    """Return who of those that are free is asked in a vanished client's place, each alike."""
    names = sorted(free)
    return names[int(stream(seed, "replacement", number, *names).integers(len(names)))]


def _pilots(
    rule: CohortRule, devices: Mapping[str, DeviceRecord], names: Sequence[str], number: int
) -> list[float]:
    """Return the rate of each client's first block in a round, bit/s: the upload's own channel."""
    return [
        pilot_rate(
            Link(**devices[name].channel.model_dump()), stream(rule.seed, "channel", number, name)
        )
        for name in names
    ]
