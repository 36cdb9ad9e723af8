"""The aggregator: gathers devices, sends tasks, takes updates, averages, and keeps the record.

One thread. Whatever arrives is put on an inbox by the transport; the phases of a run are straight
code that waits at the inbox until their condition holds.
"""

from __future__ import annotations

import logging
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Literal

from cloud_aggregator.aggregation import AGGREGATIONS
from cloud_aggregator.cohort import able, choose_cohort
from cloud_aggregator.course import Course
from cloud_aggregator.desk import Desk
from cloud_aggregator.inbox import Inbox, StoppedError
from cloud_aggregator.intake import Client, Intake, IntakeRules
from cloud_aggregator.methods import own_layout
from cloud_aggregator.records import Observed, RoundRecord, RunRecord
from cloud_aggregator.registry import Registry
from cloud_aggregator.round_record import round_record
from cloud_aggregator.run_folder import RunFolder
from cloud_aggregator.settings import RunSettings
from cloud_aggregator.spool import Spool
from cloud_aggregator.stages import StagePlan
from cloud_aggregator.summary import client_before, global_figures, summarise
from cloud_aggregator.tasks import Work, make_tasks
from device_profiles.errors import InputError
from messaging import topics
from messaging.layout import Vector
from messaging.protocol import Outcome, Report
from messaging.transport import Network

log = logging.getLogger(__name__)

_LOOK_SECONDS = 0.5  # in deployment, between two looks at the deadline

Status = Literal["done", "running", "stopped", "failed"]


class RunFailedError(Exception):
    """The run cannot go on; what was done is on disk."""

    exit_code = 1


