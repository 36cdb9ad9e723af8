"""The virtual clock: synchronous rounds, and an event queue for the modes without rounds.

Seconds of virtual time. Weights of stale updates, with staleness the number of aggregations since
an update's task was sent:

- ``fedbuff``: (1 + staleness)**-0.5. Source: Nguyen et al., Federated Learning with Buffered
  Asynchronous Aggregation, 2022. Deviation: places of devices that are done are filled at the next
  aggregation, not at once.
- ``fedasync``: alpha * (1 + staleness)**-a, its polynomial function. Source: Xie, Koyejo and Gupta,
  Asynchronous Federated Optimization, 2019. Deviation: places are filled by hundredths of the
  cohort.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cloud_aggregator.aggregation import asynchronous
from cloud_aggregator.simulation.asking import Asked, Asking
from cloud_aggregator.simulation.devices import TASK_PARTS, Devices, Tasks
from cloud_aggregator.simulation.result import (
    PARTS,
    Result,
    RoundRow,
    count_staleness,
    fairness,
)
from cloud_aggregator.simulation.settings import Simulation
from cloud_aggregator.simulation.work import Done, carry_out, closing_time, waiting_joules
from device_profiles.availability import Places
from device_profiles.errors import InputError
from device_profiles.fading import Floats

#: Told of ``asked`` (at, places), ``accepted`` (at, places) and ``row`` (row).
Notify = Callable[..., None]

#: Tasks in a row, without rounds, of which not one is done: nothing will come of the run.
MOST_IN_VAIN = 100_000

_MIXING, _FEDASYNC_EXPONENT = 0.6, 0.5
_FILLED_AT_ONCE = 100  # fedasync: this part of the cohort


def simulate(
    settings: Simulation, notify: Notify | None = None, devices: Devices | None = None
) -> Result:
    """Return what a run comes to; the same settings give the same result.

    Args:
        settings: Of the run.
        notify: Is told what happens, as it does.
        devices: The fleet; by default that of the settings.

    Raises:
        InputError: If the fleet or a setting of the trace does not fit, or no task is ever done.
    """
    run = _Run(settings, notify or _nobody, devices or Devices(settings))
    rows = run.synchronous() if settings.mode == "synchronous" else run.asynchronous()
    return Result(
        settings=settings,
        rounds=tuple(rows),
        fairness=fairness(run.asking.participations.astype(np.float64), run.bits, run.air),
        unfinished=run.unfinished,
    )


def staleness_weight(settings: Simulation, staleness: int) -> float:
    """Return what a stale update counts; 1 in synchronous rounds, where none is."""
    if settings.mode == "synchronous":
        return 1.0
    if settings.mode == "fedbuff":
        return asynchronous.staleness_weight(staleness)
    alpha = _MIXING if settings.mixing is None else settings.mixing
    exponent = settings.staleness_exponent
    exponent = _FEDASYNC_EXPONENT if exponent is None else exponent
    return float(alpha * (1 + staleness) ** -exponent)


@dataclass
class _Tally:
    """What a row has counted so far."""

    asked: int = 0
    lost: int = 0
    staleness: list[int] = field(default_factory=list)
    joules: Floats = field(default_factory=lambda: np.zeros(len(TASK_PARTS)))
    bytes_up: float = 0.0
    bytes_down: float = 0.0


@dataclass(frozen=True, kw_only=True)
class _Wave:
    """Devices that were asked together, what came of it, and at which version."""

    asked: Asked
    tasks: Tasks
    done: Done
    version: int


#: When it ends, place, number of the asking, and which task of it.
_Event = tuple[float, int, int, int, _Wave]


class _Run:
    def __init__(self, settings: Simulation, notify: Notify, devices: Devices) -> None:
        self.settings, self._notify, self.devices = settings, notify, devices
        self._trace = settings.trace(self.devices.capacity_joules)
        self.asking = Asking(settings, self.devices, self._trace)
        self.bits: Floats = np.zeros(settings.devices)
        self.air: Floats = np.zeros(settings.devices)
        self.unfinished = 0
        self._askings = 0

    def synchronous(self) -> list[RoundRow]:
        settings, rows, now = self.settings, list[RoundRow](), 0.0
        for number in range(1, settings.rounds + 1):
            began = now
            wave = self._send(settings.asked, now)
            places, done = wave.asked.places, wave.done
            closes, accepted = closing_time(
                done.seconds,
                done.lost,
                needed=settings.rules.needed(min(settings.cohort, places.size)),
                deadline_seconds=settings.rules.deadline_seconds,
            )
            now = wave.asked.at + closes
            self._accept(places[accepted], wave.tasks.seconds[accepted, 2], now)
            stays = wave.asked.ends - wave.asked.at
            idle = waiting_joules(done, closes, stays, self.devices.idle_watts(places))
            kind = self.devices.kind[places]
            joules = dict(zip(TASK_PARTS, done.joules.sum(axis=0).tolist(), strict=True))
            joules["idle"] = float(idle.sum())
            count = int(accepted.sum())
            lost = int(done.lost.sum())
            rows.append(
                RoundRow(
                    number=number,
                    ended_at=now,
                    seconds=now - began,
                    asked=places.size,
                    accepted=count,
                    late=places.size - count - lost,
                    lost=lost,
                    staleness=count_staleness([0] * count),
                    mean_staleness=0.0,
                    most_staleness=0,
                    mean_weight=1.0 if count else 0.0,
                    joules={part: joules[part] for part in PARTS},
                    bytes_up=float(self.devices.bits_up[kind[~done.lost]].sum()) / 8,
                    bytes_down=float(self.devices.bits_down[kind] @ done.received) / 8,
                )
            )
            self._notify("row", row=rows[-1])
        return rows

    def asynchronous(self) -> list[RoundRow]:
        settings, rows, tally = self.settings, list[RoundRow](), _Tally()
        queue: list[_Event] = []  # by time, then by place
        buffer: list[tuple[_Wave, int]] = []
        now, version, updates, due = 0.0, 0, 0, True
        in_vain = 0  # tasks that were lost since the last that was not
        aggregations = settings.cohort if settings.mode == "fedasync" else 1  # a row
        at_once = max(1, settings.cohort // _FILLED_AT_ONCE) if settings.mode == "fedasync" else 1
        while len(rows) < settings.rounds:
            short = len(queue) + len(buffer) < settings.buffer
            free = settings.cohort - len(queue)
            if short or (due and free >= at_once):
                now, due = self._fill(queue, free, now, version, tally, must=not queue), False
            now, place, _, row, wave = heapq.heappop(queue)
            tally.joules += wave.done.joules[row]
            kind = self.devices.kind[place]
            tally.bytes_down += float(self.devices.bits_down[kind] * wave.done.received[row]) / 8
            if wave.done.lost[row]:
                tally.lost += 1
                in_vain += 1
                if in_vain >= MOST_IN_VAIN:
                    raise _hopeless(in_vain)
                continue
            in_vain = 0
            tally.bytes_up += float(self.devices.bits_up[kind]) / 8
            buffer.append((wave, row))
            if len(buffer) < settings.buffer:
                continue
            places = np.array([w.asked.places[r] for w, r in buffer], dtype=np.int64)
            self._accept(places, np.array([w.tasks.seconds[r, 2] for w, r in buffer]), now)
            tally.staleness += [version - w.version for w, _ in buffer]
            buffer.clear()
            version, updates, due = version + 1, updates + 1, True
            if updates == aggregations:
                rows.append(self._row(tally, now, rows))
                self._notify("row", row=rows[-1])
                tally, updates = _Tally(), 0
        self.unfinished = len(queue)
        return rows

    def _fill(
        self,
        queue: list[_Event],
        free: int,
        now: float,
        version: int,
        tally: _Tally,
        *,
        must: bool,
    ) -> float:
        """Ask for free places; if it ``must``, wait for somebody. Return when that was."""
        wave = self._send(free, now, version) if must else self._try(free, now, version)
        if wave is None:
            return now
        tally.asked += wave.asked.places.size
        ends = wave.asked.at + wave.done.seconds
        for row, (place, end) in enumerate(
            zip(wave.asked.places.tolist(), ends.tolist(), strict=True)
        ):
            heapq.heappush(queue, (end, place, self._askings, row, wave))
        return wave.asked.at

    def _row(self, tally: _Tally, now: float, rows: list[RoundRow]) -> RoundRow:
        joules = dict(zip(TASK_PARTS, tally.joules.tolist(), strict=True)) | {"idle": 0.0}
        weights = [staleness_weight(self.settings, one) for one in tally.staleness]
        return RoundRow(
            number=len(rows) + 1,
            ended_at=now,
            seconds=now - (rows[-1].ended_at if rows else 0.0),
            asked=tally.asked,
            accepted=len(tally.staleness),
            late=0,
            lost=tally.lost,
            staleness=count_staleness(tally.staleness),
            mean_staleness=sum(tally.staleness) / len(tally.staleness),
            most_staleness=max(tally.staleness),
            mean_weight=sum(weights) / len(weights),
            joules={part: joules[part] for part in PARTS},
            bytes_up=tally.bytes_up,
            bytes_down=tally.bytes_down,
        )

    def _send(self, wanted: int, at: float, version: int = 0) -> _Wave:
        """Ask devices, as soon as somebody is there and free."""
        wave = self._try(wanted, at, version)
        while wave is None:
            at = self.asking.somebody_at(at)
            wave = self._try(wanted, at, version)
        return wave

    def _try(self, wanted: int, at: float, version: int) -> _Wave | None:
        """Ask devices, if somebody is there and free at ``at``."""
        number = self._askings + 1
        asked = self.asking.ask(wanted, at, number)
        places = asked.places
        if not places.size:
            return None
        self._askings = number
        tasks = self.devices.tasks(places, number)
        done = carry_out(tasks, asked.ends - at, self._trace.joules_left(places, at))
        self._trace.spend(places, done.joules.sum(axis=1), at)
        self.asking.busy_until[places] = at + done.seconds
        self._notify("asked", at=at, places=places)
        return _Wave(asked=asked, tasks=tasks, done=done, version=version)

    def _accept(self, places: Places, air_seconds: Floats, at: float) -> None:
        np.add.at(self.asking.participations, places, 1)
        np.add.at(self.bits, places, self.devices.bits_up[self.devices.kind[places]])
        np.add.at(self.air, places, air_seconds)
        self._notify("accepted", at=at, places=places)


def _hopeless(tasks: int) -> InputError:
    return InputError(
        f"{tasks} tasks in a row were lost: devices leave, or their batteries end, before a task "
        "does; give fewer local_steps, or a trace in which devices stay longer"
    )


def _nobody(event: str, **fields: Any) -> None:
    """Listen to nothing."""
    del event, fields
