"""The process behind ``Nursery``: it imports what workers need, and starts them as it is told.

On Linux a worker is a fork of it: it is there at once, and libraries, data and base, which it only
reads, are in memory once for all workers. Elsewhere a fork of a process with torch in it is not
safe, and a worker is a fresh process.

Orders come on standard input and what becomes of them goes to standard output, a JSON object a
line: ``{"start": 0, "spec": ..., "log": ..., "environment": {...}}`` and ``{"signal": 0, "signum":
15}``; ``{"number": 0, "pid": ...}`` and ``{"number": 0, "code": ...}``. When its input closes it
leaves, and so do the workers, whose own input it holds.
"""

from __future__ import annotations

import gc
import json
import os
import selectors
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

from cloud_aggregator.emulation.fleet import WorkerSpec
from cloud_aggregator.emulation.worker import Stock, work
from device_profiles.errors import InputError
from quantization.base_model import set_threads

_FORKS = sys.platform == "linux"


class _Process:
    """Starts workers, one loop of one thread: what forks must have no other."""

    def __init__(self) -> None:
        self._stock = Stock()
        self._numbers: dict[int, int] = {}  # by process id
        # One that was let go of would be waited for by the next, and its end never told.
        self._spawned: dict[int, subprocess.Popen[bytes]] = {}
        self._input, self._life = os.pipe()  # workers read the one until the other closes
        self._woken, self._wakes = os.pipe()
        for end in (self._woken, self._wakes):
            os.set_blocking(end, False)
        signal.set_wakeup_fd(self._wakes)
        signal.signal(signal.SIGCHLD, lambda _signal, _frame: None)
        for ignored in (signal.SIGINT, signal.SIGTERM):  # it leaves when its input closes
            signal.signal(ignored, signal.SIG_IGN)

    def run(self) -> None:
        """Follow orders until there can be no more."""
        unfinished = b""
        with selectors.DefaultSelector() as selector:
            selector.register(sys.stdin.fileno(), selectors.EVENT_READ)
            selector.register(self._woken, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select():
                    if key.fd == self._woken:
                        os.read(self._woken, 4096)
                        self._bury()
                        continue
                    read = os.read(key.fd, 65_536)
                    if not read:
                        return
                    *lines, unfinished = (unfinished + read).split(b"\n")
                    for line in lines:
                        self._follow(json.loads(line))

    def _follow(self, order: dict[str, Any]) -> None:
        if "start" in order:
            pid = self._fork(order) if _FORKS else self._spawn(order)
            self._numbers[pid] = order["start"]
            _say(number=order["start"], pid=pid)
            return
        for pid, number in self._numbers.items():  # those whose end was told are not among them
            if number == order["signal"]:
                os.kill(pid, order["signum"])

    def _bury(self) -> None:
        while self._numbers:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            code = os.waitstatus_to_exitcode(status)
            if pid in self._spawned:
                self._spawned.pop(pid).returncode = code
            _say(number=self._numbers.pop(pid), code=code)

    def _fork(self, order: dict[str, Any]) -> int:
        self._take_stock(order)
        gc.collect()
        gc.freeze()  # what the collector does not touch stays in memory once
        pid = os.fork()
        if pid:
            return pid
        code = 1
        try:
            signal.set_wakeup_fd(-1)
            for changed in (signal.SIGCHLD, signal.SIGTERM):
                signal.signal(changed, signal.SIG_DFL)
            for end in (self._life, self._woken, self._wakes):
                os.close(end)
            with Path(order["log"]).open("ab") as log:
                os.dup2(self._input, sys.stdin.fileno())
                for stream in (sys.stdout, sys.stderr):
                    os.dup2(log.fileno(), stream.fileno())
            os.environ.update(order["environment"])
            code = work(Path(order["spec"]), self._stock)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def _spawn(self, order: dict[str, Any]) -> int:
        command = [sys.executable, "-m", "cloud_aggregator.emulation.worker", order["spec"]]
        with Path(order["log"]).open("ab") as log:
            process = subprocess.Popen(
                command,
                stdin=self._input,
                stdout=log,
                stderr=log,
                env={**os.environ, **order["environment"]},
            )
        self._spawned[process.pid] = process
        return process.pid

    def _take_stock(self, order: dict[str, Any]) -> None:
        """Read what the worker needs, for all that come after it."""
        try:
            spec = WorkerSpec.model_validate_json(Path(order["spec"]).read_bytes())
            self._stock.take(spec)
        except (InputError, OSError, ValueError):
            return  # the worker meets it again, and says it in its log


def _say(**told: int) -> None:
    sys.stdout.write(json.dumps(told) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    set_threads(1)  # a pool of threads would not survive a fork
    _Process().run()
