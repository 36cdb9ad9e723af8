"""That a device is there: its HELLO, spread over a window after a break, and its signs of life.

Times are seconds on the caller's monotonic clock.
"""

from __future__ import annotations

from collections.abc import Callable

from device_profiles.seeds import stream
from edge_client.line import Line
from messaging.protocol import Manifest


class Presence:
    """When one device says that it is there.

    Args:
        client: Its name.
        line: To the aggregator.
        heartbeat_seconds: Between two signs of life; none gives none.
        spread: Told over how many seconds devices return after a break.
    """

    def __init__(
        self,
        client: str,
        line: Line,
        heartbeat_seconds: float | None,
        spread: Callable[[float], None] | None,
    ) -> None:
        self._client, self._line = client, line
        self._heartbeat = heartbeat_seconds
        self._spread = spread
        self._window = 0.0  # seconds over which devices return after a break
        self._greetings = 0
        self._greet_at: float | None = None
        self._alive_at: float | None = None
        self._seen_aggregator = ""

    @property
    def knows_aggregator(self) -> bool:
        """Whether an aggregator has said which one it is."""
        return bool(self._seen_aggregator)

    def met(self, manifest: Manifest, now: float) -> None:
        """Take from a manifest how devices return; greet an aggregator that is new."""
        self._window = manifest.reconnect_seconds
        if self._spread is not None:
            self._spread(self._window)
        if manifest.session != self._seen_aggregator:
            self._seen_aggregator = manifest.session
            self.greet(now)

    def greet(self, now: float) -> None:
        """Say HELLO, at once the first time; later somewhere in the window that all share."""
        self._greetings += 1
        wait = 0.0
        if self._greetings > 1:
            place = stream(0, "reconnect", self._client, self._line.session, self._greetings)
            wait = self._window * float(place.random())
        self._greet_at = now + wait
        self._greet_if_due(now)

    def tick(self, now: float) -> None:
        """Say what is due."""
        self._greet_if_due(now)
        if self._heartbeat is None or self._alive_at is None:
            return
        if now - self._alive_at >= self._heartbeat:
            self._alive_at = now
            self._line.say_alive()

    def _greet_if_due(self, now: float) -> None:
        if self._greet_at is not None and now >= self._greet_at:
            self._greet_at, self._alive_at = None, now
            self._line.greet()
