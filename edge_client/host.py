"""A process that hosts devices: one real client, or the emulated clients of a worker.

One inbox, one thread for the protocol (the caller's), and one for the work (more where the work is
done elsewhere), so that grants are answered while another client trains. Every client has a
transport of its own; a global state comes once for all of them and is in memory once.
"""

from __future__ import annotations

import io
import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from device_profiles import logs
from device_profiles.errors import InputError
from edge_client.agent import Agent
from edge_client.arrivals import Arrivals
from edge_client.freed_memory import FreedMemory
from edge_client.ledger import Ledger
from edge_client.local_client import Performer, Result
from edge_client.outbox import Outbox
from edge_client.progress import StoppedError
from messaging import topics
from messaging.claims import Claims
from messaging.errors import ProtocolError
from messaging.protocol import StateRef, Task
from messaging.security import DeviceSeal
from messaging.transport import Network, Transport, Will, largest_packet

log = logging.getLogger(__name__)

_TICK_SECONDS = 1.0
_ALIVE_SECONDS = 10.0

Event = tuple[Callable[..., None], tuple[object, ...]]


@dataclass
class _Seat:
    agent: Agent
    transport: Transport


def _place(agent: Agent) -> dict[str, str | int]:
    """Return what log lines about an agent carry."""
    place: dict[str, str | int] = {"run": agent.run, "client": agent.id}
    if agent.task is not None:
        place["round"] = agent.task.round
    return place


def _say_goodbye(seat: _Seat) -> None:
    agent = seat.agent
    seat.transport.publish(
        topics.state(agent.run, agent.id), agent.hello(online=False), retain=True
    )


