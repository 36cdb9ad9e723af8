"""The agent: a device's side of the protocol, from HELLO to the stop.

No input or output of its own and no thread: messages, the clock and finished work come in, messages
to publish and work to do go out through two callables. The work itself is ``local_client``'s.
"""

from __future__ import annotations

import hashlib
import logging
import secrets
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

from device_profiles.seeds import stream
from edge_client.arrivals import Arrivals
from edge_client.downloads import Downloads
from edge_client.ledger import Ledger
from edge_client.local_client import Performer, Result
from edge_client.outbox import Outbox, task_key
from edge_client.stage_work import GlobalStates
from messaging import chunks, protocol, security, topics
from messaging.chunks import (
    chunk_count,
    fitting_chunk_bytes,
    make_chunk,
)
from messaging.claims import Claims
from messaging.errors import OtherVersionError, ProtocolError
from messaging.protocol import (
    Alive,
    Done,
    Grant,
    Have,
    Hello,
    Manifest,
    Message,
    Offer,
    Reject,
    Report,
    StateRef,
    Task,
    Want,
    decode,
    encode,
)
from messaging.security import DeviceSeal
from messaging.transfer import Upload

log = logging.getLogger(__name__)

# the same device will be refused again
FATAL_REJECTS = frozenset({"base", "layout", "private", "version"})

