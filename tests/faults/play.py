"""A run of the fault tests: a broker, an aggregator and devices, each of which may fall."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cloud_aggregator.records import RunRecord
from cloud_aggregator.run_folder import read_record
from messaging.key_files import RunKeys
from tests.faults.base import RUN, write_base
from tests.faults.broker import Mosquitto
from tests.faults.cloud import aggregate
from tests.faults.device import take_part
from tests.faults.processes import Actor, Hold

DEVICES = ("pi-1", "pi-2", "pi-3")


@dataclass
class Play:
    """One run: a broker, an aggregator and devices, each of which may fall and come again.

    Attributes:
        folder: Of the run's base, the aggregator's and the devices' files.
        broker: That they meet at.
        devices: Names of those that take part.
        sealed: Whether its messages are sealed, as a run's with keys are.
        actors: Every program that was started.
        heard: Called on each event of each program, on a thread.
    """

    folder: Path
    broker: Mosquitto
    devices: tuple[str, ...] = DEVICES
    sealed: bool = True
    actors: list[Actor] = field(default_factory=list)
    heard: Callable[[], None] = lambda: None

    def __post_init__(self) -> None:
        self._base = write_base(self.folder / "base")
        self._keys = RunKeys.generate(RUN)

    @property
    def out(self) -> Path:
        """The run's folder."""
        return self.folder / "run"

    def device_folder(self, client: str) -> Path:
        """Return where a device keeps what it has."""
        return self.folder / "devices" / client

    def _key(self, name: str, content: bytes) -> Path | None:
        path = self.folder / f"{name}.key"
        if self.sealed and not path.exists():
            path.touch(mode=0o600)
            path.write_bytes(content)
        return path if self.sealed else None

    def cloud(self, *, hold: Hold | None = None, via: str | None = None, **changes: Any) -> Actor:
        """Start the aggregator, or start it again."""
        actor = Actor(
            "aggregator",
            aggregate,
            hold=hold,
            heard=self.heard,
            broker=via or self.broker.url,
            base=self._base,
            out=self.out,
            clients=len(self.devices),
            key=self._key("cloud", self._keys.file()),
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
            heard=self.heard,
            client=client,
            broker=via or self.broker.url,
            base=self._base,
            key=self._key(client, self._keys.device(client).file()),
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
