"""What devices are asked for, and the waiting for it: to appear, to train, to measure, to leave.

Straight code that waits at the inbox until its condition holds. In emulation every device is waited
for; in deployment a round ends by quorum or deadline, and who vanishes is replaced.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Literal

from cloud_aggregator.cohort import able, choose_cohort, choose_replacement, least_there
from cloud_aggregator.course import Course
from cloud_aggregator.desk import Desk
from cloud_aggregator.errors import RunFailedError
from cloud_aggregator.inbox import Inbox
from cloud_aggregator.intake import Client, Intake, IntakeRules
from cloud_aggregator.journal import Journal
from cloud_aggregator.methods import own_layout
from cloud_aggregator.presence import Moment
from cloud_aggregator.records import modelled_seconds
from cloud_aggregator.registry import Registry
from cloud_aggregator.store import OpenRound
from cloud_aggregator.tasks import Work, make_tasks
from device_profiles.errors import InputError
from messaging.protocol import DeviceRecord, Outcome, Report

log = logging.getLogger(__name__)

_KEEP_SECONDS = 5.0  # of an open round's time that a restart may forget
_LOOK_SECONDS = 0.5  # in deployment, between two looks at the deadline, and at who is there


class Phases:
    """The phases of one run.

    Args:
        course: Where the run is.
        registry: Who takes part.
        desk: Talks to them.
        inbox: Where to wait for what they say.
        journal: What is put down on the way.
        logs: Where emulated clients' logs are, for what an error says.
        notify: Told of what happens (event, fields).
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        course: Course,
        registry: Registry,
        desk: Desk,
        inbox: Inbox,
        journal: Journal,
        *,
        logs: Path,
        notify: Callable[..., None],
        clock: Callable[[], float],
    ) -> None:
        self._course = course
        self._settings = course.settings
        self._registry = registry
        self._desk = desk
        self._inbox = inbox
        self._journal = journal
        self._logs = logs
        self._notify = notify
        self._clock = clock

    # -- to appear and to leave ------------------------------------------------------------------

    def gather(self) -> None:
        """Wait for the devices that the run needs to begin.

        Raises:
            RunFailedError: If emulated clients do not appear in time.
        """
        settings = self._settings

        def complete() -> bool:
            return len(self._registry.online) >= settings.clients

        while not self._inbox.wait(complete, settings.gather_seconds):
            there = len(self._registry.online)
            if settings.virtual_time:
                raise RunFailedError(
                    f"{there} of {settings.clients} emulated clients appeared within "
                    f"{settings.gather_seconds:g} s; see the workers' logs in {self._logs}"
                )
            if there >= settings.minimum_clients:
                break
            log.info("waiting for devices: %d of %d are there", there, settings.minimum_clients)

    def dismiss(self, reason: str) -> None:
        """Tell every device that the run is over, and keep saying so until they have left.

        A broker that is restarted now has forgotten what it was told; who comes back asks again.
        """
        self._desk.dismiss(reason)
        if self._settings.virtual_time:
            self._inbox.wait(lambda: not self._registry.online, self._settings.gather_seconds)
            self._desk.clear_manifest()
        else:
            self._inbox.wait(lambda: self._registry.all_left, self._settings.farewell_seconds)

    # -- to train --------------------------------------------------------------------------------

    def train(self, number: int) -> Intake:
        """Do a training round, or go on with it; return its updates once it is closed.

        Raises:
            RunFailedError: If an emulated client gives nothing in time.
            InputError: If nobody meets the deadline, where that is a mistake; if a private round
                cannot be gone on with.
            SpoolFullError: If the disk has no room for an update.
            StoreError: If the store cannot be written.
        """
        intake = self._open(number)
        if self._settings.virtual_time:
            self._ask_those_missing(intake)
            if not self._outlast(lambda: intake.answered, lambda: len(intake.silent())):
                raise self._silence(intake.silent(), f"no update of round {number}")
            intake.settle()
            if self._settings.refuses_hopeless_deadline:
                self._check_deadline(intake)
            return intake
        if intake.round.closed_at is None:
            self._ask_those_missing(intake)
        kept = 0.0
        while intake.round.closed_at is None:
            self._look_and_wait(intake)
            seconds = intake.open_seconds(self._clock())
            if seconds - kept >= _KEEP_SECONDS and intake.round.closed_at is None:
                self._journal.keep_open(number, seconds)
                kept = seconds
        return intake

    def _look_and_wait(self, intake: Intake) -> None:
        """Look at who is there; wait until that changes, the round is over, or a moment passed."""
        seen = self._registry.changes
        self._look_who_is_there(intake)

        def changed() -> bool:
            return intake.round.closed_at is not None or self._registry.changes != seen

        self._inbox.wait(changed, _LOOK_SECONDS)
        intake.passed(self._clock())

    def _open(self, number: int) -> Intake:
        """Return the updates of a round: of one that an earlier process began, what it took.

        Raises:
            InputError: If updates that counted are gone and the round had its noise: done again, it
                would be two releases, and epsilon counts one.
        """
        stage = self._course.plan.stage
        if self._journal.stale is not None:
            self._journal.stale.forget_before(self._course.first_round)
        opened, moment = self._journal.round(number, stage), self._moment()
        if opened is None:
            wanted, cohort = self._cohort(moment)
            self._journal.keep_devices(self._registry)
            opened = self._journal.open(number, stage, wanted, cohort)
        intake = self._intake(number, opened, moment)
        lost = sorted(set(intake.round.accepted) - set(intake.contributions))
        if lost:
            if opened.noise_key is not None:
                raise InputError(
                    f"the update of '{lost[0]}' ({len(lost)} in all) that counted in round "
                    f"{number} is gone from the spool; the round's state may have been released "
                    "already, and in a private run it cannot be released a second time with other "
                    "noise: put the run's spool back as it was, or start a new run"
                )
            if self._course.plan.layout.specs:
                log.warning(
                    "the update of '%s' (%d in all) that counted in round %d is gone from the "
                    "spool; the round is done again",
                    lost[0],
                    len(lost),
                    number,
                )
            self._journal.reopen(intake)
            intake = self._intake(number, self._journal.round(number, stage) or opened, moment)
        return intake

    def _intake(self, number: int, opened: OpenRound, moment: Moment | None) -> Intake:
        settings = self._settings
        intake = self._desk.intake = Intake(
            number,
            {client: self._client(client) for client in opened.cohort},
            IntakeRules(
                run=settings.run,
                binding=settings.binding,
                layout=self._course.plan.layout,
                codec=settings.codec,
                limits=settings.limits,
                virtual_time=settings.virtual_time,
                round_rules=settings.rules,
                private=settings.counting.privacy is not None,
                max_norm=settings.counting.max_norm,
            ),
            self._journal.spool(number),
            began=self._clock() - opened.open_seconds,
            send=self._desk.send,
            notify=self._notify,
            wanted=opened.wanted,
            stale=self._journal.stale,
            fetches=self._desk.fetches,
            moment=moment,
        )
        if opened.accepted is not None:
            intake.round.recorded(opened.accepted, opened.closed_seconds or 0.0)
        intake.restore()
        return intake

    def _client(self, name: str) -> Client:
        device = self._registry.devices[name]
        layout = own_layout(self._course.plan.layout, device.lora_count)
        return Client(examples=self._course.weight(device), layout=layout)

    def _ask_those_missing(self, intake: Intake) -> None:
        missing = [i for i in intake.round.cohort if i not in intake.contributions]
        self._assign("train", intake.number, missing, {})

    def _look_who_is_there(self, intake: Intake) -> None:
        """Note who of a round's cohort is gone, and ask others in their place."""
        now = self._clock()
        for client in intake.round.cohort:
            if self._registry.is_online(client):
                intake.returned(client, now)
            else:
                intake.lost(client, now)
        for _ in intake.vacancies(now):
            free = self._free(intake)
            if not free:
                return
            chosen = choose_replacement(self._settings.seed, intake.number, free)
            self._journal.keep_devices(self._registry)
            self._journal.ask(intake.number, [*intake.round.cohort, chosen])
            intake.invited(chosen, self._client(chosen), now)
            self._assign("train", intake.number, [chosen], {}, more=True)

    def _free(self, intake: Intake) -> list[str]:
        """Return who is there, can train, and was not asked in this round yet."""
        there = set(self._registry.online) - set(intake.round.cohort)
        return [i for i in able(self._trainable(), self._course.record.rounds) if i in there]

    def _trainable(self) -> dict[str, DeviceRecord]:
        known = self._registry.devices
        return {i: device for i, device in known.items() if self._course.weight(device)}

    def _moment(self) -> Moment | None:
        """Return when the next round begins and who is there, where not everyone always is.

        Raises:
            InputError: If so many as it needs never are.
        """
        settings, rounds = self._settings, self._course.record.rounds
        if settings.presence is None:
            return None
        least = least_there(settings.rules, settings.cohort)
        at = modelled_seconds(rounds)
        return settings.presence.moment(at, able(self._trainable(), rounds), least)

    def _cohort(self, moment: Moment | None) -> tuple[int, list[str]]:
        """Return how many clients a round needs a quorum of, and who is asked."""
        settings = self._settings
        self._await_enough()
        rounds, there = self._course.record.rounds, set(self._asked())
        if moment is not None:
            there &= set(moment.stays)
        devices = {i: device for i, device in self._trainable().items() if i in there}
        if settings.cohort is None:
            cohort = able(devices, rounds)
            return len(cohort), cohort
        wanted = settings.cohort.size
        asked = settings.rules.asked(wanted)
        return wanted, choose_cohort(settings.cohort, devices, rounds, size=asked)

    def _await_enough(self) -> None:
        """Wait until a round can begin: in deployment, with as many as the run began with."""
        settings = self._settings
        least = 1 if settings.virtual_time else settings.minimum_clients

        def enough() -> bool:
            return len(self._registry.online) >= least

        while not self._inbox.wait(enough, settings.gather_seconds):
            there = len(self._registry.online)
            log.info("waiting for devices: %d of %d are there", there, least)

    def _asked(self) -> list[str]:
        """Return the devices that get the next task.

        In emulation that is every one: whether a worker is just being started again is no part of
        what a run is a function of.
        """
        virtual = self._settings.virtual_time
        return sorted(self._registry.devices) if virtual else self._registry.online

    def _check_deadline(self, intake: Intake) -> None:
        """Refuse a deadline that nobody meets, before any round is built on it."""
        deadline, fastest = self._settings.rules.deadline_seconds, intake.fastest
        if intake.number == 1 and fastest is not None and fastest > deadline:
            raise InputError(
                f"deadline_seconds = {deadline:g}: nobody meets it, the fastest of "
                f"{len(intake.round.cohort)} clients needs {fastest:.4g} s (modelled) for training "
                "and upload; give more, or fewer local steps"
            )

    # -- to measure ------------------------------------------------------------------------------

    def evaluate(
        self,
        number: int,
        outcomes: Mapping[str, Outcome],
        work: Literal["evaluate", "restore"] = "evaluate",
    ) -> dict[str, Report]:
        """Let every device measure the newest state; return what they report.

        Args:
            number: Of the round.
            outcomes: What became of each client's update of it.
            work: To measure, or first to take back what the round made.

        Raises:
            RunFailedError: If an emulated client gives nothing in time.
        """
        settings, reports = self._settings, self._desk.reports
        reports.clear()
        asked = self._asked()
        self._assign(work, number, asked, outcomes)

        def waited_for(client: str) -> bool:
            return settings.virtual_time or self._registry.is_online(client)

        def complete() -> bool:
            return all(i in reports or not waited_for(i) for i in asked)

        if not settings.virtual_time:
            self._inbox.wait(complete, settings.patience_seconds)
        elif not self._outlast(complete, lambda: len(reports)):
            raise self._silence(sorted(set(asked) - set(reports)), "no held-out results")
        self._desk.tasks.clear()
        return dict(reports)

    def _assign(
        self,
        work: Work,
        number: int,
        clients: Iterable[str],
        outcomes: Mapping[str, Outcome],
        *,
        more: bool = False,
    ) -> None:
        """Tell devices what to do, and what became of their last updates."""
        told = self._course.outcomes() | {i: (word, number) for i, word in outcomes.items()}
        tasks = make_tasks(self._course, work, number, clients, told)
        stage = self._course.plan.stage
        said = {"work": work, "stage": stage, "round": number, "clients": sorted(tasks)}
        self._notify("task", **said, **({"more": True} if more else {}))
        if more:
            self._desk.assign_more(tasks)
        else:
            self._desk.assign(tasks)

    def _outlast(self, done: Callable[[], bool], progress: Callable[[], int]) -> bool:
        return self._inbox.outlast(done, progress, self._settings.patience_seconds)

    def _silence(self, silent: list[str], what: str) -> RunFailedError:
        return RunFailedError(
            f"emulated client '{silent[0]}' ({len(silent)} in all) gave {what} within "
            f"{self._settings.patience_seconds:g} s; see the workers' logs in {self._logs}"
        )
