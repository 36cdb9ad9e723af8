"""The aggregator as it is served, on the fault tests' base, as a program that tests watch."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from cloud_aggregator.server import Aggregator
from cloud_aggregator.service import serve
from cloud_aggregator.service_config import Service
from cloud_aggregator.store import Store
from tests.faults.base import ADAPTER_SIZE, CHUNK_BYTES, LORA_RANK, PLACEMENT, RUN
from tests.faults.processes import Line, on_terminate, set_calendar


def aggregate(
    line: Line,
    *,
    broker: str,
    base: Path,
    out: Path,
    clients: int,
    key: Path | None,
    clock: Callable[[], float] = time.monotonic,
    calendar_ahead: float = 0.0,
    **changes: Any,
) -> dict[str, Any]:
    """Serve the run to its end.

    Args:
        line: Told of every event of the run.
        broker: Its address.
        base: Folder of the run's base.
        out: The run's folder.
        clients: That the run waits for, all of them.
        key: The run's key file, where it seals its messages.
        clock: Monotonic seconds.
        calendar_ahead: Seconds by which the cloud's date is wrong.
        changes: Of the service's configuration.
    """
    set_calendar(calendar_ahead)
    settings: dict[str, Any] = {
        "run": RUN,
        "broker": broker,
        "out": out,
        "clients": clients,
        "minimum_clients": clients,
        "gather_seconds": 5.0,
        "model": str(base),
        "placement": PLACEMENT,
        "lora_rank": LORA_RANK,
        "adapter_size": ADAPTER_SIZE,
        "rounds": 2,
        "local_steps": 3,
        "learning_rate": 0.1,
        "max_length": 8,
        "codec": "int8",
        "chunk_bytes": CHUNK_BYTES,
        "quorum": 1.0,
        "deadline_seconds": 100_000.0,
        "evaluation_seconds": 100_000.0,
        "patience": 0,
        "seed": 7,
        "security": {} if key is None else {"keys": key},
    }

    def start(server: Aggregator) -> None:
        on_terminate(line, server.stop)
        line.tell("serving")

    record = serve(
        Service(**{**settings, **changes}), notify=line.tell, on_start=start, clock=clock
    )
    return {"status": record.status}


def open_store(line: Line, *, folder: Path) -> dict[str, Any]:
    """Open a run's store, and close it.

    Args:
        line: Told of each statement that has been done (``statement``).
        folder: Of the run.
    """

    def done(*_: object) -> None:
        line.tell("statement")

    sa.event.listen(sa.Engine, "after_cursor_execute", done)
    with Store(folder, RUN) as store:
        return {"epoch": store.epoch}
