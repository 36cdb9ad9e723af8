"""What the fault tests share: a broker, a run, and the run that nothing disturbed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from messaging.broker import is_installed
from tests.faults.broker import Mosquitto
from tests.faults.play import DEVICES, Play
from tests.faults.processes import ended


@pytest.fixture(scope="session", autouse=True)
def _needs_mosquitto() -> None:
    if not is_installed("mosquitto"):
        pytest.skip("mosquitto is not installed on this machine")


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Mosquitto]:
    """Yield a broker that runs; the test may kill it."""
    broker = Mosquitto(tmp_path)
    broker.start()
    yield broker
    broker.kill()


@pytest.fixture
def play(tmp_path: Path, broker: Mosquitto) -> Iterator[Play]:
    """Yield a run of three devices and two rounds; its processes are ended after the test."""
    play = Play(tmp_path, broker)
    with ended(play.actors):
        yield play


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[int, str]]:
    """Return what gives the states of a run without a fault, by what it changes of the run."""
    done: dict[str, dict[int, str]] = {}

    def states(devices: tuple[str, ...] = DEVICES, **changes: Any) -> dict[int, str]:
        key = repr((devices, sorted(changes.items())))
        if key not in done:
            folder = tmp_path_factory.mktemp("undisturbed")
            broker = Mosquitto(folder)
            broker.start()
            play = Play(folder, broker, devices)
            try:
                with ended(play.actors):
                    done[key] = play.run(**changes)
            finally:
                broker.kill()
        return done[key]

    return states
