"""What devices say to the aggregator and what it answers: every message passes here.

A message is opened, checked against who sent it and in which session, and handed to whom it is
for: the registry, the shelf, the round's intake, or the results of the phase. What is refused is
counted.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping

from cloud_aggregator.course import Course
from cloud_aggregator.intake import Intake
from cloud_aggregator.registry import Registry
from cloud_aggregator.tasks import make_manifest, stop_task
from cloud_aggregator.time_spent import TimeSpent
from messaging import topics
from messaging.chunks import parse_chunk
from messaging.errors import ProtocolError
from messaging.protocol import (
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
from messaging.transport import Transport

log = logging.getLogger(__name__)


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

    Attributes:
        tasks: What devices are to do now, for those who ask again.
        reports: What they answered.
        intake: Of the round's updates.
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
    ) -> None:
        self.tasks: dict[str, Task] = {}
        self.reports: dict[str, Report] = {}
        self.intake: Intake | None = None
        self.refused: Counter[str] = Counter()
        self.time = TimeSpent(clock)
        self._course = course
        self._run = course.settings.run
        self._registry = registry
        self._transport = transport
        self._session = session
        self._epoch = epoch
        self._notify = notify
        self._clock = clock
        self._finished: str | None = None

    # -- down ------------------------------------------------------------------------------------

    def send(self, client: str, message: Message) -> None:
        """Send a message to a device."""
        self._transport.publish(topics.down(self._run, client), encode(message))

    def assign(self, tasks: Mapping[str, Task]) -> None:
        """Make these what devices are to do now, and tell them."""
        self.tasks = dict(tasks)
        for client, task in self.tasks.items():
            self.send(client, task)

    def publish_manifest(self) -> None:
        """Tell everybody, those that come later too, what the newest state is."""
        manifest = make_manifest(
            self._course,
            session=self._session,
            epoch=self._epoch,
            finished=self._finished is not None,
        )
        self._transport.publish(topics.manifest(self._run), encode(manifest), retain=True)

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
            self.publish_manifest()
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
            self.refused[err.code] += 1
            log.info("refused from '%s' (%s): %s", client, err.code, err.reason)
            self._notify("refused", client=client, code=err.code, reason=err.reason)

    def _take_data(self, client: str, payload: bytes) -> None:
        if self.intake is None:
            raise ProtocolError("grant", "chunk while no round is open")
        self.intake.data(client, parse_chunk(self._run, payload), self._clock())

    def _take(self, client: str, message: Message) -> None:
        if message.run != self._run or getattr(message, "client", None) != client:
            raise ProtocolError("identity", "a message of another run or in another client's name")
        if isinstance(message, Hello):
            self._greeted(message)
            return
        if not isinstance(message, Offer | Want | Report):
            raise ProtocolError("schema", f"{message.kind} is not for the aggregator")
        self._registry.check_session(client, message.session)
        if isinstance(message, Want):
            down = topics.down(self._run, client)
            self._course.shelf.answer(message, lambda packet: self._transport.publish(down, packet))
        elif isinstance(message, Offer):
            self._offered(message)
        else:
            self._reported(message)

    def _greeted(self, hello: Hello) -> None:
        try:
            there = self._registry.greeted(hello)
        except ProtocolError as err:
            self.send(
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
        if there and self._finished is not None:
            self.send(hello.client, stop_task(self._course, hello.client, self._finished))
        elif there and hello.client in self.tasks:
            self.send(hello.client, self.tasks[hello.client])

    def _offered(self, offer: Offer) -> None:
        if self.intake is None:
            raise ProtocolError("round", f"no update of '{offer.client}' is asked for now")
        self.intake.offered(offer, self._clock())
        self.time.told(offer.client, "offer", offer.spent)

    def _reported(self, report: Report) -> None:
        task = self.tasks.get(report.client)
        said = report.phase, report.stage, report.round
        if task is None or (task.work, task.stage, task.round) != said:
            return  # said twice, or of a phase that is over
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
