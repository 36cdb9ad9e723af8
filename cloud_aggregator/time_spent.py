"""Where a round's time went, in seconds by part: of its devices, as they say, and of the cloud.

For looking at only: it stands in the record's ``observed``, which no comparison of bits includes.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping

from messaging.protocol import Part


class TimeSpent:
    """Seconds since they were last taken.

    Args:
        clock: Monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._own: defaultdict[str, float] = defaultdict(float)
        self._devices: dict[tuple[str, str], Mapping[Part, float]] = {}

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the time of the block for a part of the cloud's own work."""
        began = self._clock()
        try:
            yield
        finally:
            self._own[name] += self._clock() - began

    def told(self, client: str, phase: str, spent: Mapping[Part, float]) -> None:
        """Take note of what a device says; said again, it counts once."""
        self._devices[client, phase] = spent

    def taken(self) -> dict[str, float]:
        """Return the sums by part, and begin anew."""
        total = self._own.copy()
        for spent in self._devices.values():
            for name, seconds in spent.items():
                total[name] += seconds
        self._own.clear()
        self._devices.clear()
        return dict(sorted(total.items()))
