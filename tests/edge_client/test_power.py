"""Energy counters that wrap, zones that overlap, rails that are sampled, and nothing to read."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from edge_client.power import JetsonMeter, Metered, find_meter, find_rapl

ZONES = {
    "intel-rapl:0": ("package-0", 1_000_000),
    "intel-rapl:0:0": ("core", 400_000),
    "intel-rapl:0:1": ("dram", 50_000),
    "intel-rapl:1": ("package-1", 9_000_000),
}
RANGE = 10_000_000


def write_zones(folder: Path, zones: dict[str, tuple[str, int]]) -> Path:
    for zone, (name, energy) in zones.items():
        (folder / zone).mkdir(parents=True, exist_ok=True)
        (folder / zone / "name").write_text(f"{name}\n")
        (folder / zone / "energy_uj").write_text(f"{energy}\n")
        (folder / zone / "max_energy_range_uj").write_text(f"{RANGE}\n")
    (folder / "intel-rapl").mkdir(exist_ok=True)
    return folder


def test_packages_and_their_memory_are_summed_and_cores_are_not_counted_twice(
    tmp_path: Path,
) -> None:
    meter, words = find_rapl(write_zones(tmp_path, ZONES))
    assert meter is not None
    assert "package-0, dram, package-1" in words
    assert "not the whole machine" in words
    meter.start()
    more = {"intel-rapl:0": 3_000_000, "intel-rapl:0:0": 900_000, "intel-rapl:0:1": 500_000}
    write_zones(
        tmp_path,
        {zone: (name, energy + more.get(zone, 0)) for zone, (name, energy) in ZONES.items()},
    )
    assert meter.watts(2.0) == pytest.approx(1.75)  # 3.0 J and 0.5 J in two seconds


def test_a_counter_that_went_over_its_end_is_counted_right(tmp_path: Path) -> None:
    meter, _ = find_rapl(write_zones(tmp_path, ZONES))
    assert meter is not None
    meter.start()
    write_zones(tmp_path, {**ZONES, "intel-rapl:1": ("package-1", 500_000)})
    # from 9 J to the end at 10 J, and half a joule more
    assert meter.watts(1.0) == pytest.approx(1.5)


def test_the_platform_counts_alone_where_it_has_a_counter(tmp_path: Path) -> None:
    meter, words = find_rapl(write_zones(tmp_path, {**ZONES, "intel-rapl:2": ("psys", 5)}))
    assert meter is not None
    assert "(psys)" in words
    meter.start()
    write_zones(tmp_path, {**ZONES, "intel-rapl:2": ("psys", 4_000_005)})
    assert meter.watts(2.0) == pytest.approx(2.0)


def test_a_counter_that_stands_still_says_nothing(tmp_path: Path) -> None:
    meter, _ = find_rapl(write_zones(tmp_path, ZONES))
    assert meter is not None
    meter.start()
    assert meter.watts(1.0) is None


def test_no_counters_and_damaged_counters_are_said(tmp_path: Path) -> None:
    meter, words = find_rapl(tmp_path / "nothing")
    assert (meter, words) == (None, "no power rails and no RAPL counters here")
    folder = write_zones(tmp_path, ZONES)
    (folder / "intel-rapl:0" / "energy_uj").write_text("many\n")
    meter, words = find_rapl(folder)
    assert meter is None
    assert "cannot be read" in words


def test_counters_that_only_root_may_read_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_zones(tmp_path, ZONES)
    read = Path.read_text

    def guarded(self: Path, *args: str) -> str:  # root, who runs tests here, may read everything
        if self.name == "energy_uj":
            raise PermissionError(13, "Permission denied")
        return read(self, *args)

    monkeypatch.setattr(Path, "read_text", guarded)
    meter, words = find_rapl(folder)
    assert meter is None
    assert "only root may read" in words


class Rails:
    """A jtop whose samples are numbered, until it is no longer looked at."""

    def __init__(self, milliwatts: list[int], seen: threading.Event) -> None:
        self._left, self._seen = milliwatts, seen
        self.power: dict[str, dict[str, int]] = {}

    def ok(self) -> bool:
        """Take the next sample, if there is one."""
        if not self._left:
            self._seen.set()
            return False
        self.power = {"tot": {"power": self._left.pop(0)}}
        return True


def jtop_of(milliwatts: list[int], seen: threading.Event) -> object:
    @contextmanager
    def jtop() -> Iterator[Rails]:
        yield Rails(milliwatts, seen)

    return jtop


def test_a_jetson_s_power_is_the_mean_of_its_samples() -> None:
    seen = threading.Event()
    meter = JetsonMeter(jtop_of([6000, 9000, 12_000], seen))  # type: ignore[arg-type]
    meter.start()
    assert seen.wait(30)
    assert meter.watts(1.0) == pytest.approx(9.0)


def test_a_jetson_without_a_sample_says_nothing() -> None:
    seen = threading.Event()
    meter = JetsonMeter(jtop_of([], seen))  # type: ignore[arg-type]
    meter.start()
    assert seen.wait(30)
    assert meter.watts(1.0) is None


def test_jetson_stats_come_before_counters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("jtop")
    module.jtop = jtop_of([], threading.Event())  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "jtop", module)
    meter, words = find_meter(write_zones(tmp_path, ZONES))
    assert isinstance(meter, JetsonMeter)
    assert "the whole board" in words
    monkeypatch.setitem(sys.modules, "jtop", None)
    _, words = find_meter(tmp_path)
    assert "by RAPL" in words


def test_a_block_is_metered_by_the_time_that_passed() -> None:
    times = iter([100.0, 104.0])
    asked: list[float] = []
    meter = SimpleNamespace(
        covers="", start=lambda: None, watts=lambda seconds: asked.append(seconds) or 7.0
    )
    with Metered(meter, lambda: next(times)) as metered:
        assert metered.watts is None
    assert (metered.watts, asked) == (7.0, [4.0])


def test_without_a_meter_a_block_has_no_power() -> None:
    with Metered(None, lambda: 0.0) as metered:
        pass
    assert metered.watts is None