Publish = Callable[[str, bytes, bool], None]


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
        self.session = secrets.token_hex(8) if seal is None else seal.session
        self.finished = False
        self.failure: str | None = None
        self.refused: Counter[str] = Counter()
        self._binding = binding
        self._seen_aggregator = ""
        self._publish = publish
        self._start_work = start_work
        self._seal, self._ledger, self._outbox = seal, ledger, outbox
        self._heartbeat, self._spread = heartbeat_seconds, spread
        self._largest_packet = largest_packet
        self._claims = claims
        self._downloads = Downloads(
            local.setup,
            Arrivals() if arrivals is None else arrivals,
            ask=self._want,
            start_fetch=None if claims is None else start_fetch,
            ready=self._begin,
            fail=self._fail,
        )
        self._window = 0.0  # seconds over which devices return after a break
        self._greetings = 0
        self._greet_at: float | None = None
        self._alive_at: float | None = None
        self._taken_back: tuple[int, ...] = ()
        self._task: Task | None = None
        self._working = False
        self._keeps_results = keeps_results
        self._upload: Upload | None = None
        self._result: Result | None = None  # kept until another task comes: it may be asked again
        self._arrived = False  # what came of the task is with the aggregator, and not kept here

    @property
    def filters(self) -> list[str]:
        """What the device subscribes to."""
        return [topics.down(self.run, self.id), topics.manifest(self.run)]

    def hello(self, *, online: bool = True, will: bool = False) -> bytes:
        """Return the retained message that says that the device is there, or that it left.

        A ``will`` is what the broker says for a device that vanishes.
        """
        message = encode(
            Hello(
                run=self.run,
                client=self.id,
                session=self.session,
                epoch=0 if self._ledger is None else self._ledger.epoch,
                online=online,
                binding=self._binding,
                layout=self.local.setup.layouts_sha256,
                device=self.local.device if online else None,
            )
        )
        return message if self._seal is None else self._seal.seal(message, will=will)

    def connected(self, now: float) -> None:
        """Say that the device is there; called on every connection.

        A sealed HELLO is for an aggregator that is known: the first one waits for its manifest.
        """
        chunk_bytes = 0 if self._upload is None else self._upload.offer.chunk_bytes
        if self._fitting(chunk_bytes) < chunk_bytes:
            self._upload = None  # this broker takes less than the last: it is offered anew
        if not self.finished and (self._seal is None or self._seen_aggregator):
            self._greet(now)

    def _fitting(self, chunk_bytes: int) -> int:
        return fitting_chunk_bytes(chunk_bytes, self._largest_packet())

    def _greet(self, now: float) -> None:
        """Say HELLO, at once the first time; later somewhere in the window that all share."""
        self._greetings += 1
        wait = 0.0
        if self._greetings > 1:
            place = stream(0, "reconnect", self.id, self.session, self._greetings)
            wait = self._window * float(place.random())
        self._greet_at = now + wait
        self._greet_if_due(now)

    def _greet_if_due(self, now: float) -> None:
        if self._greet_at is not None and now >= self._greet_at:
            self._greet_at, self._alive_at = None, now
            self._publish(topics.state(self.run, self.id), self.hello(), True)

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
                self._take(decode(self._opened(payload, topic)), now)
        except ProtocolError as err:
            self.refused[err.code] += 1
            log.warning("%s: refused a message (%s): %s", self.id, err.code, err.reason)
            if isinstance(err, OtherVersionError):
                self._fail(err.reason)  # no other message of that aggregator will be understood

    def _opened(self, packet: bytes, topic: str) -> bytes:
        seal = self._seal
        if seal is None:
            if packet.startswith(security.MAGIC):
                raise ProtocolError("mac", "the run seals its messages; give this device its key")
            return packet
        if topic != topics.manifest(self.run):
            return seal.open(packet)
        message = seal.open_manifest(packet)
        if self._ledger is not None:
            self._ledger.heard(seal.highest)
        return message

    def _take(self, message: Message, now: float) -> None:
        if message.run != self.run or getattr(message, "client", self.id) != self.id:
            raise ProtocolError("run", "message of another run or for another client")
        upload = self._upload
        if isinstance(message, Task):
            self._tasked(message, now)
        elif isinstance(message, Manifest):
            self._check_manifest(message, now)
        elif isinstance(message, Reject):
            self._rejected(message)
        elif upload is None or getattr(message, "blob", None) != upload.offer.blob:
            return  # a late word about an upload that is over
        elif isinstance(message, Grant):
            self._send_chunks(upload, upload.granted(message, now))
        elif isinstance(message, Have):
            self._send_chunks(upload, upload.acknowledged(message, now))
        elif isinstance(message, Done):
            self._upload = None
            self._settle()
            if not self._keeps_results:
                self._result, self._arrived = None, True
            if message.status == "late":
                log.info("%s: update came late and is left out", self.id)

    def _check_manifest(self, manifest: Manifest, now: float) -> None:
        if manifest.oldest > protocol.SCHEMA:
            self._fail(
                f"the run's aggregator understands protocol {manifest.oldest} and newer, and this "
                f"device speaks {protocol.SCHEMA}; update pwff on this device"
            )
        elif manifest.binding != self._binding:
            self._fail(
                "the run is built on another base, tokenizer or LoRA placement than this device; "
                "give this device the run's model and placement"
            )
        elif manifest.method != self.local.setup.method:
            self._fail(
                f"the run's method is '{manifest.method}' and this device's is "
                f"'{self.local.setup.method}'; give this device the run's"
            )
        elif manifest.layout != self.local.setup.layouts_sha256:
            self._fail(
                "the run shares other tensors than this device; compare the method's settings and "
                "the stages"
            )
        elif manifest.finished:  # with a task at hand, this device was away when it was told
            log.info("%s: the run '%s' is over; a new run takes a new name", self.id, self.run)
            self._leave()
        else:
            self._taken_back = manifest.taken_back
            self._window = manifest.reconnect_seconds
            if self._spread is not None:
                self._spread(self._window)
            if manifest.session != self._seen_aggregator:
                self._seen_aggregator = manifest.session
                self._greet(now)

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
        self._settle()

    def _settle(self) -> None:
        """Forget the update on disk: nobody is owed it."""
        if self._outbox is not None:
            self._outbox.clear()

    def _rejected(self, reject: Reject) -> None:
        log.error("%s: refused by the aggregator (%s): %s", self.id, reject.code, reject.reason)
        if self._upload is not None and reject.blob == self._upload.offer.blob:
            self._upload = self._result = None
            self._settle()
        if reject.code in FATAL_REJECTS:
            self._fail(reject.reason)

    def _tasked(self, task: Task, now: float) -> None:
        if task.work == "stop":
            log.info("%s: the run is over: %s", self.id, task.reason)
            self._leave()
            return
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
        self._downloads.check(task)
        self._task = task
        self._result = self._upload = None
        self._arrived = False
        if self._working:
            return
        if self._outbox is not None:
            self._result = self._outbox.of(task)
        if self._result is not None:  # it was trained before the device was started again
            self._downloads.stop()
            self._answer_from_disk(self._result, now)
        else:
            self._settle()
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
        result = self.local.perform(task, states, downloaded)
        if self._outbox is not None:
            self._outbox.put(task, result)
        return self._put_if_large(result)

    def _put_if_large(self, result: Result) -> Result:
        """Put a large update where the aggregator can fetch it; on the thread of the work."""
        blob = result.blob
        if self._claims is None or blob is None:
            return result
        url = self._claims.put_if_large(blob, hashlib.sha256(blob).hexdigest())
        return replace(result, url=url)

    def _answer_from_disk(self, result: Result, now: float) -> None:
        """Answer with an update that was kept; a large one is first seen to lie in the store."""
        claims, blob = self._claims, result.blob
        if claims is None or blob is None or len(blob) <= claims.above_bytes:
            self._answer(now)
            return
        self._result, self._working = None, True
        self._start_work(lambda: self._put_if_large(result))

    def fetched(self, ref: StateRef, blob: bytes | None, now: float) -> None:
        """Take a global state from the store, for all that wait for it; without it, its chunks."""
        self._downloads.fetched(ref, blob, now)

    def _want(self, ref: StateRef, pieces: list[int]) -> None:
        bits = sum(1 << i for i in pieces).to_bytes((ref.chunks + 7) // 8, "little")
        self._send(
            Want(
                run=self.run,
                client=self.id,
                session=self.session,
                blob=ref.blob,
                missing=bits.hex(),
            )
        )

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
        task, result = self._task, self._result
        if task is None or result is None or task.work == "stop":
            return
        if self._upload is not None:
            self._upload.offered_again()
            self._send(self._upload.offer)
        elif result.blob is not None:
            self._offer(task, result, result.blob, now)
        else:
            self._send(self._report(task, task.work, result))

    def _report(
        self, task: Task, phase: Literal["train", "evaluate", "restore"], result: Result
    ) -> Report:
        return Report(
            run=self.run,
            client=self.id,
            session=self.session,
            stage=task.stage,
            round=task.round,
            phase=phase,
            examples=result.examples,
            train_loss=result.train_loss,
            eval_loss=result.eval_loss,
            eval_accuracy=result.eval_accuracy,
            pairs=result.pairs,
            responses=result.responses,
            others_loss=result.others_loss,
            others_accuracy=result.others_accuracy,
            kept_steps=result.kept_steps,
            costs=result.costs,
            spent=result.spent,
        )

    @property
    def task(self) -> Task | None:
        """The task at hand."""
        return self._task

    def _offer(self, task: Task, result: Result, blob: bytes, now: float) -> None:
        setup = self.local.setup
        chunk_bytes = self._fitting(setup.chunk_bytes)
        offer = Offer(
            run=self.run,
            client=self.id,
            session=self.session,
            round=task.round,
            blob=hashlib.sha256(blob).hexdigest(),
            bytes=len(blob),
            chunk_bytes=chunk_bytes,
            chunks=chunk_count(len(blob), chunk_bytes),
            binding=self._binding,
            layout=setup.own_layout(task.stage, self.local.device.lora_count).sha256,
            codec=task.codec,
            costs=result.costs,
            url=result.url,
            spent=result.spent,
        )
        self._upload = Upload(blob, offer, now)
        self._send(offer)

    def tick(self, now: float) -> None:
        """Say again what was perhaps not heard; called about once a second."""
        if self.finished:
            return
        self._greet_if_due(now)
        self._say_alive(now)
        if self._upload is not None and self._upload.must_offer_again(now):
            self._send(self._upload.offer)
        self._downloads.tick(now)

    def _say_alive(self, now: float) -> None:
        if self._heartbeat is None or self._alive_at is None:
            return
        if now - self._alive_at >= self._heartbeat:
            self._alive_at = now
            self._send(Alive(run=self.run, client=self.id, session=self.session))

    def _send(self, message: Message) -> None:
        payload = encode(message)
        if self._seal is not None:
            payload = self._seal.seal(payload)
        self._publish(topics.control(self.run, self.id), payload, False)

    def _send_chunks(self, upload: Upload, indices: list[int]) -> None:
        offer = upload.offer
        topic = topics.data(self.run, self.id, offer.blob)
        for index in indices:
            packet = make_chunk(self.run, offer.blob, upload.blob, index, offer.chunk_bytes)
            self._publish(topic, packet, False)


def _same(one: Task, other: Task) -> bool:
    return task_key(one) == task_key(other)
