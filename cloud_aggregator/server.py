"""The aggregator: gathers devices, sends tasks, takes updates, averages, and keeps the record.

One thread. Whatever arrives is put on an inbox by the transport; the phases of a run are straight
code that pumps the inbox until their condition holds.
"""

from __future__ import annotations

import itertools
import logging
import queue
import secrets
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Literal

from cloud_aggregator.aggregation import AGGREGATIONS
from cloud_aggregator.cohort import able, choose_cohort
from cloud_aggregator.intake import Client, Intake, IntakeRules
from cloud_aggregator.methods import find_method, initial_state, own_layout
from cloud_aggregator.records import (
    GlobalRound,
    Observed,
    RoundRecord,
    RunRecord,
)
from cloud_aggregator.registry import Registry
from cloud_aggregator.round_record import round_record
from cloud_aggregator.run_folder import RunFolder
from cloud_aggregator.settings import RunSettings
from cloud_aggregator.shelf import Shelf
from cloud_aggregator.spool import Spool
from cloud_aggregator.stages import StagePlan, collapse, stage_end
from cloud_aggregator.summary import client_before, global_figures, reward_change, summarise
from device_profiles.errors import InputError
from messaging import topics
from messaging.chunks import parse_chunk
from messaging.errors import ProtocolError
from messaging.layout import Vector, joint_sha256
from messaging.protocol import (
    DeviceRecord,
    Hello,
    Manifest,
    Message,
    Offer,
    Outcome,
    Reject,
    Report,
    StateRef,
    Task,
    Want,
    decode,
    encode,
)
from messaging.transport import Network

log = logging.getLogger(__name__)

_TICK_SECONDS = 0.5

Status = Literal["done", "running", "stopped", "failed"]
Work = Literal["train", "evaluate", "restore"]


class RunFailedError(Exception):
    """The run cannot go on; what was done is on disk."""

    exit_code = 1


