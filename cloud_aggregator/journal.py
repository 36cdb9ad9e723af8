"""What is put down when, so that an aggregator that is killed at any moment goes on as if not.

The order is what makes it whole: a cohort is in the store before anyone is asked; an update is in
the spool and in the store before its device hears DONE; the accepted set is in the store before it
is aggregated; the global state is on disk before ``run.json`` names it; and only what stands in
``run.json`` is forgotten.

A round whose updates are lost, or that is taken back, is opened again: the store says so at once,
and what an earlier try folded in (``stale``) is forgotten when the round is next begun. A process
that is killed in between finds an open round with a decision, which can be of an earlier try alone:
the store says that a round is closed before anything is decided.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable

from cloud_aggregator.intake import Intake
from cloud_aggregator.privacy import draw_noise_key
from cloud_aggregator.registry import Registry
from cloud_aggregator.run_folder import RunFolder
from cloud_aggregator.spool import Spool
from cloud_aggregator.stale import StaleUpdates
from cloud_aggregator.store import OpenRound, Store
from messaging.protocol import Stage


class Journal:
    """The journal of one run.

    Args:
        store: Of the run.
        folder: Of the run.
        max_staleness: Rounds for which late updates are kept; without it none is.
        draws_noise: Whether a round that closes draws the key of its noise.

    Attributes:
        stale: Late updates that wait for a later round; none where they are left out.
    """

    def __init__(
        self,
        store: Store,
        folder: RunFolder,
        *,
        max_staleness: int | None = None,
        draws_noise: bool = False,
    ) -> None:
        self._store = store
        self._folder = folder
        self._draws_noise = draws_noise
        self.stale = (
            None if max_staleness is None else StaleUpdates(folder.stale_path, max_staleness)
        )

    def begin(self, done: int) -> None:
        """Keep of what an earlier process left only what the round after ``done`` needs.

        Where there is no ``run.json``, the run is new, whatever else lies in its folder.
        """
        begun = self._folder.record_path.exists()
        if begun:
            self._store.keep_only(done + 1)
        else:
            self._store.forget()
            shutil.rmtree(self._folder.stale_path, ignore_errors=True)
        for path in self._folder.spool_path.glob("*"):
            if not begun or path.name != str(done + 1):
                shutil.rmtree(path, ignore_errors=True)

    def round(self, number: int, stage: Stage) -> OpenRound | None:
        """Return what an earlier process put down of a round; none if it is to begin."""
        opened = self._store.round(number)
        if opened is None or opened.stage != stage:
            return None
        if opened.accepted is None:
            self._forget_decision(number)
        return opened

    def open(self, number: int, stage: Stage, wanted: int, cohort: Iterable[str]) -> OpenRound:
        """Put down who will be asked in a round that begins."""
        cohort = tuple(sorted(cohort))
        self.spool(number).clear()
        self._forget_decision(number)
        self._store.open_round(number, stage, wanted, cohort)
        return OpenRound(
            stage=stage, wanted=wanted, cohort=cohort, accepted=None, closed_seconds=None
        )

    def ask(self, number: int, cohort: Iterable[str]) -> None:
        """Put down who is asked now, before one that takes another's place hears of it."""
        self._store.ask(number, cohort)

    def keep_open(self, number: int, seconds: float) -> None:
        """Put down for how long a round has been open, so that its deadline goes on."""
        self._store.keep_open(number, seconds)

    def spool(self, number: int) -> Spool:
        """Return the updates of a round."""
        return Spool(self._folder.spool_path / str(number), self._store.ledger(number))

    def close(self, intake: Intake) -> int | None:
        """Put down whose updates count, and what is folded in besides, before it is aggregated.

        Returns:
            The key of the round's noise, drawn once whatever happens; none where there is none.
        """
        round_, opened = intake.round, self._store.round(intake.number)
        key = opened.noise_key if opened is not None else None
        if key is None and self._draws_noise:
            key = draw_noise_key()
        self._store.close_round(
            intake.number,
            round_.accepted,
            round_.closed_at or 0.0,
            {client: round_.status(client) for client in round_.cohort},
            noise_key=key,
        )
        intake.folded()
        return key

    def reopen(self, intake: Intake) -> None:
        """Make a round be done again, by the same cohort, if the run breaks off from here.

        What it folded in stays decided for this process, whose record may yet say so.
        """
        self._store.reopen_round(intake.number)
        intake.clear()

    def _forget_decision(self, number: int) -> None:
        if self.stale is not None:
            self.stale.forget_decision(number)

    def finish(self, intake: Intake) -> None:
        """Forget a round that stands in ``run.json``."""
        self._store.keep_only(intake.number + 1)
        intake.clear()

    def keep_devices(self, registry: Registry) -> None:
        """Put down the devices that were there since someone last asked, with their starts."""
        self._store.keep_devices(registry.take_changed())
