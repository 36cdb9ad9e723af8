"""Late updates on disk until a later round folds them in, and which round folded which.

For each closed round there is one small file that says whom it asked, whose updates it accepted and
which stale ones it folded in. It is written before anything is aggregated, so a process that is
killed at any moment finds either no decision or the whole of it: nothing is counted twice, and a
closed round that is gone on with folds in the same. A round that is open has no decision, since the
store says that it is closed before anything is decided: one that is found nevertheless is of an
earlier try, from which nothing comes into the state, and it is forgotten before anyone is asked.

In deployment an update may be folded in once it is here. In emulation it must also have come by its
device's modelled time, on a clock that runs while rounds are open: what is folded into a round came
before that round closed. The downlink between rounds takes no time on this clock, and a device that
is late is asked again at the beginning of the next round as if it were free.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from cloud_aggregator.aggregation.asynchronous import MAX_STALENESS
from cloud_aggregator.partials import ResumablePartial, adopt, held_pieces
from cloud_aggregator.run_folder import write_atomically
from device_profiles.errors import InputError
from messaging.chunks import Bytes
from messaging.protocol import Offer


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Asked(_Part):
    """What a round knew of a client that it asked: its examples, and the tensors that it holds."""

    examples: int
    tensors: int


class Folded(_Part):
    """A stale update that a round folded in."""

    client: str
    round: int
    blob: str
    examples: int
    tensors: int


class ClosedRound(_Part):
    """What a round of ``seconds`` decided. ``dropped`` counts updates that had become too stale."""

    round: int
    seconds: float
    asked: Mapping[str, Asked]
    accepted: tuple[str, ...]
    folded: tuple[Folded, ...]
    dropped: int = 0


class _Held(_Part):
    offer: Offer
    asked: Asked
    due_seconds: float


class StaleUpdates:
    """The folder of late updates.

    Args:
        folder: Made when the first update is kept.
        max_staleness: Rounds after which an update is dropped, >= 1.

    Raises:
        InputError: If ``max_staleness`` is below 1.
    """

    def __init__(self, folder: Path, max_staleness: int = MAX_STALENESS) -> None:
        if max_staleness < 1:
            raise InputError(f"max_staleness = {max_staleness}; give at least 1 round")
        self.max_staleness = max_staleness
        self._folder = folder
        self._rounds: dict[int, ClosedRound] = {}

    def begin(self, number: int) -> None:
        """Go on with round ``number``, which an earlier process may have decided already.

        What earlier rounds folded in is removed.

        Raises:
            InputError: If what was decided cannot be read.
        """
        self._rounds = {}
        for path in self._folder.glob("round-*.json"):
            try:
                closed = ClosedRound.model_validate_json(path.read_bytes())
            except (OSError, ValidationError) as err:
                raise InputError(
                    f"{path} is damaged, so nobody knows which late updates were counted; remove "
                    f"the folder {self._folder} to go on without those that wait"
                ) from err
            if closed.round < number - self.max_staleness:
                path.unlink()
            else:
                self._rounds[closed.round] = closed
        for held in self._all_held():
            offer = held.offer
            if self.counted(offer.round, offer.client, before=number):
                self._remove(offer.round, offer.client)

    def forget_before(self, number: int) -> None:
        """Drop what is of an earlier round than ``number``: of another stage, it fits no more."""
        for path in self._folder.glob("round-*.json"):
            if int(path.stem.removeprefix("round-")) < number:
                path.unlink()
        self._rounds = {n: closed for n, closed in self._rounds.items() if n >= number}
        for held in self._all_held():
            if held.offer.round < number:
                self._remove(held.offer.round, held.offer.client)

    def forget_decision(self, number: int) -> None:
        """Forget what an earlier try of a round decided, now that the round begins again.

        Who was accepted in it may give another update, and what it folded in waits as before.
        """
        (self._folder / f"round-{number}.json").unlink(missing_ok=True)
        self._rounds.pop(number, None)

    def decided(self, number: int) -> ClosedRound | None:
        """Return what was decided for a round."""
        return self._rounds.get(number)

    def asked(self, round_: int, client: str) -> Asked | None:
        """Return what a closed round knew of a client; none if it did not ask it, or is too old."""
        closed = self._rounds.get(round_)
        return closed.asked.get(client) if closed else None

    def counted(self, round_: int, client: str, *, before: int | None = None) -> bool:
        """Return whether a client's update for a round counts, in that round or a later one.

        With ``before``, only what was decided for rounds before that one is asked.
        """
        return any(
            (closed.round == round_ and client in closed.accepted)
            or any((f.round, f.client) == (round_, client) for f in closed.folded)
            for closed in self._rounds.values()
            if before is None or closed.round < before
        )

    def holds(self, round_: int, client: str) -> bool:
        """Return whether an update is kept."""
        return self._note_path(round_, client).exists()

    def keep(self, offer: Offer, blob: Bytes, asked: Asked, *, due_seconds: float = 0.0) -> None:
        """Put a verified update on disk; the first one for its round stays.

        Args:
            offer: It came with.
            blob: The update.
            asked: What its round knew of its client.
            due_seconds: In emulation, how long after the end of its round it comes.

        Raises:
            DiskFullError: If the disk has no room.
        """
        if self.holds(offer.round, offer.client) or self.counted(offer.round, offer.client):
            return
        write_atomically(self._blob_path(offer.round, offer.client), blob)
        held = _Held(offer=offer, asked=asked, due_seconds=due_seconds)
        note = self._note_path(offer.round, offer.client)
        write_atomically(note, held.model_dump_json(by_alias=True).encode())

    def decide(
        self, number: int, seconds: float, asked: Mapping[str, Asked], accepted: list[str]
    ) -> ClosedRound:
        """Return what a round that closed after ``seconds`` folds in; asked again, the same.

        Raises:
            DiskFullError: If the disk has no room for the decision.
        """
        if number in self._rounds:
            return self._rounds[number]
        folded: list[Folded] = []
        dropped: list[Offer] = []
        for held in self._all_held():
            offer = held.offer
            if offer.round >= number:
                continue
            if number - offer.round > self.max_staleness:
                dropped.append(offer)
            elif not self._is_due(held, number, seconds):
                continue
            elif self.counted(offer.round, offer.client) or not self._is_whole(offer):
                dropped.append(offer)
            else:
                folded.append(
                    Folded(
                        client=offer.client,
                        round=offer.round,
                        blob=offer.blob,
                        examples=held.asked.examples,
                        tensors=held.asked.tensors,
                    )
                )
        closed = ClosedRound(
            round=number,
            seconds=seconds,
            asked=dict(asked),
            accepted=tuple(accepted),
            folded=tuple(sorted(folded, key=lambda f: (f.round, f.client))),
            dropped=len(dropped),
        )
        write_atomically(self._folder / f"round-{number}.json", closed.model_dump_json().encode())
        self._rounds[number] = closed
        for offer in dropped:
            self._remove(offer.round, offer.client)
        return closed

    def _is_due(self, held: _Held, number: int, seconds: float) -> bool:
        between = range(held.offer.round + 1, number)
        passed = seconds + sum(self._rounds[m].seconds for m in between if m in self._rounds)
        return held.due_seconds <= passed

    def kept(self, round_: int) -> Iterator[tuple[Offer, bytes]]:
        """Yield offer and update of those kept for a round; what is damaged is passed."""
        for held in self._all_held():
            if held.offer.round == round_ and self._is_whole(held.offer):
                path = self._blob_path(round_, held.offer.client)
                yield held.offer, path.read_bytes()

    def read(self, folded: Folded) -> bytes:
        """Return an update that was chosen."""
        return self._blob_path(folded.round, folded.client).read_bytes()

    def open_partial(self, offer: Offer) -> ResumablePartial:
        """Return where the pieces of an update for an earlier round are put.

        Raises:
            SpoolFullError: If the disk has no room for it.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        return ResumablePartial(self._partial_path(offer), offer)

    def held_pieces(self, offer: Offer) -> set[int]:
        """Return which pieces of an offer an earlier process left."""
        return held_pieces(self._partial_path(offer), offer)

    def adopt(self, whole: Path, offer: Offer) -> None:
        """Make a file that came another way all pieces of an update for an earlier round.

        Raises:
            SpoolFullError: If the disk has no room for it.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        adopt(whole, self._partial_path(offer), offer)

    def _partial_path(self, offer: Offer) -> Path:
        return self._folder / f"{offer.client}.part"

    def _blob_path(self, round_: int, client: str) -> Path:
        return self._folder / f"{round_}-{client}.safetensors"

    def _note_path(self, round_: int, client: str) -> Path:
        return self._folder / f"{round_}-{client}.late"

    def _all_held(self) -> list[_Held]:
        held = []
        for path in self._folder.glob("*.late"):
            try:
                held.append(_Held.model_validate_json(path.read_bytes()))
            except ValidationError as err:
                raise InputError(f"{path} is damaged; remove it to go on without it") from err
        return sorted(held, key=lambda h: (h.offer.round, h.offer.client))

    def _is_whole(self, offer: Offer) -> bool:
        try:
            blob = self._blob_path(offer.round, offer.client).read_bytes()
        except FileNotFoundError:
            return False
        return hashlib.sha256(blob).hexdigest() == offer.blob

    def _remove(self, round_: int, client: str) -> None:
        self._note_path(round_, client).unlink(missing_ok=True)
        self._blob_path(round_, client).unlink(missing_ok=True)
