"""Where a device's time goes while it does a task: seconds by part, on its own clock.

It is for looking at: nothing that a run is compared by contains it. Whatever works names its part
(``timed``); the time of a part inside another counts for the inner one alone.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar

from messaging.protocol import Part


class Stopwatch:
    """Seconds by part.

    Args:
        clock: Seconds.

    Attributes:
        seconds: Of each part so far.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.seconds: dict[Part, float] = {}
        self._clock = clock
        self._parts: list[Part] = []
        self._since = 0.0

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Take the time of what names its part on this thread, for as long as the block lasts."""
        token = _running.set(self)
        try:
            yield
        finally:
            _running.reset(token)

    @contextlib.contextmanager
    def part(self, name: Part) -> Iterator[None]:
        """Count the time of the block for a part."""
        self._charge()
        self._parts.append(name)
        try:
            yield
        finally:
            self._charge()
            self._parts.pop()

    def _charge(self) -> None:
        now = self._clock()
        if self._parts:
            part = self._parts[-1]
            self.seconds[part] = self.seconds.get(part, 0.0) + now - self._since
        self._since = now


_running: ContextVar[Stopwatch | None] = ContextVar("stopwatch", default=None)


def timed(name: Part) -> contextlib.AbstractContextManager[None]:
    """Return a block whose time counts for a part, where anybody takes it."""
    watch = _running.get()
    return contextlib.nullcontext() if watch is None else watch.part(name)
