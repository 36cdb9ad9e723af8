"""What arrives, in its order, for the one thread that takes it; waiting is done here alone."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

_TICK_SECONDS = 0.5


class StoppedError(Exception):
    """Someone asked the run to stop."""


class Inbox:
    """A queue that transports, signal handlers and other threads put to.

    Args:
        take: Given topic and payload of what arrived.
        tick: Given the time about twice a second, while someone waits.
        clock: Monotonic seconds.

    Attributes:
        ticked_at: When ``tick`` was last called; none before it was.
    """

    def __init__(
        self,
        *,
        take: Callable[[str, bytes], None],
        tick: Callable[[float], None],
        clock: Callable[[], float],
    ) -> None:
        self._take = take
        self._tick = tick
        self._clock = clock
        # A simple queue: a signal handler may put while this thread gets.
        self._queue: queue.SimpleQueue[tuple[str, bytes] | Callable[[], None] | None]
        self._queue = queue.SimpleQueue()
        self._stop = threading.Event()
        self._failure: Exception | None = None
        self.ticked_at: float | None = None

    def put(self, topic: str, payload: bytes) -> None:
        """Take what arrived on a topic; callable from any thread."""
        self._queue.put((topic, payload))

    def call(self, function: Callable[[], None]) -> None:
        """Call ``function`` on the thread that waits, in its turn; callable from any thread."""
        self._queue.put(function)

    def stop(self) -> None:
        """Make ``wait`` raise ``StoppedError``; callable from any thread or signal handler."""
        self._stop.set()
        self._queue.put(None)

    def fail(self, error: Exception) -> None:
        """Make ``wait`` raise ``error``; callable from any thread."""
        self._failure = error
        self._queue.put(None)

    def wait(self, done: Callable[[], bool], limit_seconds: float) -> bool:
        """Take what arrives until ``done`` holds; return whether it does at the limit.

        Raises:
            StoppedError: If the run is to stop.
        """
        deadline = self._clock() + limit_seconds
        next_tick = self._clock()
        while not done():
            now = self._clock()
            if now >= deadline:
                return False
            if now >= next_tick:
                self.ticked_at = now
                self._tick(now)
                next_tick = now + _TICK_SECONDS
            try:
                event = self._queue.get(timeout=max(0.0, min(next_tick, deadline) - now))
            except queue.Empty:
                continue
            if self._failure is not None:
                raise self._failure
            if self._stop.is_set():
                raise StoppedError
            if callable(event):
                event()
            elif event is not None:
                self._take(*event)
        return True

    def outlast(
        self, done: Callable[[], bool], progress: Callable[[], int], limit_seconds: float
    ) -> bool:
        """Take what arrives until ``done`` holds; give up once nothing changes for too long."""
        seen = progress()
        while not self.wait(done, limit_seconds):
            if progress() == seen:
                return False
            seen = progress()
        return True
