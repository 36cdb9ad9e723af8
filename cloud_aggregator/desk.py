"""What devices say to the aggregator and what it answers: every message passes here.

A message is opened, checked against who sent it and in which session, and handed to whom it is
for: the registry, the shelf, the round's intake, or the results of the phase. What is refused is
counted. Where the run has keys, every message is sealed, both ways (``messaging.security``); chunks
are not, for their blob is named by its hash in a sealed OFFER or TASK.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping

from cloud_aggregator.course import Course
from cloud_aggregator.door import Bucket
from cloud_aggregator.fetches import Fetched, Fetches
from cloud_aggregator.intake import Intake
from cloud_aggregator.privacy import withheld
from cloud_aggregator.reconnects import Reconnects
from cloud_aggregator.registry import Registry
from cloud_aggregator.tasks import make_manifest, stop_task
from cloud_aggregator.time_spent import TimeSpent
from device_profiles import logs
from messaging import chunks, security, topics
from messaging.chunks import parse_chunk
from messaging.errors import OtherVersionError, ProtocolError
from messaging.protocol import (
    Alive,
    Hello,
    Message,
    Offer,
    Reject,
    Report,
    Task,
    Want,
    decode,
    encode,
)
from messaging.security import CloudSeal
from messaging.transport import Transport, largest_packet

log = logging.getLogger(__name__)

# Refusals told one by one; beyond, they are counted and told together, so that whoever floods
# fills neither the log nor the disk.
_TOLD_PER_SECOND, _TOLD_AT_ONCE = 10.0, 200.0
_DEVICES = 100_000


class Desk:
    """One run's conversation with its devices.

    Args:
        course: Where the run is.
        registry: Who takes part.
        transport: Publishes.
        session: Of this aggregator, 16 hexadecimal digits, new at each start.
        epoch: Its starts.
        notify: Told of what devices say (event, fields).
        clock: Monotonic seconds.
        seal: Seals what is said and opens what is heard; without it, messages are plain.
        most_devices: That may ever say HELLO; a stranger beyond is refused.

    Attributes:
        tasks: What devices are to do now, for those who ask again.
        reports: What they answered.
        intake: Of the round's updates.
        fetches: Fetches those that lie in a store, if the run has one.
        refused: What was refused since someone last looked, by code.
        time: Where it went, of devices and of this desk.
    """

    def __init__(
        self,
        course: Course,
        registry: Registry,
        transport: Transport,
        *,
        session: str,
        epoch: int,
        notify: Callable[..., None],
        clock: Callable[[], float],
        seal: CloudSeal | None = None,
        most_devices: int = _DEVICES,
    ) -> None:
        self.tasks: dict[str, Task] = {}
        self.reports: dict[str, Report] = {}
        self.intake: Intake | None = None
        self.fetches: Fetches | None = None
        self.refused: Counter[str] = Counter()
        self.time = TimeSpent(clock)
        self._course = course
        self._run = course.settings.run
        self._private = course.settings.counting.privacy is not None
        self._registry = registry
        self._transport = transport
        self._session = session
        self._epoch = epoch
        self._notify = notify
        self._clock = clock
        self._finished: str | None = None
        self._seal = seal
        self._most_devices = most_devices
        self._telling = Bucket(_TOLD_PER_SECOND, _TOLD_AT_ONCE, clock())
        self._untold: Counter[str] = Counter()
        self._must_repeat = False
        self._reconnects = Reconnects(len(registry.devices))

    # -- down ------------------------------------------------------------------------------------

    def send(self, client: str, message: Message) -> None:
        """Send a message to a device; one that has not greeted yet hears it when it does."""
        packet = encode(message)
        if self._seal is not None:
            try:
                packet = self._seal.seal(client, packet)
            except ProtocolError as err:
                log.debug("nothing sent to '%s' (%s): %s", client, err.code, err.reason)
                return
        self._transport.publish(topics.down(self._run, client), packet)

    def assign(self, tasks: Mapping[str, Task]) -> None:
        """Make these what devices are to do now, and tell them."""
        self.tasks = dict(tasks)
        for client, task in self.tasks.items():
            self.send(client, task)

    def assign_more(self, tasks: Mapping[str, Task]) -> None:
        """Give some devices something to do besides what the others are doing."""
        self.tasks |= tasks
        for client, task in tasks.items():
            self.send(client, task)

    def publish_manifest(self) -> None:
        """Tell everybody, those that come later too, what the newest state is."""
        manifest = make_manifest(
            self._course,
            session=self._session,
            epoch=self._epoch,
            finished=self._finished is not None,
            reconnect_seconds=self._reconnects.seconds,
        )
        packet = encode(manifest)
        if self._seal is not None:
            packet = self._seal.sign_manifest(packet)
        self._transport.publish(topics.manifest(self._run), packet, retain=True)

    def dismiss(self, reason: str) -> None:
        """Tell every device that the run is over, now and when it appears later."""
        self._finished = reason
        self.publish_manifest()
        for client in sorted(self._registry.devices):
            self.send(client, stop_task(self._course, client, reason))

    def clear_manifest(self) -> None:
        """Take the manifest back: a later run of this name must not find this one's end."""
        self._transport.publish(topics.manifest(self._run), b"", retain=True)

    # -- up --------------------------------------------------------------------------------------

    def received(self, topic: str, payload: bytes) -> None:
        """Take what arrived; whatever is wrong with it is counted and told."""
        with self.time.part("intake"):
            self._received(topic, payload)

    def _received(self, topic: str, payload: bytes) -> None:
        if not topic:  # connected, perhaps again
            self._registry.reconnected()
            self._fit()
            self.publish_manifest()
            return
        if not payload:  # a retained message was taken back
            return
        client = topics.client_of(topic)
        with logs.bound(client=client):
            try:
                if payload.startswith(chunks.MAGIC):
                    self._take_data(client, payload)
                else:
                    self._take(client, self._opened(client, payload))
            except ProtocolError as err:
                self._refuse(client, err)

    def _opened(self, client: str, packet: bytes) -> Message:
        if self._seal is None:
            if packet.startswith(security.MAGIC):
                raise ProtocolError("mac", "a sealed message, and this run has no keys")
            return decode(packet)
        message = decode(self._seal.open(client, packet))
        if security.is_will(packet) and not (isinstance(message, Hello) and not message.online):
            raise ProtocolError("mac", f"a last will that says {message.kind}")
        return message

    def _refuse(self, client: str, err: ProtocolError) -> None:
        self.refused[err.code] += 1
        # A device with its key, at another session: it has seen an older manifest than the newest.
        self._must_repeat |= err.code == "stale"
        if not self._telling.holds(1, self._clock()):
            self._untold[err.code] += 1
            return
        self._telling.take(1)
        log.info("refused from '%s' (%s): %s", client, err.code, err.reason)
        self._notify("refused", client=client, code=err.code, reason=err.reason)
        if isinstance(err, OtherVersionError):
            self._reject(client, err)

    def refused_at_door(self, client: str, code: str, number: int) -> None:
        """Count what was not let in."""
        self.refused[code] += number
        log.warning("refused from '%s' at the door (%s): %d", client, code, number)
        self._tell_together(client, code, number)

    def tell_refusals(self) -> None:
        """Tell together what was refused too fast to be told one by one; called now and then.

        Where devices speak to an earlier session, the manifest that names this one is said again:
        somebody may have put an older one in its place.
        """
        if self._must_repeat:
            self._must_repeat = False
            self.publish_manifest()
        untold, self._untold = self._untold, Counter()
        for code, number in sorted(untold.items()):
            log.warning("refused besides (%s): %d", code, number)
            self._tell_together("", code, number)

    def _tell_together(self, client: str, code: str, number: int) -> None:
        reason = f"{number} messages or chunks"
        self._notify("refused", client=client, code=code, reason=reason, count=number)

    def _reject(self, client: str, err: ProtocolError) -> None:
        """Tell a device why it cannot take part."""
        reject = Reject(
            run=self._run, client=client, blob=None, code=err.code, reason=err.reason[:400]
        )
        self.send(client, reject)

    def _fit(self) -> None:
        """Name states in pieces that this broker takes; a device at a task hears it once more."""
        if self._course.fit(largest_packet(self._transport)):
            current = self._course.shelf.current
            names = ("state", "reward", "reference")
            self.tasks = {
                client: task.model_copy(update={n: current(getattr(task, n)) for n in names})
                for client, task in self.tasks.items()
            }

    def fetched(self, fetched: Fetched) -> None:
        """Take what came of fetching an update from a store; a refusal is counted and told."""
        client = fetched.offer.client
        try:
            if self.intake is None:
                fetched.path.unlink(missing_ok=True)
            else:
                self.intake.fetched(fetched, self._clock())
        except ProtocolError as err:
            self._refuse(client, err)

    def _take_data(self, client: str, payload: bytes) -> None:
        if self.intake is None:
            raise ProtocolError("grant", "chunk while no round is open")
        self.intake.data(client, parse_chunk(self._run, payload), self._clock())
        self._heard(client)

    def _take(self, client: str, message: Message) -> None:
        if message.run != self._run or getattr(message, "client", None) != client:
            raise ProtocolError("identity", "a message of another run or in another client's name")
        if isinstance(message, Hello):
            self._greeted(message)
            return
        if not isinstance(message, Alive | Offer | Want | Report):
            raise ProtocolError("schema", f"{message.kind} is not for the aggregator")
        self._registry.check_session(client, message.session)
        self._heard(client)
        if isinstance(message, Want):
            down = topics.down(self._run, client)
            self._course.shelf.answer(
                message, lambda packet: self._transport.publish(down, packet), self._clock()
            )
        elif isinstance(message, Offer):
            self._offered(message)
        elif isinstance(message, Report):
            self._reported(message)

    def _heard(self, client: str) -> None:
        """Note that a device is there; one that was taken for gone is back without a HELLO."""
        if self._registry.heard(client):
            self._tell_of(client, online=True)

    def _tell_of(self, client: str, *, online: bool) -> None:
        device = self._registry.devices.get(client)
        self._notify(
            "hello",
            client=client,
            online=online,
            profile=device.profile if device else "",
            lora_count=device.lora_count if device else 0,
        )

    def _greeted(self, hello: Hello) -> None:
        if self._seal is not None and hello.online:
            self._seal.greeted(hello.client, hello.session, hello.epoch)
        try:
            self._check_room(hello)
            there = self._registry.greeted(hello)
        except ProtocolError as err:
            self._reject(hello.client, err)
            raise
        if there and self._reconnects.greeted(self._clock(), len(self._registry.devices)):
            self.publish_manifest()
        self._tell_of(hello.client, online=hello.online)
        if there and self._finished is not None:
            self.send(hello.client, stop_task(self._course, hello.client, self._finished))
        elif there and (task := self._owed(hello.client)) is not None:
            self.send(hello.client, task)

    def _owed(self, client: str) -> Task | None:
        """Return what a device that appears is still to do; who gave its update trains no more."""
        task = self.tasks.get(client)
        if task is None or self.intake is None or task.work != "train":
            return task
        return None if client in self.intake.contributions else task

    def _check_room(self, hello: Hello) -> None:
        devices = self._registry.devices
        if hello.client not in devices and len(devices) >= self._most_devices:
            raise ProtocolError(
                "room", f"{len(devices)} devices take part, and there is room for no other"
            )

    def _offered(self, offer: Offer) -> None:
        if self.intake is None:
            raise ProtocolError("round", f"no update of '{offer.client}' is asked for now")
        self.intake.offered(offer, self._clock())
        self.time.told(offer.client, "offer", {} if self._private else offer.spent)

    def _reported(self, report: Report) -> None:
        task = self.tasks.get(report.client)
        said = report.phase, report.stage, report.round
        if task is None or (task.work, task.stage, task.round) != said:
            return  # said twice, or of a phase that is over
        if self._private:
            report = withheld(report)
        self.time.told(report.client, report.phase, report.spent)
        if report.phase == "train" and self.intake is not None:
            self.intake.reported(report, self._clock())
            return
        self.reports[report.client] = report
        self._notify(
            "report",
            client=report.client,
            round=report.round,
            eval_loss=report.eval_loss,
            eval_accuracy=report.eval_accuracy,
            pairs={k: v.accuracy for k, v in report.pairs.items()},
            scores=dict(report.responses.scores) if report.responses else {},
        )
