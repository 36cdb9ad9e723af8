"""A deployment as ``pwff certs`` makes it, on a real mosquitto, with those who want in.

Two devices of constant updates, ``a`` and ``b``; ``mallory``, who has a certificate of the same
authority and no key of the run; and ``insider``, whom the broker lets publish and read everything,
so that nothing but the seals stands in the way. Nobody waits without a limit.
"""

from __future__ import annotations

import os
import queue
import secrets
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cloud_aggregator.credentials import Credentials
from cloud_aggregator.door import DoorLimits
from cloud_aggregator.metrics import CountedNetwork, Metrics
from cloud_aggregator.rounds import RoundRules
from cloud_aggregator.run_folder import RunFolder
from cloud_aggregator.server import Aggregator
from cloud_aggregator.store import Store
from edge_client.host import Host
from edge_client.ledger import Ledger
from messaging.access import BrokerAccess
from messaging.broker import HOST, find_mosquitto, free_port
from messaging.broker_rules import AGGREGATOR
from messaging.key_files import DeviceKeys, RunKeys, device_keys, run_keys
from messaging.memory import matches
from messaging.mqtt import MqttNetwork
from messaging.security import DeviceSeal
from messaging.transport import Transport
from tests.cloud_aggregator.conftest import (
    BINDING,
    LIMIT,
    RUN,
    Events,
    Teacher,
    join,
    record_of,
    settings_of,
)

INSIDER, MALLORY = "insider", "mallory"
CLIENTS = ("a", "b", MALLORY, INSIDER)
Packet = tuple[str, bytes]


@pytest.fixture(scope="session")
def papers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of ``pwff certs``, with keys for all but those who have no business here."""
    folder = tmp_path_factory.mktemp("papers")
    made = Credentials(folder, days=30)
    made.broker(["localhost", HOST], 8883, "@FOLDER@", "@DATA@", denials=True)
    keys = made.aggregator(RUN)
    for client in CLIENTS:
        made.client(client, keys if client in ("a", "b") else None)
    with (folder / "broker" / "acl").open("a") as rules:
        rules.write(f"\nuser {INSIDER}\ntopic readwrite pwff/#\n")
    return folder


@pytest.fixture(scope="session")
def other_papers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return what another authority made, for the same names."""
    folder = tmp_path_factory.mktemp("other")
    made = Credentials(folder, days=30)
    made.broker(["localhost", HOST], 8883, "@FOLDER@", "@DATA@")
    made.client("a", made.aggregator(RUN))
    return folder


def access_of(papers: Path, name: str) -> BrokerAccess:
    """Return how the aggregator or a device reaches the broker."""
    place = papers / (name if name == AGGREGATOR else f"clients/{name}")
    return BrokerAccess(
        ca=place / "ca.pem", certificate=place / f"{name}.pem", private_key=place / f"{name}.key"
    )


class Mosquitto:
    """A broker with the generated configuration, started and stopped by a test.

    Attributes:
        url: ``mqtts://localhost:PORT``.
        log: What it says.
    """

    def __init__(self, papers: Path, place: Path) -> None:
        port = free_port()
        self.url = f"mqtts://localhost:{port}"
        self.log = place / "broker.log"
        self.folder = place / "broker"
        shutil.copytree(papers / "broker", self.folder)
        (place / "data").mkdir()
        text = (self.folder / "mosquitto.conf").read_text()
        text = text.replace("@FOLDER@", str(self.folder)).replace("@DATA@", str(place / "data"))
        text = text.replace("listener 8883", f"listener {port} {HOST}")
        if os.geteuid() == 0:
            text += "user root\n"  # the test's folders are root's alone
        self._config = self.folder / "mosquitto.conf"
        self._config.write_text(text)
        self._port = port
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start, and return once it listens."""
        command = [find_mosquitto() or "mosquitto", "-c", str(self._config)]
        with self.log.open("ab") as out:
            self._process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + LIMIT
        while time.monotonic() < deadline and self._process.poll() is None:
            with socket.socket() as probe:
                if probe.connect_ex((HOST, self._port)) == 0:
                    return
        raise AssertionError(f"mosquitto did not start: {self.log.read_text()}")

    def stop(self) -> None:
        """Stop."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait(LIMIT)
            self._process = None


@pytest.fixture
def broker(papers: Path, tmp_path: Path) -> Iterator[Mosquitto]:
    """Yield a running mosquitto with TLS, as ``pwff certs`` configures it."""
    if find_mosquitto() is None:
        pytest.skip("mosquitto is not installed: apt-get install mosquitto")
    place = tmp_path / "mosquitto"
    place.mkdir()
    broker = Mosquitto(papers, place)
    broker.start()
    yield broker
    broker.stop()