class _StoppedError(Exception):
    """Someone asked the run to stop."""


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
        # A simple queue: a signal handler may put while this thread gets.
        self._inbox: queue.SimpleQueue[tuple[str, bytes] | None] = queue.SimpleQueue()
        self._stop = threading.Event()
        self._failure: Exception | None = None
        self._transport = network.open(
            client_id=f"pwff-{settings.run}-aggregator",
            filters=topics.everything_up(settings.run),
            deliver=lambda topic, payload: self._inbox.put((topic, payload)),
            connected=lambda: self._inbox.put(("", b"")),
        )
        self._plan = settings.stages[0]
        self._layouts = joint_sha256(plan.layout for plan in settings.stages)
        self._registry = Registry(
            binding=settings.binding,
            layout=self._layouts,
            known=settings.known_clients,
            scoring=next((device.scoring for device in record.clients), None),
        )
        self._shelf = Shelf(settings.run, self._plan.layout, folder, settings.chunk_bytes)
        self._policy: tuple[Vector, int] | None = None  # that instruction tuning ended with
        self._reward: StateRef | None = None  # the reward models that alignment scores by
        self._reference: StateRef | None = None  # the shared part of the stage-1 policy
        self._tasks: dict[str, Task] = {}
        self._reports: dict[str, Report] = {}
        self._intake: Intake | None = None
        self._refused: Counter[str] = Counter()
        self._peak_memory = 0
        self._finished = False
        self._session = secrets.token_hex(8)

    def stop(self) -> None:
        """Make ``run`` leave in good order; callable from any thread or signal handler."""
        self._stop.set()
        self._inbox.put(None)

    def fail(self, error: Exception) -> None:
        """Make ``run`` raise ``error``; callable from any thread."""
        self._failure = error
        self._inbox.put(None)

    def run(self) -> RunRecord:
        """Do what is left of the run and return its record.

        Raises:
            RunFailedError: If emulated clients do not appear or answer in time.
            SpoolFullError: If the spool's disk is full.
            InputError: If a run to go on with is damaged, or a stage of it is to go on that
                another has followed.
        """
        self._check_order()
        self._transport.start()
        try:
            self._close_record("running", None)
            self._remove_old_updates()
            self._enter(self.settings.stages[0])
            self._gather()
            reason = ""
            for plan in self.settings.stages:
                if plan is not self._plan:
                    self._enter(plan)
                reason = self._do_stage(plan)
                if reason == "batteries":
                    break
            self._close_record("done", reason)
            self._dismiss(reason)
        except _StoppedError:
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
        if self._intake is not None:
            self._intake.close()
        try:
            self._notify("end", status=self.record.status, reason=self.record.stop_reason)
        finally:
            self._transport.close()

    # -- phases ----------------------------------------------------------------------------------

    def _check_order(self) -> None:
        """Refuse more rounds of a stage that a later one has been built on."""
        begun = {r.stage for r in self.record.rounds} | {b.stage for b in self.record.before}
        stages = self.settings.stages
        for plan, after in itertools.pairwise(stages):
            rounds = self._rounds_of(plan)
            if after.stage in begun and not stage_end(plan, rounds):
                raise InputError(
                    f"the stage '{plan.stage}' ended after {len(rounds)} rounds and "
                    f"'{after.stage}' has begun; {plan.rounds} rounds of it cannot be done any "
                    "more: give its rounds, epsilon and patience as they were, or start a new run"
                )

    def _do_stage(self, plan: StagePlan) -> str:
        """Do what is left of a stage; return why it is over."""
        if not self._rounds_of(plan) and all(b.stage != plan.stage for b in self.record.before):
            self._before()
        while not (reason := self._stop_reason(plan)):
            self._do_round(len(self.record.rounds) + 1)
        return reason

    def _rounds_of(self, plan: StagePlan) -> list[RoundRecord]:
        return [r for r in self.record.rounds if r.stage == plan.stage]

    def _stop_reason(self, plan: StagePlan) -> str:
        if reason := stage_end(plan, self._rounds_of(plan)):
            return reason
        known = {device.id: device for device in self.record.clients}
        return "" if able(known, self.record.rounds) or not known else "batteries"

    def _close_record(self, status: Status, reason: str | None) -> None:
        self.record.status = status
        self.record.stop_reason = reason
        self._write_record()

    def _write_record(self) -> None:
        self.record.summary = summarise(self.record)
        self._folder.write_record(self.record)

    def _enter(self, plan: StagePlan) -> None:
        """Begin a stage or go on with it: put its newest global state on the shelf."""
        shelf = self._shelf
        if plan.stage == "alignment":
            self._reward = shelf.newest
        elif shelf.newest is not None and shelf.vector is not None:
            self._policy = (shelf.vector, shelf.newest.round)
        self._plan = plan
        shelf.enter(plan.layout)
        if plan.layout.specs:
            self._put_first(plan)
            if newest := max((r.round for r in self._rounds_of(plan) if r.accepted), default=0):
                shelf.put(shelf.load(newest), newest)
        self._publish_manifest()

    def _put_first(self, plan: StagePlan) -> None:
        """Put the state on the shelf that a stage begins with; alignment needs it to its end."""
        settings, shelf = self.settings, self._shelf
        if plan.stage == "alignment" and self._policy is not None:
            shelf.put(*self._policy, keep=False)
        else:
            first = initial_state(
                plan.stage, find_method(settings.method), settings.modules, settings.seed
            )
            begins = [r.stage for r in self.record.rounds].count  # rounds of the stages before
            earlier = settings.stages[: settings.stages.index(plan)]
            number = sum(begins(other.stage) for other in earlier)
            shelf.put(plan.layout.pack(first), number, keep=number == 0)
        if plan.stage == "alignment":
            self._reference = shelf.newest
            for ref in (self._reward, self._reference):
                if ref is not None:
                    shelf.pin(ref)

    def _remove_old_updates(self) -> None:
        """Leave in the spool only what an earlier process took in the round that comes next."""
        done = len(self.record.rounds)
        begun = self.record.before or done
        for path in self._folder.spool_path.glob("*"):
            if not begun or path.name != str(done + 1):
                shutil.rmtree(path, ignore_errors=True)

    def _gather(self) -> None:
        settings = self.settings

        def complete() -> bool:
            return len(self._registry.online) >= settings.clients

        while not self._pump(complete, settings.gather_seconds):
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

    def _before(self) -> None:
        reports = self._evaluate(len(self.record.rounds), {})
        stage = self._plan.stage
        self.record.before += [client_before(stage, r) for _, r in sorted(reports.items())]
        self._write_record()
        figures = global_figures(self._registry.devices, reports)
        self._notify("before", stage=stage, **figures.model_dump())

    def _do_round(self, number: int) -> None:
        began = self._clock()
        intake = self._train(number)
        vector, layout = self._shelf.vector, self._plan.layout
        if intake.round.accepted and vector is not None:
            average = find_method(self.settings.method).average
            aggregate = AGGREGATIONS[average if self._plan.stage != "reward" else "tensors"]
            self._shelf.put(aggregate(vector, intake.accepted_updates(), layout), number)
            self._publish_manifest()
        outcomes: dict[str, Outcome] = {i: intake.round.status(i) for i in intake.round.cohort}
        reports = self._evaluate(number, outcomes)
        why, figures = self._verdict(reports)
        if why:
            # Devices now lose what they learned: broken off from here, the round is done again.
            intake.clear()
            reports = self._take_back(number, vector)
        self._list_clients()
        record = round_record(
            self.record.clients,
            intake,
            reports,
            stage=self._plan.stage,
            before=self.record.rounds[-1] if self.record.rounds else None,
            observed=Observed(
                wall_seconds=self._clock() - began,
                retransmitted_bytes=intake.retransmitted_bytes,
                peak_memory_bytes=self._peak_memory,
                refused=dict(self._refused + intake.refused),
            ),
        )
        if why:
            record.taken_back, record.dropped = why, figures
        self._refused.clear()
        self.record.rounds.append(record)
        self._write_record()
        intake.clear()
        self._notify_round(record)

    def _verdict(self, reports: dict[str, Report]) -> tuple[str, GlobalRound]:
        """Return why a round of alignment must be taken back, if it must, and its figures."""
        figures = global_figures(self._registry.devices, reports)
        if self._plan.stage != "alignment":
            return "", figures
        return collapse(self._plan, reward_change(self.record, reports), figures), figures

    def _take_back(self, number: int, vector: Vector | None) -> dict[str, Report]:
        """Make what was there before a round come of it, everywhere; return what is measured."""
        if vector is not None:
            self._shelf.put(vector, number)
            self._publish_manifest()
        return self._evaluate(number, {}, work="restore")

    def _train(self, number: int) -> Intake:
        settings = self.settings
        cohort = self._cohort()
        intake = self._intake = Intake(
            number,
            {i: self._client(i) for i in cohort},
            IntakeRules(
                run=settings.run,
                binding=settings.binding,
                layout=self._plan.layout,
                codec=settings.codec,
                limits=settings.limits,
                virtual_time=settings.virtual_time,
                round_rules=settings.rules,
            ),
            Spool(self._folder.spool_path / str(number)),
            began=self._clock(),
            send=self._send,
            notify=self._notify,
        )
        last = self.record.rounds[-1].clients if self.record.rounds else []
        outcomes: dict[str, Outcome] = {c.id: c.status for c in last}
        intake.restore()
        missing = [i for i in cohort if i not in intake.contributions]
        self._assign("train", number, missing, outcomes)
        if settings.virtual_time:
            if not self._outlast(lambda: intake.answered, lambda: len(intake.silent())):
                raise self._silence(intake.silent(), f"no update of round {number}")
            intake.settle()
            if settings.refuses_hopeless_deadline:
                self._check_deadline(intake)
        else:
            while intake.round.closed_at is None:
                self._pump(lambda: intake.round.closed_at is not None, _TICK_SECONDS)
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
        layout = own_layout(self._plan.layout, device.lora_count)
        return Client(examples=self._weight(device), layout=layout)

    def _weight(self, device: DeviceRecord) -> int:
        """Return by how much a device's update counts."""
        return device.preference_pairs if self._plan.stage == "reward" else device.examples

    def _cohort(self) -> list[str]:
        while not self._registry.online:
            log.info("waiting for devices: none is there")
            self._pump(lambda: bool(self._registry.online), self.settings.gather_seconds)
        known, rounds = self._registry.devices, self.record.rounds
        devices = {i: device for i, device in known.items() if self._weight(device)}
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
        outcomes: dict[str, Outcome],
        work: Literal["evaluate", "restore"] = "evaluate",
    ) -> dict[str, Report]:
        settings = self.settings
        self._reports.clear()
        asked = self._asked()
        self._assign(work, number, asked, outcomes)

        def waited_for(client: str) -> bool:
            return settings.virtual_time or self._registry.is_online(client)

        def complete() -> bool:
            return all(i in self._reports or not waited_for(i) for i in asked)

        if not settings.virtual_time:
            self._pump(complete, settings.patience_seconds)
        elif not self._outlast(complete, lambda: len(self._reports)):
            raise self._silence(sorted(set(asked) - set(self._reports)), "no held-out results")
        self._tasks.clear()
        return dict(self._reports)

    def _outlast(self, done: Callable[[], bool], progress: Callable[[], int]) -> bool:
        """Take what arrives until ``done`` holds; give up once nothing changes for too long."""
        seen = progress()
        while not self._pump(done, self.settings.patience_seconds):
            if progress() == seen:
                return False
            seen = progress()
        return True

    def _silence(self, silent: list[str], what: str) -> RunFailedError:
        return RunFailedError(
            f"emulated client '{silent[0]}' ({len(silent)} in all) gave {what} within "
            f"{self.settings.patience_seconds:g} s; see the workers' logs in {self._folder.path}"
        )

    def _assign(
        self, work: Work, number: int, clients: Iterable[str], outcomes: dict[str, Outcome]
    ) -> None:
        settings, plan = self.settings, self._plan
        patience = settings.rules.deadline_seconds if settings.waits_for_channel else 0.0
        aligns = plan.stage == "alignment"
        self._tasks = {
            client: Task(
                run=settings.run,
                client=client,
                work=work,
                stage=plan.stage,
                round=number,
                state=self._shelf.newest,
                reward=self._reward if aligns else None,
                reference=self._reference if aligns else None,
                outcome=outcomes.get(client, "none"),
                seed=settings.seed,
                local_steps=plan.local_steps,
                batch_size=plan.batch_size,
                learning_rate=plan.learning_rate,
                codec=settings.codec,
                upload_within_seconds=patience,
                max_length=settings.max_length,
                margin=plan.margin,
                alignment=plan.alignment,
            )
            for client in clients
        }
        self._notify("task", work=work, stage=plan.stage, round=number, clients=sorted(self._tasks))
        for client, task in self._tasks.items():
            self._send(client, task)

    def _dismiss(self, reason: str) -> None:
        """Tell every device that the run is over, and keep saying so until they have left."""
        self._finished = True
        self._publish_manifest()
        for client in sorted(self._registry.devices):
            self._send_stop(client, reason)
        if self.settings.virtual_time:
            self._pump(lambda: not self._registry.online, self.settings.gather_seconds)
            # a later run of the same name on the same broker must not find this one's end
            self._transport.publish(topics.manifest(self.settings.run), b"", retain=True)

    def _send_stop(self, client: str, reason: str) -> None:
        task = Task(
            run=self.settings.run,
            client=client,
            work="stop",
            stage=self._plan.stage,
            round=len(self.record.rounds),
            state=None,
            seed=self.settings.seed,
            reason=reason,
        )
        self._send(client, task)

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

    # -- messages --------------------------------------------------------------------------------

    def _pump(self, done: Callable[[], bool], limit_seconds: float) -> bool:
        """Take what arrives until ``done`` holds; return whether it does at the limit."""
        deadline = self._clock() + limit_seconds
        next_tick = self._clock()
        while not done():
            now = self._clock()
            if now >= deadline:
                return False
            if now >= next_tick:
                self._tick(now)
                next_tick = now + _TICK_SECONDS
            try:
                event = self._inbox.get(timeout=max(0.0, min(next_tick, deadline) - now))
            except queue.Empty:
                continue
            if self._failure is not None:
                raise self._failure
            if self._stop.is_set():
                raise _StoppedError
            if event is not None:
                self._received(*event)
        return True

    def _tick(self, now: float) -> None:
        self._peak_memory = max(self._peak_memory, self._memory())
        if self._intake is not None:
            self._intake.expire(now)

    def _received(self, topic: str, payload: bytes) -> None:
        if not topic:  # connected, perhaps again
            self._publish_manifest()
            return
        if not payload:  # a retained message was taken back
            return
        client = topics.client_of(topic)
        try:
            if payload[:1] != b"{":
                self._take_data(client, payload)
            else:
                self._take(client, decode(payload))
        except ProtocolError as err:
            self._refused[err.code] += 1
            log.info("refused from '%s' (%s): %s", client, err.code, err.reason)
            self._notify("refused", client=client, code=err.code, reason=err.reason)

    def _take_data(self, client: str, payload: bytes) -> None:
        if self._intake is None:
            raise ProtocolError("grant", "chunk while no round is open")
        self._intake.data(client, parse_chunk(self.settings.run, payload), self._clock())

    def _take(self, client: str, message: Message) -> None:
        if message.run != self.settings.run or getattr(message, "client", None) != client:
            raise ProtocolError("identity", "a message of another run or in another client's name")
        if isinstance(message, Hello):
            self._greeted(message)
            return
        if not isinstance(message, Offer | Want | Report):
            raise ProtocolError("schema", f"{message.kind} is not for the aggregator")
        self._registry.check_session(client, message.session)
        if isinstance(message, Want):
            down = topics.down(self.settings.run, client)
            self._shelf.answer(message, lambda packet: self._transport.publish(down, packet))
        elif isinstance(message, Offer):
            self._offered(message)
        else:
            self._reported(message)

    def _greeted(self, hello: Hello) -> None:
        try:
            there = self._registry.greeted(hello)
        except ProtocolError as err:
            self._send(
                hello.client,
                Reject(
                    run=hello.run,
                    client=hello.client,
                    blob=None,
                    code=err.code,
                    reason=err.reason[:400],
                ),
            )
            raise
        device = self._registry.devices.get(hello.client)
        self._notify(
            "hello",
            client=hello.client,
            online=hello.online,
            profile=device.profile if device else "",
            lora_count=device.lora_count if device else 0,
        )
        if there and self._finished:
            self._send_stop(hello.client, self.record.stop_reason or "")
        elif there and hello.client in self._tasks:
            self._send(hello.client, self._tasks[hello.client])

    def _offered(self, offer: Offer) -> None:
        if self._intake is None:
            raise ProtocolError("round", f"no update of '{offer.client}' is asked for now")
        self._intake.offered(offer, self._clock())

    def _reported(self, report: Report) -> None:
        task = self._tasks.get(report.client)
        said = report.phase, report.stage, report.round
        if task is None or (task.work, task.stage, task.round) != said:
            return  # said twice, or of a phase that is over
        if report.phase == "train" and self._intake is not None:
            self._intake.reported(report, self._clock())
            return
        self._reports[report.client] = report
        self._notify(
            "report",
            client=report.client,
            round=report.round,
            eval_loss=report.eval_loss,
            eval_accuracy=report.eval_accuracy,
            pairs={k: v.accuracy for k, v in report.pairs.items()},
            scores=dict(report.responses.scores) if report.responses else {},
        )

    def _send(self, client: str, message: Message) -> None:
        self._transport.publish(topics.down(self.settings.run, client), encode(message))

    def _publish_manifest(self) -> None:
        settings = self.settings
        manifest = Manifest(
            run=settings.run,
            session=self._session,
            method=settings.method,
            stage=self._plan.stage,
            state=self._shelf.newest,
            binding=settings.binding,
            layout=self._layouts,
            finished=self._finished,
        )
        self._transport.publish(topics.manifest(settings.run), encode(manifest), retain=True)
