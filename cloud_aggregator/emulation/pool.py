"""The workers of an emulated fleet: started, watched, started again when one dies, and stopped."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from cloud_aggregator.emulation.fleet import BROKER_VARIABLE, WorkerSpec
from cloud_aggregator.emulation.nursery import Nursery
from cloud_aggregator.emulation.seals import to_environment
from cloud_aggregator.errors import RunFailedError
from cloud_aggregator.run_folder import write_atomically
from device_profiles.errors import InputError
from messaging.key_files import RunKeys

log = logging.getLogger(__name__)

_RESTARTS = 3
_LEAVE_SECONDS = 60.0


@dataclass
class _Worker:
    number: int
    spec: Path
    log: Path
    restarts: int = 0
    over: threading.Event = field(default_factory=threading.Event)


class WorkerPool:
    """Worker processes.

    Args:
        nursery: Starts them.
        specs: One a worker.
        folder: Where their specifications and logs are written.
        broker: Its address.
        failed: Told when a worker cannot be kept alive.
        keys: Of the run, where it is sealed.
    """

    def __init__(
        self,
        nursery: Nursery,
        specs: list[WorkerSpec],
        folder: Path,
        *,
        broker: str,
        failed: Callable[[Exception], None],
        keys: RunKeys | None = None,
    ) -> None:
        self._nursery, self._failed = nursery, failed
        self._environment = {BROKER_VARIABLE: broker, **to_environment(keys)}
        self._lock = threading.RLock()
        self._stopping = False
        folder.mkdir(parents=True, exist_ok=True)
        self._workers = [
            _Worker(number, folder / f"{number}.json", folder / f"{number}.log")
            for number in range(len(specs))
        ]
        for worker, spec in zip(self._workers, specs, strict=True):
            write_atomically(worker.spec, spec.model_dump_json().encode())
            self._start(worker)

    def _start(self, worker: _Worker) -> None:
        self._nursery.start(
            worker.number,
            worker.spec,
            worker.log,
            self._environment,
            lambda code: self._ended(worker, code),
        )

    def _ended(self, worker: _Worker, code: int | None) -> None:
        with self._lock:
            problem = None if self._stopping or code == 0 else self._problem(worker, code)
            if problem is None and code and not self._stopping:
                worker.restarts += 1
                log.warning("a worker ended with %d and is started again", code)
                self._start(worker)
                return
            worker.over.set()
        if problem is not None:
            self._failed(problem)

    def _problem(self, worker: _Worker, code: int | None) -> Exception | None:
        """Return why a worker that ended is not started again; nothing if it is."""
        if code is None:
            return RunFailedError(f"the process that starts workers: {self._nursery.last_words()}")
        if code == InputError.exit_code:
            return InputError(_last_line(worker.log))
        if worker.restarts >= _RESTARTS:
            return RunFailedError(
                f"a worker ended with {code}: {_last_line(worker.log)} (log: {worker.log})"
            )
        return None

    def memory(self) -> int:
        """Return the bytes of this process, the nursery and the workers.

        What several of them share counts once where the system tells it apart (Linux).
        """
        total = 0
        for pid in [psutil.Process().pid, *self._nursery.pids]:
            try:
                found = psutil.Process(pid).memory_full_info()
            except psutil.Error:  # it ended, or is being started again
                continue
            total += getattr(found, "pss", found.rss)
        return total

    def close(self) -> None:
        """Ask every worker to leave, and see that it does."""
        with self._lock:
            self._stopping = True
        for signum in (signal.SIGTERM, signal.SIGKILL):
            for worker in self._workers:
                if not worker.over.is_set():
                    self._nursery.signal(worker.number, signum)
            gone = [worker.over.wait(_LEAVE_SECONDS) for worker in self._workers]
            if all(gone):
                return


def _last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").strip().splitlines() if path.exists() else []
    return lines[-1] if lines else "it said nothing"
