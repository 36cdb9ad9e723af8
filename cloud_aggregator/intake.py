"""One training round's updates: offered, granted, spooled, verified, and told apart by arrival.

In deployment an update arrives when its last chunk is verified. In emulation it arrives at its
device's modelled time; the updates are taken first and let arrive in that order afterwards, so the
accepted set does not depend on how fast this machine is.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from cloud_aggregator.rounds import RoundRules, TrainingRound
from cloud_aggregator.spool import Spool
from messaging.chunks import Chunk
from messaging.codecs import BlobHeader, decode_blob, max_blob_bytes
from messaging.errors import ProtocolError
from messaging.layout import Layout, Vector
from messaging.protocol import Codec, Costs, Done, Message, Offer, Reject, Report
from messaging.transfer import UploadDesk, UploadLimits

# No weight of an adapter moves so far in a round; what does would soon overflow the global state.
_LARGEST_CHANGE = 1e6


@dataclass(frozen=True, kw_only=True)
class IntakeRules:
    """What an update of this run must be, and how many come at once."""

    run: str
    binding: str
    layout: Layout
    codec: Codec
    limits: UploadLimits
    virtual_time: bool
    round_rules: RoundRules


@dataclass(frozen=True, kw_only=True)
class Client:
    """What the aggregator knows of a client before its update: its examples and what it sends."""

    examples: int
    layout: Layout


@dataclass(frozen=True, kw_only=True)
class Contribution:
    """What a client gave in a round: its costs, and its update's offer and size if it has one."""

    costs: Costs
    train_loss: float | None
    offer: Offer | None = None
    parameters: int = 0


