"""One training round and the end of training, as state machines without input or output.

Times are seconds since the round began, on whatever clock the caller keeps: a wall clock in
deployment, the devices' modelled time in emulation.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from device_profiles.errors import InputError

Verdict = Literal["accepted", "late", "duplicate", "stranger"]


@dataclass(frozen=True, kw_only=True)
class RoundRules:
    """When a round ends.

    Attributes:
        quorum: Share of the cohort whose updates end the round, in (0, 1].
        deadline_seconds: The round ends then at the latest, > 0.
    """

    quorum: float
    deadline_seconds: float

    def __post_init__(self) -> None:
        if not 0 < self.quorum <= 1:
            raise InputError(f"quorum = {self.quorum}; give a share above 0 and at most 1")
        if not self.deadline_seconds > 0:
            raise InputError(f"deadline_seconds = {self.deadline_seconds}; give more than 0")

    def needed(self, cohort: int) -> int:
        """Return how many updates end a round of ``cohort`` clients."""
        return max(1, math.ceil(self.quorum * cohort - 1e-9))


class TrainingRound:
    """A round that is open until its quorum, its deadline, or until nobody is left to wait for."""

    def __init__(self, cohort: Iterable[str], rules: RoundRules) -> None:
        self.cohort = sorted(cohort)
        self._rules = rules
        self._arrived: list[str] = []
        self._late: set[str] = set()
        self._refused: set[str] = set()
        self.closed_at: float | None = None
        if not self.cohort:
            self.closed_at = 0.0

    def arrived(self, client: str, at: float) -> Verdict:
        """Count a client's verified update that came at ``at``."""
        if client not in self.cohort:
            return "stranger"
        if client in self._arrived or client in self._late:
            return "duplicate"
        self.passed(at)
        if self.closed_at is not None:
            self._late.add(client)
            return "late"
        self._arrived.append(client)
        self._refused.discard(client)
        if len(self._arrived) >= self._rules.needed(len(self.cohort)):
            self.closed_at = at
        else:
            self._close_if_nobody_is_left(at)
        return "accepted"

    def refused(self, client: str, at: float) -> None:
        """Note that a client's update was refused: nobody waits for it any longer."""
        self.passed(at)
        if client in self.cohort and client not in self._arrived:
            self._refused.add(client)
            self._close_if_nobody_is_left(at)

    def passed(self, at: float) -> None:
        """Note that it is ``at``; past the deadline the round closes."""
        if self.closed_at is None and at > self._rules.deadline_seconds:
            self.closed_at = self._rules.deadline_seconds

    def _close_if_nobody_is_left(self, at: float) -> None:
        if self.closed_at is None and len(self._arrived) + len(self._refused) == len(self.cohort):
            self.closed_at = at

    @property
    def accepted(self) -> list[str]:
        """Clients whose updates count, in client order."""
        return sorted(self._arrived)

    def status(self, client: str) -> Literal["aggregated", "late", "lost", "rejected"]:
        """Return what became of a client of the cohort."""
        if client in self._arrived:
            return "aggregated"
        if client in self._late:
            return "late"
        return "rejected" if client in self._refused else "lost"


class Convergence:
    """Stops when the held-out loss has stopped falling.

    That is: when it has not improved by more than ``epsilon`` for ``patience`` rounds; ``patience``
    0 never stops.
    """

    def __init__(self, *, epsilon: float, patience: int) -> None:
        if epsilon < 0 or patience < 0:
            raise InputError(f"epsilon = {epsilon}, patience = {patience}; give 0 or more")
        self._epsilon = epsilon
        self._patience = patience
        self._best = math.inf
        self._waited = 0

    def observed(self, loss: float | None) -> bool:
        """Take the loss after one more round; return whether training has converged."""
        if loss is None or not self._patience:
            return False
        if loss < self._best - self._epsilon:
            self._best = loss
            self._waited = 0
        else:
            self._waited += 1
        return self._waited >= self._patience
