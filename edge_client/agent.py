"""The agent: a device's side of the protocol, from HELLO to the stop.

No input or output of its own and no thread: messages, the clock and finished work come in, messages
to publish and work to do go out through two callables. The work itself is ``local_client``'s.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable

from edge_client.answers import Answers
from edge_client.arrivals import Arrivals
from edge_client.downloads import Downloads
from edge_client.joining import why_not
from edge_client.ledger import Ledger
from edge_client.line import Line, Publish
from edge_client.local_client import Performer, Result
from edge_client.outbox import Outbox, task_key
from edge_client.presence import Presence
from edge_client.stage_work import GlobalStates
from messaging import chunks
from messaging.claims import Claims
from messaging.errors import OtherVersionError, ProtocolError
from messaging.protocol import (
    Done,
    Grant,
    Have,
    Manifest,
    Message,
    Reject,
    StateRef,
    Task,
    decode,
)
from messaging.security import DeviceSeal

log = logging.getLogger(__name__)

# the same device will be refused again
FATAL_REJECTS = frozenset({"base", "layout", "private", "version"})


class Agent:
    """One device in one run.

    Args:
        local: Does the work.
        binding: Hash of the device's own base, tokenizer and placement.
        publish: Sends a payload to a topic (topic, payload, retain).
        start_work: Runs a function elsewhere; its result comes back through ``worked``.
        seal: Seals what is said and opens what is heard; without it, messages are plain.
        ledger: The device's starts, and the newest aggregator that it has heard, on its disk.
        outbox: Keeps the update that is owed on disk; without it, a device that is started again
            trains the round again.
        heartbeat_seconds: Between two ALIVE; none says nothing in between.
        largest_packet: Returns the bytes of the largest packet that the broker takes, if it said.
        claims: Where large updates are put and large global states lie; without it, both travel in
            chunks.
        start_fetch: Fetches a global state elsewhere; it comes back through ``fetched``.
        spread: Told over how many seconds devices return after a break.
        arrivals: What agents of one process wait for and hold in common; by default nothing.
        keeps_results: Whether an update stays in memory until another task comes, for an aggregator
            that loses it after all; otherwise it would be done again, to the same bits.

    Attributes:
        refused: Messages and chunks that were refused, by code.
    """

    def __init__(
        self,
        local: Performer,
        *,
        binding: str,
        publish: Publish,
        start_work: Callable[[Callable[[], Result]], None],
        seal: DeviceSeal | None = None,
        ledger: Ledger | None = None,
        outbox: Outbox | None = None,
        heartbeat_seconds: float | None = None,
        spread: Callable[[float], None] | None = None,
        largest_packet: Callable[[], int | None] = lambda: None,
        claims: Claims | None = None,
        start_fetch: Callable[[StateRef], None] | None = None,
        arrivals: Arrivals | None = None,
        keeps_results: bool = True,
    ) -> None:
        self.local = local
        self.id = local.device.id
        self.run = local.setup.run
        self.finished = False
        self.failure: str | None = None
        self.refused: Counter[str] = Counter()
        self._binding = binding
        self._start_work = start_work
        self._line = line = Line(local, binding=binding, publish=publish, seal=seal, ledger=ledger)
        self.session = line.session
        self._presence = Presence(self.id, line, heartbeat_seconds, spread)
        self._answers = Answers(
            local,
            line,
            binding=binding,
            largest_packet=largest_packet,
            claims=claims,
            outbox=outbox,
        )
        self._downloads = Downloads(
            local.setup,
            Arrivals() if arrivals is None else arrivals,
            ask=line.want,
            start_fetch=None if claims is None else start_fetch,
            ready=self._begin,
            fail=self._fail,
        )
        self._taken_back: tuple[int, ...] = ()
        self._task: Task | None = None
        self._working = False
        self._keeps_results = keeps_results
        self._result: Result | None = None  # kept until another task comes: it may be asked again
        self._arrived = False  # what came of the task is with the aggregator, and not kept here

    @property
    def filters(self) -> list[str]:
        """What the device subscribes to."""
        return self._line.filters

    def hello(self, *, online: bool = True, will: bool = False) -> bytes:
        """Return the retained message that says that the device is there, or that it left.

        A ``will`` is what the broker says for a device that vanishes.
        """
        return self._line.hello(online=online, will=will)

    def connected(self, now: float) -> None:
        """Say that the device is there; called on every connection.

        A sealed HELLO is for an aggregator that is known: the first one waits for its manifest.
        """
        self._answers.connected()
        if not self.finished and (not self._line.is_sealed or self._presence.knows_aggregator):
            self._presence.greet(now)

    def received(self, payload: bytes, now: float, *, topic: str = "") -> None:
        """Take one message or chunk; whatever is malformed or not sealed is logged and left.

        Raises:
            DiskError: If the disk does not take what must be remembered of it.
        """
        if self.finished:
            return
        if not payload:
            return  # a retained message was cleared
        try:
            if payload.startswith(chunks.MAGIC):
                self._downloads.chunk(payload, now)
            else:
                self._take(decode(self._line.opened(payload, topic)), now)
        except ProtocolError as err:
            self.refused[err.code] += 1
            log.warning("%s: refused a message (%s): %s", self.id, err.code, err.reason)
            if isinstance(err, OtherVersionError):
                self._fail(err.reason)  # no other message of that aggregator will be understood

    def _take(self, message: Message, now: float) -> None:
        if message.run != self.run or getattr(message, "client", self.id) != self.id:
            raise ProtocolError("run", "message of another run or for another client")
        if isinstance(message, Task):
            self._tasked(message, now)
        elif isinstance(message, Manifest):
            self._check_manifest(message, now)
        elif isinstance(message, Reject):
            self._rejected(message)
        elif not self._answers.concerns(getattr(message, "blob", None)):
            return  # a late word about an upload that is over
        elif isinstance(message, Grant | Have):
            self._answers.heard(message, now)
        elif isinstance(message, Done):
            self._answers.drop()
            self._answers.settle()
            if not self._keeps_results:
                self._result, self._arrived = None, True
            if message.status == "late":
                log.info("%s: update came late and is left out", self.id)

    def _check_manifest(self, manifest: Manifest, now: float) -> None:
        reason = why_not(manifest, self.local.setup, self._binding)
        if reason is not None:
            self._fail(reason)
        elif manifest.finished:  # with a task at hand, this device was away when it was told
            log.info("%s: the run '%s' is over; a new run takes a new name", self.id, self.run)
            self._leave()
        else:
            self._taken_back = manifest.taken_back
            self._presence.met(manifest, now)

    def _fail(self, reason: str) -> None:
        self.failure = reason
        self._finish()

    def _finish(self) -> None:
        self.finished = True
        self._downloads.stop()

    def gave_up(self, reason: str) -> None:
        """Leave the run: what the device was asked for cannot be done, for this reason."""
        self._working = False
        self._fail(reason)

    def _leave(self) -> None:
        self._finish()
        self._answers.settle()

    def _rejected(self, reject: Reject) -> None:
        log.error("%s: refused by the aggregator (%s): %s", self.id, reject.code, reject.reason)
        if self._answers.concerns(reject.blob):
            self._result = None
            self._answers.drop()
            self._answers.settle()
        if reject.code in FATAL_REJECTS:
            self._fail(reject.reason)

    def _tasked(self, task: Task, now: float) -> None:
        if task.work == "stop":
            log.info("%s: the run is over: %s", self.id, task.reason)
            self._leave()
            return
        self._downloads.check(task)
        if self._task is not None and _same(self._task, task):
            if self._task != task:  # its states come in other pieces now
                self._task = task
                if not (self._working or self._arrived or self._result is not None):
                    self._begin(now)
            if self._arrived:  # and was lost there: done again, it comes to the same
                self._arrived = False
                self._begin(now)
            else:
                self._answer(now)  # what came of it was perhaps lost on the way
            return
        self._task = task
        self._result, self._arrived = None, False
        self._answers.drop()
        if self._working:
            return
        self._result = self._answers.kept(task)
        if self._result is not None:  # it was trained before the device was started again
            self._downloads.stop()
            self._answer_from_disk(self._result, now)
        else:
            self._answers.settle()
            self._begin(now)

    def _begin(self, now: float) -> None:
        """Start the task at hand once its states are here, unless another is under way."""
        task = self._task
        if task is None or self._working or not self._downloads.complete(task, now):
            return
        states, downloaded = self._downloads.take(task, self._taken_back)
        self._working = True
        self._start_work(lambda: self._perform(task, states, downloaded))

    def _perform(self, task: Task, states: GlobalStates, downloaded: int) -> Result:
        """Do the work, and keep what is owed of it; on the thread of the work."""
        return self._answers.keep(task, self.local.perform(task, states, downloaded))

    def _answer_from_disk(self, result: Result, now: float) -> None:
        """Answer with an update that was kept; a large one is first seen to lie in the store."""
        if not self._answers.is_large(result):
            self._answer(now)
            return
        self._result, self._working = None, True
        self._start_work(lambda: self._answers.put_if_large(result))

    def fetched(self, ref: StateRef, blob: bytes | None, now: float) -> None:
        """Take a global state from the store, for all that wait for it; without it, its chunks."""
        self._downloads.fetched(ref, blob, now)

    def worked(self, task: Task, result: Result, now: float) -> None:
        """Take the result of a finished task: upload its update, or report its figures."""
        self._working = False
        if self.finished:
            return
        if self._task is None or not _same(task, self._task):
            self._begin(now)  # another task came in the meantime
            return
        self._result = result
        self._answer(now)

    def _answer(self, now: float) -> None:
        """Say what came of the task at hand, if it is done; called again, say it again."""
        if self._task is not None and self._result is not None:
            self._answers.say(self._task, self._result, now)

    @property
    def task(self) -> Task | None:
        """The task at hand."""
        return self._task

    def tick(self, now: float) -> None:
        """Say again what was perhaps not heard; called about once a second."""
        if self.finished:
            return
        self._presence.tick(now)
        self._answers.tick(now)
        self._downloads.tick(now)


def _same(one: Task, other: Task) -> bool:
    return task_key(one) == task_key(other)
