"""The workers of an emulated fleet: started, watched, started again when one dies, and stopped."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from cloud_aggregator.emulation.fleet import BROKER_VARIABLE, WorkerSpec
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
    command: list[str]
    environment: dict[str, str]
    log_path: Path
    process: subprocess.Popen[bytes]
    restarts: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


class WorkerPool:
    """Worker processes.

    Args:
        specs: One a worker.
        broker: Its address.
        folder: Where their specifications and logs are written.
        failed: Told when a worker cannot be kept alive.
        keys: Of the run, where it is sealed.
    """

    def __init__(
        self,
        specs: list[WorkerSpec],
        broker: str,
        folder: Path,
        failed: Callable[[Exception], None],
        keys: RunKeys | None = None,
    ) -> None:
        self._failed = failed
        environment = {**os.environ, BROKER_VARIABLE: broker, **to_environment(keys)}
        self._stopping = threading.Event()
        self._workers: list[_Worker] = []
        self._watchers: list[threading.Thread] = []
        folder.mkdir(parents=True, exist_ok=True)
        for number, spec in enumerate(specs):
            path = folder / f"{number}.json"
            write_atomically(path, spec.model_dump_json().encode())
            command = [sys.executable, "-m", "cloud_aggregator.emulation.worker", str(path)]
            log_path = folder / f"{number}.log"
            process = _start(command, environment, log_path)
            self._workers.append(_Worker(command, environment, log_path, process))
        for worker in self._workers:
            watcher = threading.Thread(target=self._watch, args=(worker,), daemon=True)
            watcher.start()
            self._watchers.append(watcher)

    def _watch(self, worker: _Worker) -> None:
        while True:
            code = worker.process.wait()
            with worker.lock:
                if self._stopping.is_set() or code == 0:
                    return
                if code == InputError.exit_code:
                    self._failed(InputError(_last_line(worker.log_path)))
                    return
                if worker.restarts >= _RESTARTS:
                    self._failed(
                        RunFailedError(
                            f"a worker ended with {code}: {_last_line(worker.log_path)} "
                            f"(log: {worker.log_path})"
                        )
                    )
                    return
                worker.restarts += 1
                _let_go(worker.process)
                log.warning("a worker ended with %d and is started again", code)
                worker.process = _start(worker.command, worker.environment, worker.log_path)

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers."""
        return [w.process.pid for w in self._workers]

    def memory(self) -> int:
        """Return the resident bytes of this process and its workers."""
        total = 0
        for pid in [psutil.Process().pid, *self.pids]:
            try:
                total += psutil.Process(pid).memory_info().rss
            except psutil.NoSuchProcess:  # it ended, or is being started again
                continue
        return total

    def close(self) -> None:
        """Ask every worker to leave, and see that it does."""
        self._stopping.set()
        for worker in self._workers:
            with worker.lock:
                worker.process.terminate()
        for worker in self._workers:
            try:
                worker.process.wait(_LEAVE_SECONDS)
            except subprocess.TimeoutExpired:
                worker.process.kill()
                worker.process.wait()
            _let_go(worker.process)
        for watcher in self._watchers:
            watcher.join()


def _start(
    command: list[str], environment: dict[str, str], log_path: Path
) -> subprocess.Popen[bytes]:
    with log_path.open("ab") as log_file:
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,  # closes with this process, and the worker leaves
            stdout=log_file,
            stderr=subprocess.STDOUT,
            env=environment,
        )


def _let_go(process: subprocess.Popen[bytes]) -> None:
    if process.stdin is not None:
        process.stdin.close()


def _last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it said nothing"
