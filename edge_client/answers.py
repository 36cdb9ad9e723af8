"""What a device sends up of its work: a report, or an update that is offered, granted and sent.

An update is owed until the aggregator says DONE: it stays in memory, and in the outbox on the disk
where the device has one. A large one is put into a store first, where there is one. Times are
seconds on the caller's monotonic clock, sizes bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

from edge_client.line import Line
from edge_client.local_client import Performer, Result
from edge_client.outbox import Outbox
from messaging.chunks import chunk_count, fitting_chunk_bytes, make_chunk
from messaging.claims import Claims
from messaging.protocol import Grant, Have, Offer, Report, Task
from messaging.transfer import Upload


class Answers:
    """What one device says of the task at hand.

    Args:
        local: The device and what its run has in common.
        line: To the aggregator.
        binding: Hash of the device's own base, tokenizer and placement.
        largest_packet: Returns the bytes of the largest packet that the broker takes, if it said.
        claims: Where large updates are put.
        outbox: Keeps the update that is owed on disk.
    """

    def __init__(
        self,
        local: Performer,
        line: Line,
        *,
        binding: str,
        largest_packet: Callable[[], int | None],
        claims: Claims | None,
        outbox: Outbox | None,
    ) -> None:
        self._local = local
        self._line = line
        self._binding = binding
        self._largest_packet = largest_packet
        self._claims, self._outbox = claims, outbox
        self._upload: Upload | None = None

    # -- on the thread of the work ---------------------------------------------------------------

    def keep(self, task: Task, result: Result) -> Result:
        """Keep what is owed of a task on disk, and return it as it is offered.

        Raises:
            DiskError: If the disk does not take it.
        """
        if self._outbox is not None:
            self._outbox.put(task, result)
        return self.put_if_large(result)

    def put_if_large(self, result: Result) -> Result:
        """Put a large update where the aggregator can fetch it."""
        blob = result.blob
        if self._claims is None or blob is None:
            return result
        url = self._claims.put_if_large(blob, hashlib.sha256(blob).hexdigest())
        return replace(result, url=url)

    # -- what is owed ----------------------------------------------------------------------------

    def kept(self, task: Task) -> Result | None:
        """Return what came of a task before the device was started again, or none."""
        return None if self._outbox is None else self._outbox.of(task)

    def is_large(self, result: Result) -> bool:
        """Return whether an update is to lie in a store before it is offered."""
        claims, blob = self._claims, result.blob
        return claims is not None and blob is not None and len(blob) > claims.above_bytes

    def settle(self) -> None:
        """Forget the update on disk: nobody is owed it."""
        if self._outbox is not None:
            self._outbox.clear()

    # -- the upload ------------------------------------------------------------------------------

    def concerns(self, blob: str | None) -> bool:
        """Return whether a word about an update is about the one that is on its way."""
        return self._upload is not None and blob == self._upload.offer.blob

    def drop(self) -> None:
        """End the upload that is on its way, if there is one."""
        self._upload = None

    def connected(self) -> None:
        """Have the upload offered anew, if this broker takes less than the last."""
        if self._upload is not None:
            chunk_bytes = self._upload.offer.chunk_bytes
            if self._fitting(chunk_bytes) < chunk_bytes:
                self._upload = None

    def say(self, task: Task, result: Result, now: float) -> None:
        """Say what came of a task; called again, say it again."""
        if task.work == "stop":
            return
        if self._upload is not None:
            self._upload.offered_again()
            self._line.say(self._upload.offer)
        elif result.blob is not None:
            offer = self._offer(task, result, result.blob)
            self._upload = Upload(result.blob, offer, now)
            self._line.say(offer)
        else:
            self._line.say(self._report(task, task.work, result))

    def heard(self, word: Grant | Have, now: float) -> None:
        """Send the chunks that the aggregator takes now.

        Raises:
            ProtocolError: If it names a chunk that the update does not have.
        """
        upload = self._upload
        if upload is None:
            return
        if isinstance(word, Grant):
            indices = upload.granted(word, now)
        else:
            indices = upload.acknowledged(word, now)
        run, offer = self._local.setup.run, upload.offer
        for index in indices:
            packet = make_chunk(run, offer.blob, upload.blob, index, offer.chunk_bytes)
            self._line.send_chunk(offer.blob, packet)

    def tick(self, now: float) -> None:
        """Offer again what was perhaps not heard."""
        if self._upload is not None and self._upload.must_offer_again(now):
            self._line.say(self._upload.offer)

    def _fitting(self, chunk_bytes: int) -> int:
        return fitting_chunk_bytes(chunk_bytes, self._largest_packet())

    # -- what it says ----------------------------------------------------------------------------

    def _offer(self, task: Task, result: Result, blob: bytes) -> Offer:
        setup, device = self._local.setup, self._local.device
        chunk_bytes = self._fitting(setup.chunk_bytes)
        return Offer(
            run=setup.run,
            client=device.id,
            session=self._line.session,
            round=task.round,
            blob=hashlib.sha256(blob).hexdigest(),
            bytes=len(blob),
            chunk_bytes=chunk_bytes,
            chunks=chunk_count(len(blob), chunk_bytes),
            binding=self._binding,
            layout=setup.own_layout(task.stage, device.lora_count).sha256,
            codec=task.codec,
            costs=result.costs,
            url=result.url,
            spent=result.spent,
        )

    def _report(
        self, task: Task, phase: Literal["train", "evaluate", "restore"], result: Result
    ) -> Report:
        return Report(
            run=self._local.setup.run,
            client=self._local.device.id,
            session=self._line.session,
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
