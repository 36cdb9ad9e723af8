"""Over how many seconds devices return after a break, so that they do not all return at once.

The rule: devices return at ``A_SECOND`` a second. The window is 0 for a fleet that may come in one
burst; an aggregator that starts with more devices than that in its store opens one from the
beginning, and more than ``BURST`` greetings within ``WITHIN_SECONDS`` open one, or double it. It
stays: a device that returns a little later after the next break costs nothing.
"""

from __future__ import annotations

from collections import deque

A_SECOND = 50.0
BURST = 500
WITHIN_SECONDS = 5.0
_LONGEST_SECONDS = 3600.0


class Reconnects:
    """Greetings in the last seconds, and the window that follows from them.

    Args:
        devices: That the run has known so far.

    Attributes:
        seconds: The window.
    """

    def __init__(self, devices: int) -> None:
        self.seconds = _window(devices) if devices > BURST else 0.0
        self._greetings: deque[float] = deque()

    def greeted(self, now: float, devices: int) -> bool:
        """Count a greeting of one of so many devices; return whether the window became wider."""
        self._greetings.append(now)
        while self._greetings[0] < now - WITHIN_SECONDS:
            self._greetings.popleft()
        if len(self._greetings) <= BURST:
            return False
        self._greetings.clear()
        before = self.seconds
        self.seconds = min(_LONGEST_SECONDS, max(_window(devices), 2 * before))
        return self.seconds > before


def _window(devices: int) -> float:
    return min(_LONGEST_SECONDS, devices / A_SECOND)
