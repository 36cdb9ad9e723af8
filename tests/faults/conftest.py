"""What the fault tests share: a broker, a run's programs, and the run that nothing disturbed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from cloud_aggregator.records import RunRecord
from cloud_aggregator.run_folder import read_record
from messaging.broker import is_installed
from tests.faults.base import write_base
from tests.faults.broker import Mosquitto
from tests.faults.cloud import aggregate
from tests.faults.device import take_part
from tests.faults.processes import Actor, Hold, ended

DEVICES = ("pi-1", "pi-2", "pi-3")


@dataclass
class Play:
    """One run: a broker, an aggregator and devices, each of which may fall and come again.

    Attributes:
        folder: Of the run's base, the aggregator's and the devices' files.
        broker: That they meet at.
        devices: Names of those that take part.
    """

    folder: Path
    broker: Mosquitto
    devices: tuple[str, ...] = DEVICES
    actors: list[Actor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._base = write_base(self.folder / "base")

    @property
    def out(self) -> Path:
        """The run's folder."""
        return self.folder / "run"

    def device_folder(self, client: str) -> Path:
        """Return where a device keeps what it has."""
        return self.folder / "devices" / client

    def cloud(self, *, hold: Hold | None = None, via: str | None = None, **changes: Any) -> Actor:
        """Start the aggregator, or start it again."""
        actor = Actor(
            "aggregator",
            aggregate,
            hold=hold,
            broker=via or self.broker.url,
            base=self._base,
            out=self.out,
            clients=len(self.devices),
            **changes,
        )
        self.actors.append(actor)
        return actor

    def device(
        self, client: str, *, hold: Hold | None = None, via: str | None = None, **changes: Any
    ) -> Actor:
        """Start a device, or start it again."""
        actor = Actor(
            client,
            take_part,
            hold=hold,
            client=client,
            broker=via or self.broker.url,
            base=self._base,
            **{"folder": self.device_folder(client), **changes},
        )
        self.actors.append(actor)
        return actor

    def others(self, *but: str, **changes: Any) -> dict[str, Actor]:
        """Start every device but these."""
        return {name: self.device(name, **changes) for name in self.devices if name not in but}

    def finish(self, cloud: Actor, *devices: Actor) -> RunRecord:
        """Wait for the end of the run; return its record."""
        assert cloud.finish()["status"] == "done"
        for device in devices:
            assert device.finish() == {"failures": []}
        return self.record

    @property
    def record(self) -> RunRecord:
        """The run's record as it is now."""
        return read_record(self.out)

    @property
    def states(self) -> dict[int, str]:
        """SHA-256 of the file of each global state, by round."""
        return {
            int(path.parent.name): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in self.out.glob("global/*/shared.safetensors")
        }

    @property
    def accepted(self) -> list[list[str]]:
        """Whose updates counted, by round."""
        return [list(r.accepted) for r in self.record.rounds]

    def run(self, *, remembers: bool = True, **changes: Any) -> dict[int, str]:
        """Do a run that nothing disturbs; return its states."""
        cloud = self.cloud(**changes)
        self.finish(cloud, *self.others(remembers=remembers).values())
        return self.states


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