class Aggregator:
    """One run.

    Args:
        settings: What the run is.
        record: Its record so far; rounds in it are not done again.
        folder: Where record, global states and spool are.
        network: Opens the connection.
        notify: Told of everything that happens (event, fields), for progress and metrics.
        memory: Returns the bytes that the run holds now, for the record's peak.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        settings: RunSettings,
        record: RunRecord,
        folder: RunFolder,
        network: Network,
        *,
        notify: Callable[..., None],
        memory: Callable[[], int],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.settings = settings
        self.record = record
        self._folder = folder
        self._notify = notify
        self._memory = memory
        self._clock = clock
        self._peak_memory = 0
        self._course = Course(settings, record, folder)
        self._registry = Registry(
            binding=settings.binding,
            layout=self._course.layouts_sha256,
            known=settings.known_clients,
            scoring=next((device.scoring for device in record.clients), None),
        )
        self._inbox = Inbox(
            take=self._received,
            tick=self._tick,
            clock=clock,
        )
        self._transport = network.open(
            client_id=f"pwff-{settings.run}-aggregator",
            filters=topics.everything_up(settings.run),
            deliver=self._inbox.put,
            connected=lambda: self._inbox.put("", b""),
        )
        self._desk = Desk(
            self._course,
            self._registry,
            self._transport,
            session=secrets.token_hex(8),
            epoch=0,
            notify=notify,
            clock=clock,
        )

    def _received(self, topic: str, payload: bytes) -> None:
        self._desk.received(topic, payload)

    def stop(self) -> None:
        """Make ``run`` leave in good order; callable from any thread or signal handler."""
        self._inbox.stop()

    def fail(self, error: Exception) -> None:
        """Make ``run`` raise ``error``; callable from any thread."""
        self._inbox.fail(error)

    def run(self) -> RunRecord:
        """Do what is left of the run and return its record.

        Raises:
            RunFailedError: If emulated clients do not appear or answer in time.
            SpoolFullError: If the spool's disk is full.
            InputError: If a run to go on with is damaged, or a stage of it is to go on that
                another has followed.
        """
        self._course.check_order()
        self._transport.start()
        try:
            self._close_record("running", None)
            self._remove_old_updates()
            self._enter(self.settings.stages[0])
            self._gather()
            reason = ""
            for plan in self.settings.stages:
                if plan is not self._course.plan:
                    self._enter(plan)
                reason = self._do_stage()
                if reason == "batteries":
                    break
            self._close_record("done", reason)
            self._dismiss(reason)
        except StoppedError:
            self._break_off("stopped", "interrupted")
        except Exception as err:
            self._break_off("failed", str(err)[:400])
            raise
        finally:
            self._leave()
        return self.record

    def _break_off(self, status: Status, reason: str) -> None:
        if self.record.status == "running":  # what is done is done, though devices have not left
            self._close_record(status, reason)

    def _leave(self) -> None:
        if self._desk.intake is not None:
            self._desk.intake.close()
        try:
            self._notify("end", status=self.record.status, reason=self.record.stop_reason)
        finally:
            self._transport.close()

    def _close_record(self, status: Status, reason: str | None) -> None:
        self.record.status = status
        self.record.stop_reason = reason
        self._write_record()

    def _write_record(self) -> None:
        self.record.summary = summarise(self.record)
        self._folder.write_record(self.record)

    def _remove_old_updates(self) -> None:
        """Leave in the spool only what an earlier process took in the round that comes next."""
        done = len(self.record.rounds)
        begun = self.record.before or done
        for path in self._folder.spool_path.glob("*"):
            if not begun or path.name != str(done + 1):
                shutil.rmtree(path, ignore_errors=True)

    def _tick(self, now: float) -> None:
        self._peak_memory = max(self._peak_memory, self._memory())
        if self._desk.intake is not None:
            self._desk.intake.expire(now)

    # -- phases ----------------------------------------------------------------------------------

    def _enter(self, plan: StagePlan) -> None:
        self._course.enter(plan)
        self._desk.publish_manifest()

    def _gather(self) -> None:
        settings = self.settings

        def complete() -> bool:
            return len(self._registry.online) >= settings.clients

        while not self._inbox.wait(complete, settings.gather_seconds):
            there = len(self._registry.online)
            if settings.virtual_time:
                raise RunFailedError(
                    f"{there} of {settings.clients} emulated clients appeared within "
                    f"{settings.gather_seconds:g} s; see the workers' logs in {self._folder.path}"
                )
            if there >= settings.minimum_clients:
                break
            log.info("waiting for devices: %d of %d are there", there, settings.minimum_clients)
        self._list_clients()

    def _list_clients(self) -> None:
        """Take newly seen devices into the record."""
        known = {c.id: c for c in self.record.clients} | self._registry.devices
        self.record.clients = [known[i] for i in sorted(known)]
        data = self.record.data
        if data.sha256 is None:  # in deployment the data is the clients' own
            data.examples = sum(c.examples for c in self.record.clients)
            data.held_out_examples = sum(c.held_out_examples for c in self.record.clients)

    def _do_stage(self) -> str:
        """Do what is left of a stage; return why it is over."""
        if self._course.must_measure_first:
            self._before()
        while not (reason := self._course.stop_reason()):
            self._do_round(len(self.record.rounds) + 1)
        return reason

    def _before(self) -> None:
        reports = self._evaluate(len(self.record.rounds), {})
        stage = self._course.plan.stage
        self.record.before += [client_before(stage, r) for _, r in sorted(reports.items())]
        self._write_record()
        figures = global_figures(self._registry.devices, reports)
        self._notify("before", stage=stage, **figures.model_dump())

    def _do_round(self, number: int) -> None:
        began = self._clock()
        self._desk.time.taken()  # what was before the round is not its own
        intake = self._train(number)
        vector = self._course.shelf.vector
        with self._desk.time.part("aggregation"):
            self._aggregate(intake, vector)
        reports = self._evaluate(number, {i: intake.round.status(i) for i in intake.round.cohort})
        why, figures = self._course.verdict(self._registry.devices, reports)
        if why:
            # Devices now lose what they learned: broken off from here, the round is done again.
            intake.clear()
            reports = self._take_back(number, vector)
        self._list_clients()
        record = round_record(
            self.record.clients,
            intake,
            reports,
            stage=self._course.plan.stage,
            before=self.record.rounds[-1] if self.record.rounds else None,
            observed=Observed(
                wall_seconds=self._clock() - began,
                retransmitted_bytes=intake.retransmitted_bytes,
                peak_memory_bytes=self._peak_memory,
                refused=dict(self._desk.refused + intake.refused),
                spent_seconds=self._desk.time.taken(),
            ),
        )
        if why:
            record.taken_back, record.dropped = why, figures
        self._desk.refused.clear()
        self.record.rounds.append(record)
        self._write_record()
        intake.clear()
        self._notify_round(record)

    def _aggregate(self, intake: Intake, vector: Vector | None) -> None:
        """Fold the accepted updates into the state, and publish what comes of it."""
        if intake.round.accepted and vector is not None:
            aggregate = AGGREGATIONS[self._course.average]
            layout = self._course.plan.layout
            after = aggregate(vector, intake.accepted_updates(), layout)
            self._course.shelf.put(after, intake.number)
            self._desk.publish_manifest()

    def _take_back(self, number: int, vector: Vector | None) -> dict[str, Report]:
        """Make what was there before a round come of it, everywhere; return what is measured."""
        if vector is not None:
            self._course.shelf.put(vector, number)
            self._desk.publish_manifest()
        return self._evaluate(number, {}, work="restore")

    def _train(self, number: int) -> Intake:
        settings = self.settings
        cohort = self._cohort()
        intake = self._desk.intake = Intake(
            number,
            {i: self._client(i) for i in cohort},
            IntakeRules(
                run=settings.run,
                binding=settings.binding,
                layout=self._course.plan.layout,
                codec=settings.codec,
                limits=settings.limits,
                virtual_time=settings.virtual_time,
                round_rules=settings.rules,
            ),
            Spool(self._folder.spool_path / str(number)),
            began=self._clock(),
            send=self._desk.send,
            notify=self._notify,
        )
        intake.restore()
        missing = [i for i in cohort if i not in intake.contributions]
        self._assign("train", number, missing, {})
        if settings.virtual_time:
            if not self._outlast(lambda: intake.answered, lambda: len(intake.silent())):
                raise self._silence(intake.silent(), f"no update of round {number}")
            intake.settle()
            if settings.refuses_hopeless_deadline:
                self._check_deadline(intake)
        else:
            while intake.round.closed_at is None:
                self._inbox.wait(lambda: intake.round.closed_at is not None, _LOOK_SECONDS)
                intake.passed(self._clock())
        return intake

    def _check_deadline(self, intake: Intake) -> None:
        """Refuse a deadline that nobody meets, before any round is built on it."""
        deadline, fastest = self.settings.rules.deadline_seconds, intake.fastest
        if intake.number == 1 and fastest is not None and fastest > deadline:
            raise InputError(
                f"deadline_seconds = {deadline:g}: nobody meets it, the fastest of "
                f"{len(intake.round.cohort)} clients needs {fastest:.4g} s (modelled) for training "
                "and upload; give more, or fewer local steps"
            )

    def _client(self, name: str) -> Client:
        device = self._registry.devices[name]
        layout = own_layout(self._course.plan.layout, device.lora_count)
        return Client(examples=self._course.weight(device), layout=layout)

    def _cohort(self) -> list[str]:
        while not self._registry.online:
            log.info("waiting for devices: none is there")
            self._inbox.wait(lambda: bool(self._registry.online), self.settings.gather_seconds)
        known, rounds = self._registry.devices, self.record.rounds
        devices = {i: device for i, device in known.items() if self._course.weight(device)}
        if self.settings.cohort is not None:
            return choose_cohort(self.settings.cohort, devices, rounds)
        return [i for i in self._asked() if i in able(devices, rounds)]

    def _asked(self) -> list[str]:
        """Return the devices that get the next task.

        In emulation that is every one: whether a worker is just being started again is no part of
        what a run is a function of.
        """
        return (
            sorted(self._registry.devices) if self.settings.virtual_time else self._registry.online
        )

    def _evaluate(
        self,
        number: int,
        outcomes: Mapping[str, Outcome],
        work: Literal["evaluate", "restore"] = "evaluate",
    ) -> dict[str, Report]:
        settings, reports = self.settings, self._desk.reports
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

    def _outlast(self, done: Callable[[], bool], progress: Callable[[], int]) -> bool:
        return self._inbox.outlast(done, progress, self.settings.patience_seconds)

    def _silence(self, silent: list[str], what: str) -> RunFailedError:
        return RunFailedError(
            f"emulated client '{silent[0]}' ({len(silent)} in all) gave {what} within "
            f"{self.settings.patience_seconds:g} s; see the workers' logs in {self._folder.path}"
        )

    def _assign(
        self, work: Work, number: int, clients: Iterable[str], outcomes: Mapping[str, Outcome]
    ) -> None:
        """Tell devices what to do, and what became of their last updates."""
        told = self._course.outcomes() | {i: (word, number) for i, word in outcomes.items()}
        tasks = make_tasks(self._course, work, number, clients, told)
        stage = self._course.plan.stage
        self._notify("task", work=work, stage=stage, round=number, clients=sorted(tasks))
        self._desk.assign(tasks)

    def _dismiss(self, reason: str) -> None:
        """Tell every device that the run is over, and keep saying so until they have left."""
        self._desk.dismiss(reason)
        if self.settings.virtual_time:
            self._inbox.wait(lambda: not self._registry.online, self.settings.gather_seconds)
            self._desk.clear_manifest()

    def _notify_round(self, record: RoundRecord) -> None:
        self._notify(
            "round",
            stage=record.stage,
            round=record.round,
            accepted=len(record.accepted),
            clients=len(record.clients),
            taken_back=record.taken_back,
            **record.global_.model_dump(),
            upload_bytes=sum(c.upload_bytes for c in record.clients),
            virtual_seconds=record.virtual_seconds,
            wall_seconds=record.observed.wall_seconds,
        )
