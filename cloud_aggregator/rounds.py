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

_MOST_OVER_SELECTION = 10.0


@dataclass(frozen=True, kw_only=True)
class RoundRules:
    """When a round ends, and how many are asked so that it ends soon.

    Attributes:
        quorum: Share of the wanted cohort whose updates end the round, in (0, 1].
        deadline_seconds: The round ends then at the latest, > 0.
        over_selection: Devices that are asked for each update that is needed, >= 1. Where it makes
            fewer than are wanted, those that are wanted are asked.
        replacements: Whether another device is asked in the place of one that vanished.
    """

    quorum: float
    deadline_seconds: float
    over_selection: float = 1.0
    replacements: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.quorum <= 1:
            raise InputError(f"quorum = {self.quorum}; give a share above 0 and at most 1")
        if not self.deadline_seconds > 0:
            raise InputError(f"deadline_seconds = {self.deadline_seconds}; give more than 0")
        if not 1 <= self.over_selection <= _MOST_OVER_SELECTION:
            raise InputError(
                f"over_selection = {self.over_selection}; give 1 to {_MOST_OVER_SELECTION:g} "
                "devices for each update that is needed"
            )

    def needed(self, wanted: int) -> int:
        """Return how many updates end a round for which ``wanted`` clients are wanted."""
        return max(1, math.ceil(self.quorum * wanted - 1e-9))

    def asked(self, wanted: int) -> int:
        """Return how many devices to ask for a round for which ``wanted`` clients are wanted."""
        return max(wanted, math.ceil(self.over_selection * self.needed(wanted) - 1e-9))


class TrainingRound:
    """A round that is open until its quorum, its deadline, or until nobody is left to wait for.

    A client that vanished may come back: it is waited for until another one takes its place, and
    its update counts even then if it comes before the end.

    Args:
        cohort: Who is asked.
        rules: When the round ends.
        wanted: How many clients the quorum is a share of; by default the cohort.
    """

    def __init__(
        self, cohort: Iterable[str], rules: RoundRules, *, wanted: int | None = None
    ) -> None:
        self.cohort = sorted(cohort)
        self._rules = rules
        self._needed = rules.needed(len(self.cohort) if wanted is None else wanted)
        self._arrived: dict[str, float] = {}
        self._late: set[str] = set()
        self._refused: set[str] = set()
        self._gone: set[str] = set()
        self._replaced: dict[str, str] = {}
        self.closed_at: float | None = None
        if not self.cohort:
            self.closed_at = 0.0

    def arrived(self, client: str, at: float) -> Verdict:
        """Count a client's verified update that came at ``at``."""
        if client not in self.cohort:
            return "stranger"
        if client in self._arrived or client in self._late:
            return "duplicate"
        self.returned(client, at)
        if self.closed_at is not None:
            self._late.add(client)
            return "late"
        self._arrived[client] = at
        self._refused.discard(client)
        if len(self._arrived) >= self._needed:
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

    def lost(self, client: str, at: float) -> None:
        """Note that a client vanished: its last will came, or nothing for too long."""
        self.passed(at)
        if client in self.cohort and client not in self._arrived:
            self._gone.add(client)

    def returned(self, client: str, at: float) -> None:
        """Note that a client is there; its place is free no longer, unless it was taken."""
        self.passed(at)
        self._gone.discard(client)

    def vacancies(self, at: float) -> list[str]:
        """Return who should be replaced, in client order, while there is time for another.

        There is as long as what is left of the round is at least what its first update took; where
        none has come, half of the deadline.
        """
        self.passed(at)
        if self.closed_at is not None or not self._rules.replacements:
            return []
        deadline = self._rules.deadline_seconds
        takes = min(self._arrived.values(), default=deadline / 2)
        if at + takes > deadline:
            return []
        return sorted(self._gone - self._refused - set(self._replaced))

    def replaced(self, client: str, by: str, at: float) -> None:
        """Ask ``by`` in the place of ``client``, which nobody waits for any longer.

        Raises:
            ValueError: If there is no vacancy of ``client``, or ``by`` was asked already.
        """
        if client not in self.vacancies(at):
            raise ValueError(f"'{client}' has left no vacancy in this round")
        if by in self.cohort:
            raise ValueError(f"'{by}' was asked in this round already")
        self._replaced[client] = by
        self.cohort = sorted([*self.cohort, by])

    def recorded(self, accepted: Iterable[str], at: float = 0.0) -> None:
        """Close the round at ``at`` with the set that an earlier process accepted.

        The set wins over any order of arrival: who is in it has arrived, and nobody else can.

        Raises:
            ValueError: If it names a client that was not asked.
        """
        taken = sorted(set(accepted))
        strangers = sorted(set(taken) - set(self.cohort))
        if strangers:
            raise ValueError(f"'{strangers[0]}' was accepted in a round that did not ask it")
        self._late |= set(self._arrived) - set(taken)
        self._late -= set(taken)
        self._refused -= set(taken)
        self._arrived = {client: self._arrived.get(client, at) for client in taken}
        self.closed_at = at

    def passed(self, at: float) -> None:
        """Note that it is ``at``; past the deadline the round closes."""
        if self.closed_at is None and at > self._rules.deadline_seconds:
            self.closed_at = self._rules.deadline_seconds

    def _close_if_nobody_is_left(self, at: float) -> None:
        settled = set(self._arrived) | self._refused | set(self._replaced)
        if self.closed_at is None and settled >= set(self.cohort):
            self.closed_at = at

    @property
    def accepted(self) -> list[str]:
        """Clients whose updates count, in client order."""
        return sorted(self._arrived)

    @property
    def late(self) -> list[str]:
        """Clients whose updates came after the end, in client order."""
        return sorted(self._late)

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
