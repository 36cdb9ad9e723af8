"""Which updates count, and for how much: the keys that an experiment and a service have in common.

``aggregation`` is a row of ``cloud_aggregator.aggregation.RULES``, or ``fedbuff``: the mean, with
late updates kept for a later round. ``docs/aggregation.md`` has the table.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from pydantic import Field

from cloud_aggregator.aggregation import RULES, check_rule, fewest_updates
from cloud_aggregator.aggregation.asynchronous import MAX_STALENESS
from cloud_aggregator.aggregation.robust import RobustSettings
from cloud_aggregator.privacy import PrivacySettings, epsilon
from cloud_aggregator.rounds import RoundRules
from device_profiles.config_files import Config, choose
from device_profiles.errors import InputError
from device_profiles.methods import find_method
from messaging.protocol import Stage

FEDBUFF = "fedbuff"
AGGREGATION_NAMES = (*RULES, FEDBUFF)

#: Which settings a name in ``aggregation`` takes, by the setting.
_TAKEN_BY = {row.needs: name for name, row in RULES.items() if row.needs} | {
    "max_staleness": FEDBUFF
}


@dataclass(frozen=True, kw_only=True)
class Counting:
    """How the accepted updates of a round become the next global state.

    Attributes:
        rule: Row of ``RULES``.
        robust: What it is told.
        max_staleness: Rounds for which a late update waits; none where late ones are left out.
        privacy: Of each client, from whoever sees the global states; none without.
        max_norm: Euclidean norm above which an update is refused, whatever the rule.
    """

    rule: str = "mean"
    robust: RobustSettings = field(default_factory=RobustSettings)
    max_staleness: int | None = None
    privacy: PrivacySettings | None = None
    max_norm: float | None = None


class PrivacySection(Config):
    """The section ``privacy``: client-level differential privacy is on where there is one.

    Attributes:
        clip_norm: C, the largest Euclidean norm with which a client's update counts.
        noise_multiplier: sigma; the sum of a round gets Gaussian noise of sigma C in every entry.
        delta: Of epsilon, well below 1 / clients.
        expected_clients: By which every sum is divided; by default as many as end a round.
    """

    clip_norm: float
    noise_multiplier: float
    delta: float
    expected_clients: Annotated[int, Field(ge=1, le=1_000_000)] | None = None


class CountingKeys(Config):
    """Keys of an experiment and of a service.

    Attributes:
        aggregation: mean, norm-clipped, trimmed-mean, median, krum or fedbuff.
        clip_norm: For norm-clipped: the Euclidean norm to which a longer update is shortened.
        trim_share: For trimmed-mean: share of the values left out at each end, 0 to below 0.5.
        byzantine: For krum: bad updates that are reckoned with.
        max_staleness: For fedbuff: rounds after which a late update is dropped (5).
        max_norm: Euclidean norm above which an update is refused; by default only an update that
            moves a weight by more than 10^6 is.
        over_selection: Devices that are asked for each update that a round needs, 1 to 10; needs a
            cohort.
        keep_states: Of each stage, the newest global states that stay in the run's folder; by
            default all. One is enough to go on, and for ``pwff export``.
        privacy: A section: see ``PrivacySection``.
    """

    aggregation: str = "mean"
    clip_norm: float | None = None
    trim_share: float | None = None
    byzantine: Annotated[int, Field(ge=0, le=100_000)] | None = None
    max_staleness: Annotated[int, Field(ge=1, le=1000)] | None = None
    max_norm: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    over_selection: Annotated[float, Field(ge=1, le=10)] = 1.0
    keep_states: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    privacy: PrivacySection | None = None

    def counting(self, rules: RoundRules, wanted: int) -> Counting:
        """Return what these keys say.

        Args:
            rules: When a round ends.
            wanted: Clients that a round is to have.

        Raises:
            InputError: Naming the key that is out of its range.
        """
        private = self.privacy
        return Counting(
            max_norm=self.max_norm,
            rule="mean" if self.aggregation == FEDBUFF else self.aggregation,
            robust=RobustSettings(
                clip_norm=self.clip_norm, trim_share=self.trim_share, byzantine=self.byzantine
            ),
            max_staleness=(
                self.max_staleness or MAX_STALENESS if self.aggregation == FEDBUFF else None
            ),
            privacy=None
            if private is None
            else PrivacySettings(
                clip_norm=private.clip_norm,
                noise_multiplier=private.noise_multiplier,
                delta=private.delta,
                expected_clients=private.expected_clients or rules.needed(wanted),
            ),
        )


def check_counting(
    keys: CountingKeys,
    rules: RoundRules,
    *,
    method: str,
    stages: list[Stage],
    wanted: int,
    has_cohort: bool,
) -> None:
    """Refuse, before anything is trained, what could not be aggregated or would protect nobody.

    Args:
        keys: To check.
        rules: When a round ends.
        method: Row of the methods table.
        stages: Of the run.
        wanted: Clients that a round is to have.
        has_cohort: Whether a round asks some of the clients only.

    Raises:
        InputError: Naming key, value and remedy.
    """
    choose("aggregation", keys.aggregation, AGGREGATION_NAMES)
    for setting, name in _TAKEN_BY.items():
        value = getattr(keys, setting)
        if value is not None and keys.aggregation != name:
            raise InputError(
                f"{setting} = {value} is for aggregation '{name}', and the run's is "
                f"'{keys.aggregation}'; choose '{name}', or leave {setting} out"
            )
    if keys.over_selection > 1 and not has_cohort:
        raise InputError(
            f"over_selection = {keys.over_selection:g} without a cohort: every client is asked in "
            "every round; give cohort, or leave over_selection out"
        )
    counting = keys.counting(rules, wanted)
    table = find_method(method)
    if not table.shared and (keys.aggregation != "mean" or keys.privacy is not None):
        key = "[privacy]" if keys.privacy is not None else f"aggregation = '{keys.aggregation}'"
        raise InputError(
            f"{key} with method '{method}', of which no update leaves a device; leave it out, or "
            "choose a method that shares something"
        )
    _check_privacy(keys, counting)
    average = "tensors" if stages == ["reward"] else table.average
    check_rule(
        counting.rule, counting.robust, average=average, private=counting.privacy is not None
    )
    fewest, needed = fewest_updates(counting.rule, counting.robust), rules.needed(wanted)
    if fewest > needed:
        raise InputError(
            f"aggregation '{keys.aggregation}' with byzantine = {keys.byzantine} takes {fewest} "
            f"updates, and a round of {wanted} clients ends with {needed}; ask more clients, raise "
            "quorum, or reckon with fewer bad ones"
        )


def _check_privacy(keys: CountingKeys, counting: Counting) -> None:
    if counting.privacy is None:
        return
    if keys.aggregation == FEDBUFF:
        raise InputError(
            "aggregation = 'fedbuff' with [privacy]: a client whose late update is folded in may "
            "count twice in one round, which the noise does not hide; choose the rule mean, or "
            "leave [privacy] out"
        )
    epsilon(counting.privacy, 1)
