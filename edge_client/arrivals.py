"""Global states on their way to the devices of one process: each comes once, for all that wait.

The first device that lacks a state asks for it, and the others wait. Where the one that asks leaves
or is not answered, the next one goes on with what has come so far. A state that somebody in the
process holds is in memory once, and comes no second time. One thread calls all of it; times are
seconds of its monotonic clock.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

from messaging.chunks import Chunk
from messaging.codecs import decode_blob
from messaging.errors import ProtocolError
from messaging.layout import Layout, Vector
from messaging.protocol import StateRef
from messaging.transfer import Download

_DOWN_WINDOW = 8


@dataclass(frozen=True)
class Sought:
    """A global state that a task names, and what must be in it."""

    run: str
    ref: StateRef
    layout: Layout

    @cached_property
    def content(self) -> tuple[str, int, str, str]:
        """What it is, in whatever pieces it comes."""
        return self.run, self.ref.round, self.ref.blob, self.layout.sha256

    @cached_property
    def key(self) -> tuple[tuple[str, int, str, str], StateRef]:
        """What it is, and the way that it comes."""
        return self.content, self.ref


class Seeker(Protocol):
    """A device that waits for a state."""

    def lies_in_store(self, ref: StateRef) -> bool:
        """Return whether it can be fetched from a store that the device knows."""

    def fetch(self, ref: StateRef) -> None:
        """Have it fetched from there."""

    def ask(self, ref: StateRef, pieces: list[int]) -> None:
        """Ask the aggregator for pieces of it."""

    def arrived(self, state: Sought, vector: Vector, now: float) -> None:
        """Take the state."""

    def unusable(self, state: Sought, reason: str) -> None:
        """Take the sentence that says why it can never be used."""


@dataclass
class _Coming:
    state: Sought
    line: OrderedDict[Seeker, None] = field(default_factory=OrderedDict)  # the first one asks
    download: Download | None = None  # none while the store is asked

    @property
    def first(self) -> Seeker:
        return next(iter(self.line))

    def let_the_next_ask(self) -> None:
        self.line.move_to_end(self.first)


class Arrivals:
    """What the devices of one process wait for, and what they hold in common.

    Attributes:
        unfetchable: Hashes of states that their store did not give.
    """

    def __init__(self) -> None:
        self.unfetchable: set[str] = set()
        self._held: weakref.WeakValueDictionary[object, Vector] = weakref.WeakValueDictionary()
        self._coming: dict[object, _Coming] = {}
        self._fetching: set[StateRef] = set()

    def find(self, state: Sought) -> Vector | None:
        """Return a state that some device of the process holds."""
        return self._held.get(state.content)

    def seek(self, state: Sought, seeker: Seeker, now: float) -> None:
        """Wait for a state; called again, it is asked for again once it is time."""
        coming = self._coming.setdefault(state.key, _Coming(state))
        coming.line.setdefault(seeker)
        if coming.download is None and state.ref not in self._fetching:
            if seeker.lies_in_store(state.ref):
                self._fetching.add(state.ref)
                seeker.fetch(state.ref)
            else:
                coming.download = Download(state.ref, now)
        self._ask(coming, now)

    def leave(self, state: Sought, seeker: Seeker) -> None:
        """Wait no longer; if others do, the next one asks once any of them seeks again."""
        coming = self._coming.get(state.key)
        if coming is None or seeker not in coming.line:
            return
        asked = seeker is coming.first
        del coming.line[seeker]
        if not coming.line:
            del self._coming[state.key]
        elif asked and coming.download is not None:
            coming.download.ask_anew()

    def _ask(self, coming: _Coming, now: float) -> None:
        download = coming.download
        if download is None:
            return
        if download.stalled(now):
            coming.let_the_next_ask()
        if pieces := download.wanted(_DOWN_WINDOW, now):
            coming.first.ask(coming.state.ref, pieces)

    def chunk(self, state: Sought, chunk: Chunk, now: float) -> None:
        """Take a piece that came to one of those that wait.

        Raises:
            ProtocolError: If it does not fit, or all pieces together are not what was asked for.
        """
        coming = self._coming.get(state.key)
        if coming is None or coming.download is None:
            return
        coming.download.arrived(chunk, now)
        if coming.download.missing:
            self._ask(coming, now)
            return
        try:
            blob = coming.download.finish()
        except ProtocolError:
            coming.let_the_next_ask()
            raise
        self._deliver(coming, blob, now)

    def fetched(self, ref: StateRef, blob: bytes | None, now: float) -> None:
        """Take a state from its store; without it, its chunks are asked for."""
        self._fetching.discard(ref)
        if blob is None:
            self.unfetchable.add(ref.blob)
        waiting = [c for c in self._coming.values() if c.state.ref == ref and c.download is None]
        for coming in waiting:
            if blob is None:
                coming.download = Download(ref, now)
                self._ask(coming, now)
            else:
                self._deliver(coming, blob, now)

    def _deliver(self, coming: _Coming, blob: bytes, now: float) -> None:
        state = coming.state
        del self._coming[state.key]
        try:
            vector = _decoded(blob, state)
        except ProtocolError as err:  # its hash is right: to ask again would be of no use
            for seeker in coming.line:
                seeker.unusable(state, err.reason)
            return
        vector = self._held.setdefault(state.content, vector)
        for seeker in list(coming.line):
            seeker.arrived(state, vector, now)


def _decoded(blob: bytes, state: Sought) -> Vector:
    round_ = state.ref.round
    try:
        header, vector = decode_blob(blob, state.layout)
    except ProtocolError as err:
        reason = f"the global state of round {round_} cannot be used: {err.reason}"
        raise ProtocolError(err.code, reason) from err
    if header.run != state.run or header.round != round_:
        raise ProtocolError(
            "state",
            f"the global state of round {round_} says that it is of round {header.round} of the "
            f"run '{header.run}'",
        )
    return vector if vector.flags.writeable else vector.copy()  # torch takes no other
