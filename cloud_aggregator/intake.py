"""One training round's updates: offered, granted, spooled, verified, and told apart by arrival.

In deployment an update arrives when its last chunk is verified. In emulation it arrives at its
device's modelled time; the updates are taken first and let arrive in that order afterwards, so the
accepted set does not depend on how fast this machine is.

With a folder for stale updates (``aggregation = "fedbuff"``), a late update is taken nevertheless
and waits there for a round that folds it in; without one it is answered and left out.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from cloud_aggregator.aggregation.asynchronous import StaleUpdate
from cloud_aggregator.aggregation.robust import check_update
from cloud_aggregator.fetches import Fetched, Fetches
from cloud_aggregator.partials import ResumablePartial, adopt, held_pieces
from cloud_aggregator.presence import Moment
from cloud_aggregator.rounds import RoundRules, TrainingRound
from cloud_aggregator.spool import Spool
from cloud_aggregator.stale import Asked, ClosedRound, StaleUpdates
from messaging.chunks import Bytes, Chunk
from messaging.codecs import BlobHeader, decode_blob, max_blob_bytes
from messaging.errors import ProtocolError
from messaging.layout import Layout, Vector
from messaging.protocol import Codec, Costs, Done, Grant, Message, Offer, Reject, Report
from messaging.transfer import UploadDesk, UploadLimits

# No weight of an adapter moves so far in a round; what does would soon overflow the global state.
_LARGEST_CHANGE = 1e6


@dataclass(frozen=True, kw_only=True)
class IntakeRules:
    """What an update of this run must be, and how many come at once.

    ``max_norm`` is the Euclidean norm of an update above which it is refused; none takes any. In a
    ``private`` run no loss is taken, whatever an update says.
    """

    run: str
    binding: str
    layout: Layout
    codec: Codec
    limits: UploadLimits
    virtual_time: bool
    round_rules: RoundRules
    private: bool = False
    max_norm: float | None = None


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
        wanted: How many clients the quorum is a share of; by default the cohort.
        stale: Where late updates wait; without it they are left out.
        fetches: Fetches updates that lie in a store; without it they are asked for in chunks.
        moment: In emulation, who was there at the beginning, and for how long; none for everyone.

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
        wanted: int | None = None,
        stale: StaleUpdates | None = None,
        fetches: Fetches | None = None,
        moment: Moment | None = None,
    ) -> None:
        self.number = number
        self.moment = moment
        self.round = TrainingRound(clients, rules.round_rules, wanted=wanted)
        self.contributions: dict[str, Contribution] = {}
        self.reasons: dict[str, str] = {}
        self.refused: Counter[str] = Counter()
        self._clients = dict(clients)
        self._rules = rules
        self._spool = spool
        self._stale = stale
        self._fetches = fetches
        self._fetching: dict[str, str] = {}  # the blob that is being fetched for a client
        self._unfetchable: set[str] = set()  # blobs that their store did not give
        self._began = began
        self._now = began
        self._send = send
        self._notify = notify
        self._arrivals: dict[str, float] = {}
        self._partials: dict[str, ResumablePartial] = {}
        self._earlier: dict[str, str] = {}  # blobs on their way up that are for an earlier round
        self._desk = UploadDesk(
            run=rules.run,
            limits=rules.limits,
            open_partial=self._open_partial,
            send=self._from_desk,
            complete=self._complete,
            held=self._held,
        )
        if stale is not None:
            stale.begin(number)

    @property
    def retransmitted_bytes(self) -> int:
        """Bytes of chunks that came more than once."""
        return self._desk.duplicate_bytes

    def open_seconds(self, now: float) -> float:
        """Return for how long the round has been open."""
        return now - self._began

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
            self._offered_late(offer, now)
            return
        self.returned(offer.client, now)
        try:
            self._check(offer)
            if self.round.closed_at is None or self._waits_for_late(offer):
                self._take(offer, now)
                return
            if not self._rules.virtual_time:
                self.round.arrived(offer.client, now - self._began)
            self._send(offer.client, self._done(offer, late=True))
        except ProtocolError as err:
            if offer.round == self.number and offer.client in self._clients:
                self._note_refusal(offer.client, err.code, err.reason)
            self._send(offer.client, self._reject(offer, err))
            raise

    def _offered_late(self, offer: Offer, now: float) -> None:
        """Answer an OFFER for an earlier round: take it if it may still be folded in."""
        if not self._waits_for_late(offer):
            self._send(offer.client, self._done(offer, late=True))
            if self._stale is None or not self._stale.holds(offer.round, offer.client):
                raise ProtocolError("late", f"update of round {offer.round}; this is {self.number}")
            return
        try:
            self._check(offer)
            self._earlier[offer.client] = offer.blob
            self._take(offer, now)
        except ProtocolError as err:
            self._send(offer.client, self._reject(offer, err))
            raise

    def _take(self, offer: Offer, now: float) -> None:
        """Grant an offer its chunks, or fetch what lies in the store.

        Raises:
            ProtocolError: If it is said to lie anywhere else.
        """
        fetches = self._fetches
        if offer.url is None or fetches is None or offer.blob in self._unfetchable:
            self._desk.offered(offer, now)
            return
        fetches.store.check(offer.url, offer.blob)
        if offer.client not in self._fetching:  # one at a time, however often it offers
            self._fetching[offer.client] = offer.blob
            fetches.begin(offer, offer.url, self._spool.path(offer.client).with_suffix(".fetched"))

    def fetched(self, fetched: Fetched, now: float) -> None:
        """Take what came of a fetch: a whole update, or none, which is then asked for in chunks.

        Raises:
            ProtocolError: If it is refused.
            SpoolFullError: If the disk has no room for it.
        """
        offer, path = fetched.offer, fetched.path
        if self._fetching.get(offer.client) != offer.blob:
            path.unlink(missing_ok=True)  # of a round that is over
            return
        del self._fetching[offer.client]
        plain = offer.model_copy(update={"url": None})
        if fetched.fault is not None or self._fetches is None:
            path.unlink(missing_ok=True)
            self._unfetchable.add(offer.blob)
            code = fetched.fault or "url"
            self.refused[code] += 1
            self._notify(
                "refused", client=offer.client, code=code, reason="its store does not give it"
            )
            self.offered(plain, now)
            return
        self._desk.forget(offer.client)
        if self._stale is not None and self._goes_to_stale(offer):
            self._stale.adopt(path, offer)
        else:
            adopt(path, self._spool.partial_path(offer.client), offer)
        self.offered(plain, now)
        if self._has(offer):  # a hash that is no update of its sender may be of another's blob
            self._fetches.remove(offer.blob)

    def _has(self, offer: Offer) -> bool:
        """Return whether an offer's update has been taken."""
        given = self.contributions.get(offer.client)
        counts = given is not None and given.offer is not None and given.offer.blob == offer.blob
        stale = self._stale
        return counts or (stale is not None and stale.holds(offer.round, offer.client))

    def _waits_for_late(self, offer: Offer) -> bool:
        """Return whether a late update is still wanted: it was asked for, and is not here yet."""
        stale = self._stale
        if stale is None or self._rules.virtual_time:
            return False
        if stale.holds(offer.round, offer.client) or stale.counted(offer.round, offer.client):
            return False
        if offer.round == self.number:
            return self.round.status(offer.client) != "aggregated"
        young = self.number - offer.round <= stale.max_staleness
        return young and stale.asked(offer.round, offer.client) is not None

    def _client_of(self, offer: Offer) -> Client:
        """Return what is known of an offer's client in the round that it is for.

        Raises:
            ProtocolError: If that round did not ask it.
        """
        if offer.round == self.number:
            if offer.client in self._clients:
                return self._clients[offer.client]
        elif self._stale is not None and (asked := self._stale.asked(offer.round, offer.client)):
            layout = self._rules.layout.first(asked.tensors)
            return Client(examples=asked.examples, layout=layout)
        raise ProtocolError("round", f"no update of '{offer.client}' is asked for now")

    def _goes_to_stale(self, offer: Offer) -> bool:
        return offer.round < self.number or self.round.closed_at is not None

    def _open_partial(self, offer: Offer) -> ResumablePartial:
        if self._stale is not None and self._goes_to_stale(offer):
            partial = self._stale.open_partial(offer)
        else:
            partial = ResumablePartial(self._spool.partial_path(offer.client), offer)
        self._partials[offer.client] = partial
        return partial

    def _held(self, offer: Offer) -> set[int]:
        if self._stale is not None and self._goes_to_stale(offer):
            return self._stale.held_pieces(offer)
        return held_pieces(self._spool.partial_path(offer.client), offer)

    def restore(self) -> None:
        """Take the updates of this round that were acknowledged before the run was broken off."""
        kept = self._spool.kept()
        if self._stale is not None and self.round.closed_at is not None:
            kept = itertools.chain(kept, self._stale.kept(self.number))
        for offer, blob in kept:
            try:
                self._check(offer)
                contribution = self._read(offer, blob)
            except ProtocolError:  # the run's settings have changed since
                continue
            self._arrive(offer.client, contribution, self._began)
            if self._is_late(offer.client):
                self._keep_late(offer, blob)

    def _check(self, offer: Offer) -> None:
        rules = self._rules
        if offer.binding != rules.binding:
            raise ProtocolError("base", "the update is from another base, tokenizer or placement")
        layout = self._client_of(offer).layout
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
        self.returned(client, now)
        self._desk.data(client, chunk, now)

    def lost(self, client: str, now: float) -> None:
        """Note that a client vanished (its last will, or silence); in emulation nobody does."""
        if not self._rules.virtual_time:
            self.round.lost(client, now - self._began)

    def returned(self, client: str, now: float) -> None:
        """Note that a client is there, or there again."""
        if not self._rules.virtual_time:
            self.round.returned(client, now - self._began)

    def vacancies(self, now: float) -> list[str]:
        """Return the clients in whose place others should be invited now, in client order."""
        return [] if self._rules.virtual_time else self.round.vacancies(now - self._began)

    def invited(self, name: str, client: Client, now: float) -> str:
        """Ask another client in the place of the first that vanished; return which that is.

        Raises:
            ValueError: If nobody's place is free, or the client was asked already.
        """
        vacancies = self.vacancies(now)
        if not vacancies:
            raise ValueError(f"no place is free for '{name}' in round {self.number}")
        gone = vacancies[0]
        self.round.replaced(gone, name, now - self._began)
        self._clients[name] = client
        self.reasons[gone] = f"gone: it vanished, and '{name}' was asked in its place"
        self._notify("replaced", client=gone, round=self.number, by=name)
        return gone

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

    def _complete(self, offer: Offer, blob: Bytes) -> Done | Reject:
        try:
            contribution = self._read(offer, blob)
        except ProtocolError as err:
            return self._reject(offer, err)
        if not self._rules.virtual_time:
            self.passed(self._now)
        if self._stale is not None and self._waits_for_late(offer) and self._goes_to_stale(offer):
            self._keep_late(offer, blob)
            self._drop_partial(offer)
            if offer.round == self.number:
                self._arrive(offer.client, contribution, self._now)
            return self._done(offer, late=True)
        if offer.round != self.number or (
            self.round.closed_at is not None and offer.client in self.contributions
        ):
            self._drop_partial(offer)  # another one of its own has been counted
            return self._done(offer, late=True)
        self._spool.keep(offer)
        self._arrive(offer.client, contribution, self._now)
        return self._done(offer, late=self._is_late(offer.client))

    def _drop_partial(self, offer: Offer) -> None:
        if partial := self._partials.pop(offer.client, None):
            partial.discard()

    def _keep_late(self, offer: Offer, blob: Bytes, due_seconds: float = 0.0) -> None:
        if self._stale is None:
            return
        asked = _asked(self._client_of(offer))
        self._stale.keep(offer, blob, asked, due_seconds=due_seconds)
        if staleness := self.number - offer.round:  # of this round, it is told when it arrives
            self._notify("stale", client=offer.client, round=offer.round, staleness=staleness)

    def _read(self, offer: Offer, blob: Bytes) -> Contribution:
        header, vector = decode_blob(blob, self._client_of(offer).layout)
        self._check_header(header, offer)
        largest = float(max(vector.max(initial=0.0), -vector.min(initial=0.0)))
        if largest > _LARGEST_CHANGE:
            raise ProtocolError(
                "range",
                f"the update changes a weight by {largest:.3g}; {_LARGEST_CHANGE:g} is the most",
            )
        if self._rules.max_norm is not None:
            check_update(vector, self._rules.max_norm)
        return Contribution(
            costs=offer.costs,
            train_loss=None if self._rules.private else header.train_loss,
            offer=offer,
            parameters=vector.size,
        )

    def _check_header(self, header: BlobHeader, offer: Offer) -> None:
        said = (header.run, header.round, header.sender, header.codec)
        if said != (self._rules.run, offer.round, offer.client, offer.codec):
            raise ProtocolError("identity", "the update says another origin than its offer")
        said_examples = self._client_of(offer).examples
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
        """Send what the desk answers; it rejects only updates that came whole."""
        if isinstance(message, Reject):
            self.refused[message.code] += 1
            self._notify("refused", client=client, code=message.code, reason=message.reason)
            if self._earlier.get(client) != message.blob:
                self._note_refusal(client, message.code, message.reason)
        elif isinstance(message, Grant):
            self._notify("granted", client=client, round=self.number)
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
            elif at > (stays := self._stays(client)):
                self.reasons[client] = f"away: it left {stays:.0f} s after the round began"
            else:
                self.round.arrived(client, at)
        self.round.passed(math.inf)
        for client in self.round.late if self._stale is not None else ():
            if offer := self.contributions[client].offer:
                blob = self._spool.path(client).read_bytes()
                due = self._arrivals[client] - (self.round.closed_at or 0.0)
                self._keep_late(offer, blob, due)

    def _stays(self, client: str) -> float:
        """Return for how long an emulated client stays."""
        return math.inf if self.moment is None else self.moment.stays.get(client, 0.0)

    def accepted_updates(self) -> Iterator[tuple[Vector, int]]:
        """Yield (update, examples) of the accepted clients in client order, one at a time."""
        for client in self.round.accepted:
            header, vector = self._spool.update(client, self._clients[client].layout)
            yield vector, header.examples

    def folded(self) -> ClosedRound | None:
        """Return what this round folds in of earlier ones; decided once, when it is over.

        Raises:
            ValueError: If the round is still open.
        """
        if self._stale is None:
            return None
        if self.round.closed_at is None:
            raise ValueError(f"round {self.number} is open: what it folds in is not decided yet")
        asked = {name: _asked(client) for name, client in self._clients.items()}
        waited = self.moment.waited if self.moment else 0.0
        at, accepted = waited + self.round.closed_at, self.round.accepted
        return self._stale.decide(self.number, at, asked, accepted)

    def stale_updates(self) -> Iterator[StaleUpdate]:
        """Yield the updates of earlier rounds that this one folds in, by (round, client).

        Raises:
            ValueError: If the round is still open.
        """
        closed, stale = self.folded(), self._stale
        if closed is None or stale is None:
            return
        for entry in closed.folded:
            layout = self._rules.layout.first(entry.tensors)
            _, vector = decode_blob(stale.read(entry), layout)
            yield StaleUpdate(
                client=entry.client,
                round=entry.round,
                staleness=self.number - entry.round,
                vector=vector,
                examples=entry.examples,
            )

    def close(self) -> None:
        """Let go of what is under way; what has arrived stays on disk, to go on with."""
        self._desk.suspend()

    def clear(self) -> None:
        """Remove the round's updates."""
        self.close()
        self._spool.clear()


def _asked(client: Client) -> Asked:
    return Asked(examples=client.examples, tensors=len(client.layout.specs))