class Peer:
    """A bare connection: publishes anything it likes, and keeps what it hears."""

    def __init__(self, url: str, access: BrokerAccess, name: str, *filters: str) -> None:
        self.heard: queue.Queue[Packet] = queue.Queue()
        self._ready = threading.Event()
        self.transport: Transport = MqttNetwork(url, access).open(
            client_id=name,
            filters=list(filters),
            deliver=lambda topic, payload: self.heard.put((topic, payload)),
            connected=self._ready.set,
        )

    def __enter__(self) -> Peer:
        self.transport.start()
        assert self._ready.wait(LIMIT), "the broker did not let the peer in"
        return self

    def __exit__(self, *_: object) -> None:
        self.transport.close()

    def say(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """Publish."""
        self.transport.publish(topic, payload, retain=retain)

    def wait_for(self, pattern: str, wanted: Callable[[bytes], bool] = bool) -> Packet:
        """Return the next packet on a topic like ``pattern`` that is ``wanted``."""
        while True:
            topic, payload = self.heard.get(timeout=LIMIT)
            if matches(pattern, topic) and wanted(payload):
                return topic, payload


def seal_of(keys: DeviceKeys, ledger: Ledger) -> DeviceSeal:
    """Return a device's side of a session."""
    return DeviceSeal(
        run=keys.run,
        client=keys.client,
        key=keys.key,
        verify_key=keys.verify_key,
        session=secrets.token_hex(8),
        epoch=ledger.epoch,
        highest=ledger.highest,
    )


@dataclass
class Site:
    """A run's aggregator and devices on the broker, sealed, each on a thread of its own."""

    papers: Path
    broker: Mosquitto
    folder: Path
    events: Events = field(default_factory=Events)
    metrics: Metrics = field(default_factory=lambda: Metrics(RUN, "pwff"))
    record: Any = None
    errors: list[BaseException] = field(default_factory=list)
    stack: ExitStack = field(default_factory=ExitStack)

    @property
    def keys(self) -> RunKeys:
        """The run's."""
        keys = run_keys(self.papers / AGGREGATOR / f"{RUN}.keys.toml", RUN, {})
        assert keys is not None
        return keys

    def tell(self, event: str, **fields: Any) -> None:
        """Take an event of the run."""
        self.metrics(event, **fields)
        self.events(event, **fields)

    def aggregator(
        self, *, door: DoorLimits | None = None, **changes: Any
    ) -> tuple[Aggregator, threading.Thread]:
        """Start the aggregator."""
        rules = RoundRules(quorum=1.0, deadline_seconds=1000.0)
        fields = {"clients": 2, "minimum_clients": 2, "virtual_time": False, "rules": rules}
        network = MqttNetwork(self.broker.url, access_of(self.papers, AGGREGATOR))
        folder = RunFolder(self.folder)
        store = Store(self.folder, RUN)
        server = Aggregator(
            settings_of(**{**fields, **changes}),
            record_of() if self.record is None else self.record,
            folder,
            CountedNetwork(network, self.metrics),
            notify=self.tell,
            memory=lambda: 1,
            keys=self.keys,
            store=store,
            door=door,
        )

        def run() -> None:
            with store:
                self.record = server.run()

        return server, self._start(run, server.stop)

    def device(self, client: str, teacher: Teacher | None = None) -> Host:
        """Start a device."""
        path = self.papers / "clients" / client / f"{RUN}.key.toml"
        keys = device_keys(path, RUN, client, {})
        assert keys is not None
        ledger = Ledger(self.folder / "devices" / client)
        host = Host(
            MqttNetwork(self.broker.url, access_of(self.papers, client)),
            [teacher or Teacher(client, 2.0)],
            binding=BINDING,
            seals={client: seal_of(keys, ledger)},
            ledgers={client: ledger},
        )
        self._start(host.run, host.stop)
        return host

    def peer(self, client: str, *filters: str) -> Peer:
        """Connect somebody with a certificate of the authority."""
        access = access_of(self.papers, client)
        return self.stack.enter_context(Peer(self.broker.url, access, client, *filters))

    def rejects(self, code: str) -> float:
        """Return what the metrics count as refused for a reason."""
        for family in text_string_to_metric_families(self.metrics.page().decode()):
            for sample in family.samples:
                if sample.name == "pwff_rejects_total" and sample.labels["code"] == code:
                    return sample.value
        raise AssertionError(f"no metric for '{code}'")

    def refused(self, code: str, **fields: Any) -> None:
        """Wait until something was refused for a reason, and see that it is counted."""
        self.events.wait_for("refused", code=code, **fields)
        assert self.rejects(code) >= 1

    def _start(self, run: Callable[[], object], stop: Callable[[], None]) -> threading.Thread:
        def guarded() -> None:
            try:
                run()
            except BaseException as err:
                self.errors.append(err)

        thread = threading.Thread(target=guarded, daemon=True)
        thread.start()
        self.stack.callback(join, thread)
        self.stack.callback(stop)
        return thread


@contextmanager
def _site(papers: Path, broker: Mosquitto, folder: Path) -> Iterator[Site]:
    site = Site(papers, broker, folder)
    with site.stack:
        yield site
    if site.errors:
        raise site.errors[0]


@pytest.fixture
def site(papers: Path, broker: Mosquitto, tmp_path: Path) -> Iterator[Site]:
    """Yield a run that has not begun."""
    with _site(papers, broker, tmp_path / "run") as site:
        yield site
