"""What one device downloads and holds: the global states that its tasks name, by their hash.

How a state travels is the concern of ``arrivals``, which the devices of a process have in common;
what it costs is counted here in bytes, for each device as if it were alone.
"""

from __future__ import annotations

from collections.abc import Callable

from edge_client.arrivals import Arrivals, Sought
from edge_client.local_client import Setup
from edge_client.stage_work import GlobalStates
from messaging.chunks import parse_chunk, wire_bytes
from messaging.codecs import max_blob_bytes
from messaging.errors import ProtocolError
from messaging.layout import Vector
from messaging.protocol import Stage, StateRef, Task


class Downloads:
    """The global states of one device.

    Args:
        setup: What the run shares, by stage.
        arrivals: What devices of one process wait for and hold.
        ask: Asks the aggregator for pieces of a state.
        start_fetch: Fetches a state from a store elsewhere; it comes back through ``fetched``.
            Without it, all states come in pieces.
        ready: Told when a state has come.
        fail: Told why a state can never be used.
    """

    def __init__(
        self,
        setup: Setup,
        arrivals: Arrivals,
        *,
        ask: Callable[[StateRef, list[int]], None],
        start_fetch: Callable[[StateRef], None] | None,
        ready: Callable[[float], None],
        fail: Callable[[str], None],
    ) -> None:
        self._setup = setup
        self._arrivals = arrivals
        self._ask, self._start_fetch = ask, start_fetch
        self._ready, self._fail = ready, fail
        self._held: dict[str, Vector] = {}
        self._newest: dict[Stage, str] = {}  # of each stage: a later one asks for it again
        self._own: StateRef | None = None  # what the task at hand starts from
        self._seeking: Sought | None = None
        self._bytes = 0

    # -- what a task needs -----------------------------------------------------------------------

    def check(self, task: Task) -> None:
        """Refuse a task with a state that cannot be what it is said to be.

        Raises:
            ProtocolError: If it is larger than what the run shares.
        """
        for state in self._needed(task):
            if state.ref.bytes > max_blob_bytes(state.layout, "fp32"):
                raise ProtocolError(
                    "size", f"a global state of {state.ref.bytes} bytes is too large"
                )

    def _needed(self, task: Task) -> list[Sought]:
        layouts = self._setup.layouts
        named: list[tuple[StateRef | None, Stage]] = [
            (task.state, task.stage),
            (task.reward, "reward"),
            (task.reference, "alignment"),
        ]
        return [
            Sought(self._setup.run, ref, layouts[stage])
            for ref, stage in named
            if ref and stage in layouts
        ]

    def complete(self, task: Task, now: float) -> bool:
        """Return whether all states of a task are here; otherwise seek the first that is not."""
        self._own = task.state
        for state in self._needed(task):
            if state.ref.blob in self._held:
                continue
            vector = self._arrivals.find(state)
            if vector is None:
                self._seek(state, now)
                return False
            self._keep(state, vector)
        self.stop()
        return True

    def take(self, task: Task, taken_back: tuple[int, ...]) -> tuple[GlobalStates, int]:
        """Return a task's states and what it took to get them, in bytes, counted once.

        States that no task will name again are forgotten.
        """
        if task.state is not None:
            self._newest[task.stage] = task.state.blob
        kept = {state.ref.blob for state in self._needed(task)} | set(self._newest.values())
        self._held = {blob: vector for blob, vector in self._held.items() if blob in kept}

        def of(ref: StateRef | None) -> Vector | None:
            return None if ref is None else self._held.get(ref.blob)

        states = GlobalStates(
            shared=of(task.state),
            reward=of(task.reward),
            reference=of(task.reference),
            taken_back=taken_back,
        )
        taken, self._bytes = self._bytes, 0
        return states, taken

    # -- how it comes ----------------------------------------------------------------------------

    def _seek(self, state: Sought, now: float) -> None:
        if self._seeking != state:
            self.stop()
            self._seeking = state
        self._arrivals.seek(state, self, now)

    def stop(self) -> None:
        """Wait for nothing; whoever else of the process waits goes on."""
        if self._seeking is not None:
            self._arrivals.leave(self._seeking, self)
        self._seeking = None

    def tick(self, now: float) -> None:
        """Ask again for what did not come."""
        if self._seeking is not None:
            self._arrivals.seek(self._seeking, self, now)

    def chunk(self, packet: bytes, now: float) -> None:
        """Take one piece of a state; one that came twice is left.

        Raises:
            ProtocolError: If it is malformed or does not fit.
        """
        chunk = parse_chunk(self._setup.run, packet)
        if self._seeking is not None and chunk.blob == self._seeking.ref.blob:
            self._arrivals.chunk(self._seeking, chunk, now)

    def fetched(self, ref: StateRef, blob: bytes | None, now: float) -> None:
        """Take a state from the store for all that wait; without it, its pieces are asked for."""
        self._arrivals.fetched(ref, blob, now)

    def lies_in_store(self, ref: StateRef) -> bool:
        """Return whether a state can be fetched."""
        reachable = self._start_fetch is not None and ref.url is not None
        return reachable and ref.blob not in self._arrivals.unfetchable

    def fetch(self, ref: StateRef) -> None:
        """Have a state fetched."""
        if self._start_fetch is not None:
            self._start_fetch(ref)

    def ask(self, ref: StateRef, pieces: list[int]) -> None:
        """Ask the aggregator for pieces of a state."""
        self._ask(ref, pieces)

    def arrived(self, state: Sought, vector: Vector, now: float) -> None:
        """Take a state that has come, if it is waited for."""
        if state != self._seeking:
            return  # another task came in the meantime
        self._seeking = None
        self._keep(state, vector)
        self._ready(now)

    def unusable(self, state: Sought, reason: str) -> None:
        """Take the sentence that says why a state can never be used, if it is waited for."""
        if state == self._seeking:
            self._seeking = None
            self._fail(reason)

    def _keep(self, state: Sought, vector: Vector) -> None:
        """Hold a state, and count its way here.

        What earlier stages left was counted in theirs: only a device that was started again fetches
        it anew, and what a round costs does not depend on that.
        """
        ref = state.ref
        self._held[ref.blob] = vector
        if ref == self._own:
            in_pieces = wire_bytes(ref.bytes, ref.chunk_bytes)
            self._bytes += ref.bytes if self.lies_in_store(ref) else in_pieces
