"""How far devices get with their tasks, and when a synchronous round ends: many at once.

Seconds count from when the devices were asked; joules in the order of ``devices.TASK_PARTS``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cloud_aggregator.simulation.devices import Tasks
from device_profiles.fading import Floats

Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Done:
    """What came of tasks.

    Attributes:
        seconds: Until the update was there, or the device was lost. Shape (n,).
        lost: Who left, ran out of energy, or sent an update that did not arrive. Shape (n,).
        joules: Spent until then. Shape (n, 4).
        received: Share of the downlink that was received. Shape (n,).
    """

    seconds: Floats
    lost: Flags
    joules: Floats
    received: Floats


def carry_out(tasks: Tasks, stays_seconds: Floats, joules_left: Floats) -> Done:
    """Return what comes of tasks of devices that leave, or whose batteries end.

    Args:
        tasks: What they would take.
        stays_seconds: How long each device stays, infinite if to the end. Shape (n,).
        joules_left: What each may spend, infinite on mains. Shape (n,).
    """
    ends = np.cumsum(tasks.seconds, axis=1)  # (n, 3)
    parts = np.column_stack((tasks.joules[:, :2], tasks.joules[:, 2:].sum(axis=1)))  # (n, 3)
    full = ends[:, -1]
    until = np.minimum(
        np.minimum(full, stays_seconds), _runs_out(tasks.seconds, parts, joules_left)
    )
    begins = ends - tasks.seconds
    share = np.ones_like(ends)  # of each activity that was done
    np.divide(until[:, None] - begins, tasks.seconds, out=share, where=tasks.seconds > 0)
    share = np.clip(share, 0.0, 1.0)
    share[until >= full] = 1.0
    return Done(
        seconds=until,
        lost=(until < full) | ~tasks.delivered,
        joules=tasks.joules * share[:, (0, 1, 2, 2)],
        received=share[:, 0],
    )


def closing_time(
    seconds: Floats, lost: Flags, *, needed: int, deadline_seconds: float
) -> tuple[float, Flags]:
    """Return when a round closes and which of its updates are accepted. (n,), (n,) -> (n,).

    What ``cloud_aggregator.rounds.TrainingRound`` says of the same arrivals, ties in the order of
    the devices, where a lost device counts as refused: nobody waits for it.

    Args:
        seconds: When each update arrived, or its device was lost.
        lost: Which of the two.
        needed: Updates that close the round.
        deadline_seconds: It closes then at the latest; may be infinite.
    """
    order = np.argsort(seconds, kind="stable")
    arrived = order[~lost[order]]
    closes = float(seconds[order[-1]]) if order.size else 0.0  # nobody is left to wait for
    if arrived.size >= needed:
        closes = float(seconds[arrived[needed - 1]])
    closes = min(closes, deadline_seconds)
    accepted = np.zeros(seconds.size, dtype=np.bool_)
    first = arrived[:needed]
    accepted[first[seconds[first] <= closes]] = True
    return closes, accepted


def waiting_joules(done: Done, closes: float, stays_seconds: Floats, idle_watts: Floats) -> Floats:
    """Return what devices take that wait for the end of their round. Shape (n,)."""
    until = np.minimum(closes, stays_seconds)
    waits = np.where(done.lost, 0.0, np.maximum(until - done.seconds, 0.0))
    return np.asarray(idle_watts * waits, dtype=np.float64)


def _runs_out(seconds: Floats, joules: Floats, left: Floats) -> Floats:
    """Return when the energy left is spent, infinite if it is enough. (n, 3), (n, 3), (n,)."""
    spent = np.cumsum(joules, axis=1)
    out = np.full(left.size, np.inf)
    for row in np.flatnonzero(spent[:, -1] > left):
        at = np.concatenate(([0.0], np.cumsum(seconds[row])))
        out[row] = np.interp(left[row], np.concatenate(([0.0], spent[row])), at)
    return out
