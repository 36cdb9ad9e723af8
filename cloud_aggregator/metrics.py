"""A run's Prometheus metrics, fed by the events that the aggregator tells.

Seconds, bytes, counts. Every label comes from a short list of words (stages, verdicts, codes,
states), so that neither a large fleet nor a hostile device makes the number of series grow. A run
has a registry of its own; nothing is global.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    ProcessCollector,
    generate_latest,
)

from cloud_aggregator.broker_log import REASONS, BrokerLog
from messaging.chunks import MAGIC
from messaging.transport import (
    Connected,
    Deliver,
    Network,
    Transport,
    Will,
    is_connected,
    largest_packet,
)

#: Codes of refusals; what is refused with any other word is counted as ``other``.
CODES = frozenset(
    (
        "base", "bitmap", "chunk", "codec", "disk", "dtype", "examples", "finite", "format",
        "grant", "hash", "identity", "late", "layout", "mac", "name", "norm", "private", "range",
        "rate", "replay", "room", "round", "run", "schema", "session", "shape", "size", "stale",
        "state", "url", "version",
    )
)  # fmt: skip
STATES = ("online", "training", "uploaded", "gone")
STAGES = ("instruction", "reward", "alignment")
VERDICTS = ("accepted", "taken", "late", "stale", "duplicate", "stranger")

_UPLOAD_SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_ROUND_SECONDS = (1, 5, 15, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 21600)


class Metrics:
    """What a run's events come to; call it with each of them.

    Args:
        run: The run's name; ``method`` is its method.
        clock: Monotonic seconds, for what passes between two events.
    """

    def __init__(self, run: str, method: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._states: dict[str, str] = {}
        self._asked: set[str] = set()  # to train in this round
        self._uploaded: set[str] = set()  # in this round
        self._granted: dict[str, float] = {}  # when
        registry = self.registry = CollectorRegistry()
        counter = partial(Counter, registry=registry)
        gauge = partial(Gauge, registry=registry)
        histogram = partial(Histogram, registry=registry)
        ProcessCollector(registry=registry)
        Info("pwff_run", "The run.", registry=registry).info({"run": run, "method": method})
        self._rounds = counter("pwff_rounds", "Rounds done.", ["stage", "outcome"])
        self._round = gauge("pwff_round", "The round at hand.")
        self._round_seconds = histogram(
            "pwff_round_duration_seconds",
            "Of a round, on this machine's clock.",
            ["stage"],
            buckets=_ROUND_SECONDS,
        )
        self._round_clients = gauge("pwff_round_clients", "Clients of the last round.")
        self._round_accepted = gauge("pwff_round_accepted", "Updates that counted in it.")
        self._loss = gauge("pwff_eval_loss", "Held-out loss, nats.", ["stage"])
        self._accuracy = gauge("pwff_eval_accuracy", "Held-out accuracy.", ["stage"])
        self._updates = counter("pwff_updates", "Updates that came whole.", ["verdict"])
        self._update_bytes = counter("pwff_update_bytes", "Of those updates, each once.")
        self._again_bytes = counter("pwff_retransmitted_bytes", "Of chunks that came again.")
        self._upload_seconds = histogram(
            "pwff_upload_duration_seconds",
            "From the first grant to the verified update.",
            buckets=_UPLOAD_SECONDS,
        )
        self._rejects = counter("pwff_rejects", "What was refused.", ["code"])
        self._turned_away = counter(
            "pwff_broker_refusals", "What the broker turned away, by its log.", ["reason"]
        )
        self._before_page: list[Callable[[], None]] = []
        self._clients = gauge("pwff_clients", "Devices that were ever there.", ["state"])
        self._traffic = counter(
            "pwff_traffic_bytes", "Payloads through the broker.", ["direction", "kind"]
        )
        self._queues = gauge("pwff_queue_length", "What waits.", ["queue"])
        self._connections = counter("pwff_connections", "To the broker, later ones too.")
        self._show_all_from_the_beginning()

    def _show_all_from_the_beginning(self) -> None:
        """Make every series exist: a rate over one that begins at 1 would miss the first."""
        for state in STATES:
            self._clients.labels(state)
        for code in (*CODES, "other"):
            self._rejects.labels(code)
        for reason in REASONS:
            self._turned_away.labels(reason)
        for verdict in VERDICTS:
            self._updates.labels(verdict)
        for direction in ("up", "down"):
            for kind in ("data", "control"):
                self._traffic.labels(direction, kind)
        for stage in STAGES:
            self._round_seconds.labels(stage)
            for outcome in ("kept", "taken-back"):
                self._rounds.labels(stage, outcome)

    def __call__(self, event: str, **fields: Any) -> None:
        """Take one event of the run; what no metric counts is left."""
        handler = getattr(self, f"_on_{event}", None)
        if handler is not None:
            handler(**fields)

    def page(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        for read in self._before_page:
            read()
        return generate_latest(self.registry)

    def watch_broker(self, log: Path) -> None:
        """Count whom the broker turns away from now on, by what it writes to its log.

        Raises:
            InputError: If the log cannot be read.
        """
        found = BrokerLog(log, lambda reason, count: self._turned_away.labels(reason).inc(count))
        self._before_page.append(found.read)

    def watch_queue(self, name: str, length: Callable[[], float]) -> None:
        """Show how long a queue is, asked whenever the page is."""
        self._queues.labels(name).set_function(length)

    def transported(self, direction: str, payload: bytes) -> None:
        """Count a payload that went ``up`` or ``down``; chunks are told by how they begin."""
        kind = "data" if payload.startswith(MAGIC) else "control"
        self._traffic.labels(direction, kind).inc(len(payload))

    def connected(self) -> None:
        """Count a connection to the broker."""
        self._connections.inc()

    # -- events ----------------------------------------------------------------------------------

    def _on_hello(self, client: str, online: bool, **_fields: Any) -> None:
        if online:
            self._place(client)
        else:
            self._on_gone(client)

    def _on_gone(self, client: str, **_fields: Any) -> None:
        if client in self._states:
            self._move(client, "gone")
            self._granted.pop(client, None)

    def _on_task(
        self, work: str, round: int, clients: Iterable[str], more: bool = False, **_fields: Any
    ) -> None:
        self._round.set(round)
        if more:  # in the place of some that vanished; the others are at work
            self._asked |= set(clients)
            for client in clients:
                self._place(client)
            return
        affected = self._asked | self._uploaded
        self._uploaded.clear()
        self._granted.clear()
        self._asked = set(clients) if work == "train" else set()
        for client in affected | self._asked:
            if self._states.get(client, "gone") != "gone":
                self._place(client)

    def _on_granted(self, client: str, **_fields: Any) -> None:
        self._granted.setdefault(client, self._clock())

    def _on_update(self, client: str, verdict: str, bytes: int, **_fields: Any) -> None:
        self._updates.labels(verdict if verdict in VERDICTS else "other").inc()
        self._update_bytes.inc(bytes)
        began = self._granted.pop(client, None)
        if began is not None:
            self._upload_seconds.observe(self._clock() - began)
        self._uploaded.add(client)
        if self._states.get(client, "gone") != "gone":
            self._place(client)

    def _on_stale(self, **_fields: Any) -> None:
        self._updates.labels("stale").inc()

    def _on_refused(self, code: str, count: int = 1, **_fields: Any) -> None:
        self._rejects.labels(code if code in CODES else "other").inc(count)

    def _on_before(self, stage: str, **figures: Any) -> None:
        self._show_figures(stage, figures)

    def _on_round(
        self,
        stage: str,
        accepted: int,
        clients: int,
        wall_seconds: float,
        *,
        taken_back: str | None = None,
        retransmitted_bytes: int = 0,
        **figures: Any,
    ) -> None:
        self._rounds.labels(stage, "taken-back" if taken_back else "kept").inc()
        self._round_seconds.labels(stage).observe(wall_seconds)
        self._round_clients.set(clients)
        self._round_accepted.set(accepted)
        self._again_bytes.inc(retransmitted_bytes)
        self._show_figures(stage, figures)

    def _show_figures(self, stage: str, figures: dict[str, Any]) -> None:
        for gauge, name in ((self._loss, "eval_loss"), (self._accuracy, "eval_accuracy")):
            if figures.get(name) is not None:
                gauge.labels(stage).set(figures[name])

    # -- devices ---------------------------------------------------------------------------------

    def _place(self, client: str) -> None:
        """Put a device that is there where its round has it."""
        if client in self._uploaded:
            self._move(client, "uploaded")
        else:
            self._move(client, "training" if client in self._asked else "online")

    def _move(self, client: str, state: str) -> None:
        before = self._states.get(client)
        if before is not None:
            self._clients.labels(before).dec()
        self._states[client] = state
        self._clients.labels(state).inc()


class CountedNetwork:
    """A network whose payloads and connections are counted; otherwise the one that it is given."""

    def __init__(self, network: Network, metrics: Metrics) -> None:
        self._network = network
        self._metrics = metrics

    def open(
        self,
        *,
        client_id: str,
        filters: list[str],
        deliver: Deliver,
        connected: Connected,
        will: Will | None = None,
    ) -> Transport:
        """Return a connection of the network, counted. ``up`` is what the aggregator receives."""
        metrics = self._metrics

        def arrived(topic: str, payload: bytes) -> None:
            metrics.transported("up", payload)
            deliver(topic, payload)

        def there() -> None:
            metrics.connected()
            connected()

        inner = self._network.open(
            client_id=client_id, filters=filters, deliver=arrived, connected=there, will=will
        )
        return _CountedTransport(inner, metrics)


class _CountedTransport:
    def __init__(self, inner: Transport, metrics: Metrics) -> None:
        self._inner = inner
        self._metrics = metrics
        self.start = inner.start
        self.close = inner.close

    @property
    def largest_packet(self) -> int | None:
        return largest_packet(self._inner)

    def is_connected(self) -> bool:
        return is_connected(self._inner)

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        self._metrics.transported("down", payload)
        self._inner.publish(topic, payload, retain=retain)