class Host:
    """Agents and their connections.

    Args:
        network: Opens the connections.
        performers: One for each client.
        binding: Hash of base, tokenizer and placement.
        clock: Monotonic seconds; the date is of no use to a host.
        seals: By client, where messages are sealed.
        ledgers: By client: its starts, counted on its disk.
        outboxes: By client: keeps the update that it owes, on its disk.
        heartbeat_seconds: Between two signs of life of a client; none gives none.
        isolates: Whether a client whose input is bad leaves alone, with its sentence, and the
            others go on; otherwise, and where it is the only one, the host ends with the error.
        claims: Where large updates are put and large global states lie; without it, both travel in
            chunks.
        interrupt: Called when the host is to leave, so that work that is under way stops soon.
        alive_file: Touched every ten seconds while the host goes round.
        work_threads: Clients that work at once; 1 where they share a model.
        keeps_results: Whether updates stay in memory after they have arrived (see ``Agent``).
    """

    def __init__(
        self,
        network: Network,
        performers: Sequence[Performer],
        *,
        binding: str,
        clock: Callable[[], float] = time.monotonic,
        seals: Mapping[str, DeviceSeal] | None = None,
        ledgers: Mapping[str, Ledger] | None = None,
        outboxes: Mapping[str, Outbox] | None = None,
        heartbeat_seconds: float | None = None,
        isolates: bool = False,
        interrupt: Callable[[], None] = lambda: None,
        claims: Claims | None = None,
        alive_file: Path | None = None,
        work_threads: int = 1,
        keeps_results: bool = True,
    ) -> None:
        self._claims = claims
        self._alive_file, self._alive_at = alive_file, -_ALIVE_SECONDS
        self._clock = clock
        self._seals, self._ledgers, self._outboxes = seals or {}, ledgers or {}, outboxes or {}
        self._heartbeat, self._isolates, self._interrupt = heartbeat_seconds, isolates, interrupt
        # A simple queue: a signal handler may put while this thread gets.
        self._inbox: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._keeps_results = keeps_results
        self._work = ThreadPoolExecutor(work_threads, thread_name_prefix="pwff-work")
        self._fetch = ThreadPoolExecutor(max_workers=1, thread_name_prefix="pwff-fetch")
        self._arrivals = Arrivals()
        self._freed = FreedMemory()
        self._stop = threading.Event()
        self._failure: BaseException | None = None
        self._seats = [self._seat(network, performer, binding) for performer in performers]

    def _seat(self, network: Network, performer: Performer, binding: str) -> _Seat:
        seats: list[_Seat] = []  # the agent publishes through a transport that is made after it

        def publish(topic: str, payload: bytes, retain: bool) -> None:
            seats[0].transport.publish(topic, payload, retain=retain)

        def spread(seconds: float) -> None:
            narrow: Callable[[float], None] | None
            narrow = getattr(seats[0].transport, "spread", None)
            if narrow is not None:
                narrow(seconds)

        client = performer.device.id
        agent = Agent(
            performer,
            binding=binding,
            publish=publish,
            start_work=lambda function: self._submit(agent, function),
            seal=self._seals.get(client),
            ledger=self._ledgers.get(client),
            outbox=self._outboxes.get(client),
            heartbeat_seconds=self._heartbeat,
            spread=spread,
            largest_packet=lambda: largest_packet(seats[0].transport),
            claims=self._claims,
            start_fetch=lambda ref: self._start_fetch(agent, ref),
            arrivals=self._arrivals,
            keeps_results=self._keeps_results,
        )
        transport = network.open(
            client_id=f"pwff-{agent.run}-{agent.id}",
            filters=agent.filters,
            deliver=lambda *packet: self._inbox.put((self._received, (agent, *packet))),
            connected=lambda: self._inbox.put((self._connected, (agent,))),
            will=Will(
                topic=topics.state(agent.run, agent.id),
                payload=agent.hello(online=False, will=True),
            ),
        )
        seats.append(_Seat(agent, transport))
        return seats[0]

    def _received(self, agent: Agent, topic: str, payload: bytes) -> None:
        with logs.bound(**_place(agent)):
            agent.received(payload, self._clock(), topic=topic)

    def _connected(self, agent: Agent) -> None:
        with logs.bound(**_place(agent)):
            agent.connected(self._clock())

    def _submit(self, agent: Agent, function: Callable[[], Result]) -> None:
        task = agent.task

        def work() -> None:
            try:
                with logs.bound(**_place(agent)):
                    result = function()
            except StoppedError:
                return  # the host is leaving, and what was done so far is on the disk
            except InputError as err:
                self._inbox.put((self._gave_up, (agent, err)))
                return
            except BaseException as err:
                self._failure = err
                self._inbox.put(None)
                return
            else:
                self._inbox.put((self._worked, (agent, task, result)))
            finally:
                self._freed.end()

        self._freed.begin()
        self._work.submit(work)

    def _start_fetch(self, agent: Agent, ref: StateRef) -> None:
        claims = self._claims
        if claims is None or ref.url is None:
            raise ValueError(f"'{agent.id}' has no store to fetch from")
        url = ref.url

        def fetch() -> None:
            sink, blob = io.BytesIO(), None
            try:
                claims.store.fetch(url, sha256=ref.blob, size=ref.bytes, sink=sink)
                blob = sink.getvalue()
            except ProtocolError as err:
                log.warning("%s: %s; asking for its chunks", agent.id, err.reason)
            self._inbox.put((self._fetched, (agent, ref, blob)))

        self._fetch.submit(fetch)

    def _fetched(self, agent: Agent, ref: StateRef, blob: bytes | None) -> None:
        agent.fetched(ref, blob, self._clock())

    def _worked(self, agent: Agent, task: Task, result: Result) -> None:
        with logs.bound(**_place(agent)):
            agent.worked(task, result, self._clock())

    def _gave_up(self, agent: Agent, err: InputError) -> None:
        if not self._isolates or len(self._seats) == 1:
            raise err
        log.error("%s: %s; the other clients of this host go on", agent.id, err)
        agent.gave_up(str(err))
        seat = next(seat for seat in self._seats if seat.agent is agent)
        _say_goodbye(seat)

    def stop(self) -> None:
        """Make ``run`` leave in good order; callable from any thread or signal handler.

        Work under way stops at its next step, is put down where it can be taken up again, and is
        waited for; a store is not.
        """
        self._interrupt()
        self._leave_store()
        self._stop.set()
        self._inbox.put(None)

    def run(self) -> None:
        """Take part until every agent has finished, or ``stop`` is called.

        Raises:
            BaseException: Whatever a client's work raised.
        """
        next_tick = self._clock() + _TICK_SECONDS
        self._show_alive()
        try:
            for seat in self._seats:
                seat.transport.start()
            while not self._stop.is_set() and not all(s.agent.finished for s in self._seats):
                try:
                    event = self._inbox.get(timeout=max(0.0, next_tick - self._clock()))
                except queue.Empty:
                    event = None
                if self._failure is not None:
                    raise self._failure
                if event is not None:
                    function, arguments = event
                    function(*arguments)
                if self._clock() >= next_tick:
                    next_tick = self._clock() + _TICK_SECONDS
                    self._show_alive()
                    self._freed.tick()
                    for seat in self._seats:
                        with logs.bound(**_place(seat.agent)):
                            seat.agent.tick(self._clock())
        finally:
            self._leave()

    def _show_alive(self) -> None:
        now = self._clock()
        if self._alive_file is None or now - self._alive_at < _ALIVE_SECONDS:
            return
        self._alive_at = now
        try:
            self._alive_file.touch()
        except OSError as err:
            log.warning("cannot touch %s: %s", self._alive_file, err.strerror or err)

    def _leave_store(self) -> None:
        if self._claims is not None:
            self._claims.store.leave()

    def _leave(self) -> None:
        self._interrupt()
        self._leave_store()
        self._fetch.shutdown(wait=False, cancel_futures=True)
        self._work.shutdown(wait=True, cancel_futures=True)
        for seat in self._seats:
            _say_goodbye(seat)
            seat.transport.close()

    @property
    def failures(self) -> list[str]:
        """What made agents give up, one sentence each."""
        return [f"{s.agent.id}: {s.agent.failure}" for s in self._seats if s.agent.failure]

    @property
    def refused(self) -> Counter[str]:
        """Messages and chunks that agents refused, by code."""
        return sum((s.agent.refused for s in self._seats), Counter())
