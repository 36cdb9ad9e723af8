"""Power of this machine: a Jetson's rails, a processor's own energy counters, or nothing to read.

Watts and joules. What a meter covers differs, and is said beside every figure: a Jetson's rails
are the whole board, RAPL is the processor (and its memory), without screen, disk and power supply.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

RAPL_FOLDER = Path("/sys/class/powercap")
_JOIN_SECONDS = 5.0


class Meter(Protocol):
    """Counts energy between ``start`` and ``watts``."""

    covers: str

    def start(self) -> None:
        """Begin to count."""

    def watts(self, seconds: float) -> float | None:
        """Return the mean power since ``start``, ``seconds`` ago; none if nothing was counted."""


class RaplMeter:
    """Energy counters of the processor packages and their memory.

    Args:
        zones: Folders that hold ``energy_uj`` and ``max_energy_range_uj``.
        covers: What they count, in words.
    """

    def __init__(self, zones: list[Path], covers: str) -> None:
        self.covers = covers
        self._zones = zones
        self._before: list[int] = []

    def start(self) -> None:
        """Read the counters."""
        self._before = [_number(zone / "energy_uj") for zone in self._zones]

    def watts(self, seconds: float) -> float | None:
        """Return the mean power; a counter that went over its end once since is counted right."""
        spent = 0
        for zone, before in zip(self._zones, self._before, strict=True):
            more = _number(zone / "energy_uj") - before
            spent += more if more >= 0 else more + _number(zone / "max_energy_range_uj")
        return spent / 1e6 / seconds if seconds > 0 and spent > 0 else None


class JetsonMeter:
    """The rails of a Jetson, as jetson-stats samples them.

    Args:
        open_jtop: ``jtop.jtop``: a context whose ``ok()`` waits for a sample and whose
            ``power["tot"]["power"]`` is that of the board, milliwatts.
    """

    covers = "the whole board, by its power rails (jetson-stats)"

    def __init__(self, open_jtop: Callable[[], AbstractContextManager[Any]]) -> None:
        self._open = open_jtop
        self._samples: list[float] = []
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to sample in a thread."""
        self._samples, self._stop = [], threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def watts(self, seconds: float) -> float | None:
        """Return the mean of the samples."""
        del seconds
        self._stop.set()
        if self._thread is not None:
            self._thread.join(_JOIN_SECONDS)
        return sum(self._samples) / len(self._samples) if self._samples else None

    def _sample(self) -> None:
        with self._open() as jetson:
            while not self._stop.is_set() and jetson.ok():
                self._samples.append(float(jetson.power["tot"]["power"]) / 1e3)


class Metered:
    """Mean power of a ``with`` block.

    Attributes:
        watts: Known behind the block; none where there is no meter or it counted nothing.
    """

    def __init__(self, meter: Meter | None, clock: Callable[[], float]) -> None:
        self.watts: float | None = None
        self._meter, self._clock = meter, clock
        self._began = 0.0

    def __enter__(self) -> Metered:
        """Begin to count."""
        self._began = self._clock()
        if self._meter is not None:
            self._meter.start()
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _err: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        """Work out the mean."""
        if self._meter is not None:
            self.watts = self._meter.watts(self._clock() - self._began)


def find_meter(rapl_folder: Path = RAPL_FOLDER) -> tuple[Meter | None, str]:
    """Return what reads this machine's power, and what was found in words."""
    try:
        from jtop import jtop
    except ImportError:
        pass
    else:
        meter = JetsonMeter(jtop)
        return meter, meter.covers
    return find_rapl(rapl_folder)


def find_rapl(folder: Path = RAPL_FOLDER) -> tuple[RaplMeter | None, str]:
    """Return a meter of the counters below a folder, and what was found in words.

    The platform's counter is taken alone where there is one, else all packages and their memory.
    """
    zones: dict[Path, str] = {}
    for zone in sorted(folder.glob("intel-rapl:*")):
        name = zone / "name"
        if name.is_file() and (zone / "energy_uj").exists():
            zones[zone] = name.read_text().strip()
    if not zones:
        return None, "no power rails and no RAPL counters here"
    platform = [zone for zone, name in zones.items() if name == "psys"]
    chosen = platform or [
        zone for zone, name in zones.items() if name.startswith("package") or name == "dram"
    ]
    try:
        for zone in chosen:
            _number(zone / "energy_uj")
    except PermissionError:
        return None, f"{folder} has RAPL counters, and only root may read them"
    except (OSError, ValueError):
        return None, f"{folder} has RAPL counters that cannot be read"
    words = "the platform" if platform else "processor and memory"
    covers = f"{words} by RAPL ({', '.join(zones[zone] for zone in chosen)}), not the whole machine"
    return RaplMeter(chosen, covers), covers


def _number(path: Path) -> int:
    return int(path.read_text())