class Intake:
    """The updates of round ``number``.

    Args:
        clients: The cohort, as each client described itself.
        began: When the round began, on the caller's clock.
        send: Sends a message to a client.
        notify: Told of each update (event, fields).

    Attributes:
        refused: Updates that were refused once they were here whole, by code. What is refused
            before is raised.
    """

    def __init__(
        self,
        number: int,
        clients: dict[str, Client],
        rules: IntakeRules,
        spool: Spool,
        *,
        began: float,
        send: Callable[[str, Message], None],
        notify: Callable[..., None],
    ) -> None:
        self.number = number
        self.round = TrainingRound(clients, rules.round_rules)
        self.contributions: dict[str, Contribution] = {}
        self.reasons: dict[str, str] = {}
        self.refused: Counter[str] = Counter()
        self._clients = clients
        self._rules = rules
        self._spool = spool
        self._began = began
        self._now = began
        self._send = send
        self._notify = notify
        self._arrivals: dict[str, float] = {}
        self._desk = UploadDesk(
            run=rules.run,
            limits=rules.limits,
            open_partial=spool.open_partial,
            send=self._from_desk,
            complete=self._complete,
        )

    @property
    def retransmitted_bytes(self) -> int:
        """Bytes of chunks that came more than once."""
        return self._desk.duplicate_bytes

    @property
    def answered(self) -> bool:
        """Whether every client of the cohort has given its update or was refused."""
        return len(self._arrivals) + len(self.reasons) >= len(self.round.cohort)

    def silent(self) -> list[str]:
        """Return the clients of the cohort that gave nothing."""
        return sorted(set(self.round.cohort) - set(self._arrivals) - set(self.reasons))

    def offered(self, offer: Offer, now: float) -> None:
        """Answer an OFFER: grant it, say that it is done, or refuse it with a sentence.

        Raises:
            ProtocolError: If it was refused, or is of an earlier round.
            SpoolFullError: If the disk has no room for it.
        """
        self._now = now
        done = self.contributions.get(offer.client)
        if done is not None and done.offer is not None and done.offer.blob == offer.blob:
            self._send(offer.client, self._done(offer, late=self._is_late(offer.client)))
            return
        if offer.round < self.number:
            self._send(offer.client, self._done(offer, late=True))
            raise ProtocolError("late", f"update of round {offer.round}; this is {self.number}")
        try:
            self._check(offer)
            if self.round.closed_at is None:
                self._desk.offered(offer, now)
                return
            if not self._rules.virtual_time:
                self.round.arrived(offer.client, now - self._began)
            self._send(offer.client, self._done(offer, late=True))
        except ProtocolError as err:
            if offer.round == self.number and offer.client in self._clients:
                self._note_refusal(offer.client, err.code, err.reason)
            self._send(offer.client, self._reject(offer, err))
            raise

    def restore(self) -> None:
        """Take the updates of this round that were acknowledged before the run was broken off."""
        for offer, blob in self._spool.kept():
            try:
                self._check(offer)
                contribution = self._read(offer, blob)
            except ProtocolError:  # the run's settings have changed since
                continue
            self._arrive(offer.client, contribution, self._began)

    def _check(self, offer: Offer) -> None:
        rules = self._rules
        if offer.binding != rules.binding:
            raise ProtocolError("base", "the update is from another base, tokenizer or placement")
        if offer.round != self.number or offer.client not in self._clients:
            raise ProtocolError("round", f"no update of '{offer.client}' is asked for now")
        layout = self._clients[offer.client].layout
        if offer.layout != layout.sha256:
            raise ProtocolError("layout", "the update holds other tensors than this run shares")
        if offer.codec != rules.codec:
            raise ProtocolError("codec", f"codec '{offer.codec}'; the round's is '{rules.codec}'")
        most = max_blob_bytes(layout, rules.codec)
        if offer.bytes > most:
            raise ProtocolError("size", f"offer of {offer.bytes} bytes; at most {most} are taken")

    def data(self, client: str, chunk: Chunk, now: float) -> None:
        """Take one chunk.

        Raises:
            ProtocolError: If it was not granted or does not fit.
            SpoolFullError: If the disk has no room for it.
        """
        self._now = now
        self._desk.data(client, chunk, now)

    def expire(self, now: float) -> None:
        """Hand the grants of silent clients on."""
        self._desk.expire(now)

    def reported(self, report: Report, now: float) -> None:
        """Take a finished training that has nothing to upload; said twice, it counts once.

        Raises:
            ProtocolError: If the run shares something, or the client is not asked.
        """
        if report.client not in self._clients or self._rules.layout.specs:
            raise ProtocolError("round", "a report where an update is asked for")
        if report.client in self.contributions:
            return
        contribution = Contribution(costs=report.costs, train_loss=report.train_loss)
        self._arrive(report.client, contribution, now)

    def _complete(self, offer: Offer, blob: bytes) -> Done | Reject:
        try:
            contribution = self._read(offer, blob)
        except ProtocolError as err:
            return self._reject(offer, err)
        if self.round.closed_at is not None and offer.client in self.contributions:
            return self._done(offer, late=True)  # another one of its own has been counted
        self._spool.keep(offer)
        self._arrive(offer.client, contribution, self._now)
        return self._done(offer, late=self._is_late(offer.client))

    def _read(self, offer: Offer, blob: bytes) -> Contribution:
        header, vector = decode_blob(blob, self._clients[offer.client].layout)
        self._check_header(header, offer)
        largest = float(np.abs(vector).max(initial=0.0))
        if largest > _LARGEST_CHANGE:
            raise ProtocolError(
                "range",
                f"the update changes a weight by {largest:.3g}; {_LARGEST_CHANGE:g} is the most",
            )
        return Contribution(
            costs=offer.costs, train_loss=header.train_loss, offer=offer, parameters=vector.size
        )

    def _check_header(self, header: BlobHeader, offer: Offer) -> None:
        said = (header.run, header.round, header.sender, header.codec)
        if said != (self._rules.run, offer.round, offer.client, offer.codec):
            raise ProtocolError("identity", "the update says another origin than its offer")
        said_examples = self._clients[offer.client].examples
        if header.examples != said_examples or header.examples < 1:
            raise ProtocolError(
                "examples",
                f"the update weighs {header.examples} examples; "
                f"'{offer.client}' said that it has {said_examples}",
            )

    def _arrive(self, client: str, contribution: Contribution, now: float) -> None:
        costs = contribution.costs
        virtual = self._rules.virtual_time
        at = costs.compute_seconds + costs.uplink_seconds if virtual else now - self._began
        self.contributions[client] = contribution
        self.reasons.pop(client, None)
        self._arrivals[client] = at
        verdict = "taken" if virtual else self.round.arrived(client, at)
        self._notify(
            "update",
            client=client,
            round=self.number,
            verdict=verdict,
            train_loss=contribution.train_loss,
            bytes=contribution.offer.bytes if contribution.offer else 0,
        )

    def _from_desk(self, client: str, message: Message) -> None:
        """Send what the desk answers; it rejects only updates of this round that came whole."""
        if isinstance(message, Reject):
            self.refused[message.code] += 1
            self._notify("refused", client=client, code=message.code, reason=message.reason)
            self._note_refusal(client, message.code, message.reason)
        self._send(client, message)

    def _note_refusal(self, client: str, code: str, reason: str) -> None:
        """Wait no longer for a client, unless an update of its has been taken."""
        if client not in self.contributions:
            self.reasons[client] = f"{code}: {reason}"
            if not self._rules.virtual_time:
                self.round.refused(client, self._now - self._began)

    def _reject(self, offer: Offer, err: ProtocolError) -> Reject:
        return Reject(
            run=self._rules.run,
            client=offer.client,
            blob=offer.blob,
            code=err.code,
            reason=err.reason,
        )

    def _done(self, offer: Offer, *, late: bool) -> Done:
        return Done(
            run=self._rules.run,
            client=offer.client,
            blob=offer.blob,
            status="late" if late else "stored",
        )

    def _is_late(self, client: str) -> bool:
        return not self._rules.virtual_time and self.round.status(client) == "late"

    def waited(self, client: str) -> float:
        """Return how long a client waited between its own update and the end of the round."""
        if client not in self._arrivals or self.round.closed_at is None:
            return 0.0
        return max(0.0, self.round.closed_at - self._arrivals[client])

    @property
    def fastest(self) -> float | None:
        """When the first update arrived, or would have after the deadline; none before any did."""
        return min(self._arrivals.values(), default=None)

    def passed(self, now: float) -> None:
        """Note the time: past the deadline the round closes."""
        self.round.passed(now - self._began)

    def settle(self) -> None:
        """In emulation: let the updates arrive in the order of their devices' modelled time."""
        for client in self.reasons:
            self.round.refused(client, 0.0)
        for at, client in sorted((at, client) for client, at in self._arrivals.items()):
            if self.contributions[client].costs.lost:
                self.reasons[client] = "outage: lost on the air"
            else:
                self.round.arrived(client, at)
        self.round.passed(math.inf)

    def accepted_updates(self) -> Iterator[tuple[Vector, int]]:
        """Yield (update, examples) of the accepted clients in client order, one at a time."""
        for client in self.round.accepted:
            header, vector = self._spool.update(client, self._clients[client].layout)
            yield vector, header.examples

    def close(self) -> None:
        """Drop what is under way; what was acknowledged stays on disk."""
        for client in self.round.cohort:
            self._desk.forget(client)

    def clear(self) -> None:
        """Remove the round's updates."""
        self.close()
        self._spool.clear()
