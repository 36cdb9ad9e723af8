"""The aggregator: gathers devices, sends tasks, takes updates, averages, and keeps the record.

One thread. Whatever arrives is put on an inbox by the transport; the phases of a run are straight
code that waits at the inbox until their condition holds.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable
from typing import Literal

from cloud_aggregator.combining import Combined, combine, round_noise
from cloud_aggregator.course import Course
from cloud_aggregator.desk import Desk
from cloud_aggregator.door import Door, DoorLimits
from cloud_aggregator.fetches import Fetches
from cloud_aggregator.health import Vitals
from cloud_aggregator.inbox import Inbox, StoppedError
from cloud_aggregator.intake import Intake
from cloud_aggregator.journal import Journal
from cloud_aggregator.metrics import Metrics
from cloud_aggregator.phases import Phases
from cloud_aggregator.records import Observed, RunRecord
from cloud_aggregator.registry import Registry
from cloud_aggregator.round_record import round_event, round_record
from cloud_aggregator.run_folder import RunFolder
from cloud_aggregator.settings import RunSettings
from cloud_aggregator.spending import account
from cloud_aggregator.stages import StagePlan
from cloud_aggregator.store import Store
from cloud_aggregator.summary import client_before, global_figures, list_clients, summarise
from messaging import topics
from messaging.key_files import RunKeys
from messaging.layout import Vector
from messaging.protocol import Report, encoder_mark
from messaging.security import CloudSeal
from messaging.transport import Network, is_connected

log = logging.getLogger(__name__)

Status = Literal["done", "running", "stopped", "failed"]


class Aggregator:
    """One run.

    Args:
        settings: What the run is.
        record: Its record so far; rounds in it are not done again.
        folder: Where record, global states and spool are.
        network: Opens the connection.
        store: Of the run; whoever opened it closes it.
        notify: Told of everything that happens (event, fields), for progress and metrics.
        memory: Returns the bytes that the run holds now, for the record's peak.
        clock: Monotonic seconds.
        keys: The run's; with them every message is sealed.
        door: How much may come in.
    """

    def __init__(
        self,
        settings: RunSettings,
        record: RunRecord,
        folder: RunFolder,
        network: Network,
        *,
        store: Store,
        notify: Callable[..., None],
        memory: Callable[[], int],
        clock: Callable[[], float] = time.monotonic,
        keys: RunKeys | None = None,
        door: DoorLimits | None = None,
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
            encoder=encoder_mark(record.encoder.sha256 if record.encoder else None),
            devices=store.devices(),
            epochs=store.epochs(),
            silence_seconds=settings.silence_seconds,
            private=settings.counting.privacy is not None,
        )
        self._inbox = Inbox(
            take=self._received,
            tick=self._tick,
            clock=clock,
        )
        self._door = Door(door or DoorLimits(), self._inbox.put, clock)
        self._transport = network.open(
            client_id=f"pwff-{settings.run}-aggregator",
            filters=topics.everything_up(settings.run),
            deliver=self._door.deliver,
            connected=lambda: self._inbox.put("", b""),
        )
        session = secrets.token_hex(8)
        seal = None
        if keys is not None:
            seal = CloudSeal(settings.run, keys.master, keys.signing_key, session, store.epoch)
        self._desk = Desk(
            self._course,
            self._registry,
            self._transport,
            session=session,
            epoch=store.epoch,
            notify=notify,
            clock=clock,
            seal=seal,
        )
        if settings.claims is not None:
            self._desk.fetches = Fetches(
                settings.claims.store,
                lambda fetched: self._inbox.call(lambda: self._desk.fetched(fetched)),
            )
        self._journal = Journal(
            store,
            folder,
            max_staleness=settings.counting.max_staleness,
            draws_noise=settings.counting.privacy is not None and not settings.virtual_time,
        )
        self._phases = Phases(
            self._course,
            self._registry,
            self._desk,
            self._inbox,
            self._journal,
            logs=folder.path,
            notify=notify,
            clock=clock,
        )

    def _received(self, topic: str, payload: bytes) -> None:
        self._door.taken(payload)
        self._desk.received(topic, payload)

    def vitals(self) -> Vitals:
        """Return what the run is asked for its health."""
        return Vitals(
            ticked_at=lambda: self._inbox.ticked_at,
            connected=lambda: is_connected(self._transport),
            store_open=self._folder.is_writable,
            finished=lambda: self.record.status != "running",
            clock=self._clock,
        )

    def watch(self, metrics: Metrics) -> None:
        """Let metrics ask for the lengths of what waits."""
        metrics.watch_queue("inbox_bytes", lambda: self._door.waiting_bytes)

    def stop(self) -> None:
        """Make ``run`` leave in good order; callable from any thread or signal handler."""
        self._inbox.stop()
        if self.settings.claims is not None:  # this thread may be waiting for it
            self.settings.claims.store.leave()

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
        account(self.record, self.settings)
        self._transport.start()
        try:
            self._journal.begin(len(self.record.rounds))
            self._close_record("running", None)
            self._enter(self.settings.stages[0])
            if self.settings.virtual_time or not self._course.is_over:
                self._phases.gather()
                list_clients(self.record, self._registry.devices)
            reason = ""
            for plan in self.settings.stages:
                if plan is not self._course.plan:
                    self._enter(plan)
                reason = self._do_stage()
                if reason == "batteries":
                    break
            self._close_record("done", reason)
            self._phases.dismiss(reason)
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
        if self._desk.fetches is not None:
            self._desk.fetches.close()
        self._tell_refusals()
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

    def _tick(self, now: float) -> None:
        self._peak_memory = max(self._peak_memory, self._memory())
        self._tell_refusals()
        for client in self._registry.look(now):
            log.info("'%s' has said nothing for too long; it is taken for gone", client)
            self._notify("gone", client=client)
        self._journal.keep_devices(self._registry)
        if self._desk.intake is not None:
            self._desk.intake.expire(now)

    def _tell_refusals(self) -> None:
        for refusal in self._door.refusals():
            self._desk.refused_at_door(*refusal)
        self._desk.tell_refusals()

    # -- phases ----------------------------------------------------------------------------------

    def _enter(self, plan: StagePlan) -> None:
        self._course.enter(plan)
        self._desk.publish_manifest()

    def _do_stage(self) -> str:
        """Do what is left of a stage; return why it is over."""
        if self._course.must_measure_first:
            self._before()
        while not (reason := self._course.stop_reason()):
            self._do_round(len(self.record.rounds) + 1)
        return reason

    def _before(self) -> None:
        reports = self._phases.evaluate(len(self.record.rounds), {})
        stage = self._course.plan.stage
        self.record.before += [client_before(stage, r) for _, r in sorted(reports.items())]
        self._write_record()
        figures = global_figures(self._registry.devices, reports)
        self._notify("before", stage=stage, **figures.model_dump())

    def _do_round(self, number: int) -> None:
        began = self._clock()
        self._desk.time.taken()  # what was before the round is not its own
        intake = self._phases.train(number)
        noise_key = self._journal.close(intake)
        vector = self._course.shelf.vector
        with self._desk.time.part("aggregation"):
            combined = self._aggregate(intake, vector, noise_key)
        reports = self._phases.evaluate(
            number, {i: intake.round.status(i) for i in intake.round.cohort}
        )
        why, figures = self._course.verdict(self._registry.devices, reports)
        if why:
            # Devices now lose what they learned: broken off from here, the round is done again.
            self._journal.reopen(intake)
            reports = self._take_back(number, vector)
        list_clients(self.record, self._registry.devices)
        self._tell_refusals()
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
            released=combined.state is not None,
            unchanged=combined.unchanged,
        )
        if why:
            record.taken_back, record.dropped = why, figures
        self._desk.refused.clear()
        self.record.rounds.append(record)
        account(self.record, self.settings)
        self._write_record()
        self._journal.finish(intake)
        self._course.prune()
        self._notify("round", **round_event(record, self.record.privacy))

    def _aggregate(self, intake: Intake, vector: Vector | None, noise_key: int | None) -> Combined:
        """Fold the updates that count into the state, and publish what comes of it."""
        if vector is None:
            return Combined(state=None)
        combined = combine(
            self.settings.counting,
            vector,
            intake,
            self._course.plan.layout,
            average=self._course.average,
            noise=round_noise(self.settings, intake.number, noise_key),
        )
        if combined.state is not None:
            self._course.shelf.put(combined.state, intake.number)
            self._desk.publish_manifest()
        return combined

    def _take_back(self, number: int, vector: Vector | None) -> dict[str, Report]:
        """Make what was there before a round come of it, everywhere; return what is measured."""
        if vector is not None:
            self._course.shelf.put(vector, number)
            self._desk.publish_manifest()
        return self._phases.evaluate(number, {}, work="restore")
