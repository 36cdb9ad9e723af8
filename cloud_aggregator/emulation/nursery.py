"""Where workers of an emulated fleet come from: a process that is ready before they are needed.

It is started first and imports what a worker needs while the run is still being planned; it then
starts workers as it is told to (``cloud_aggregator.emulation.nursery_process``), and says when one
ends. This side of it loads no torch.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

#: Told the exit code of a worker that ended; none where the nursery itself did.
Ended = Callable[[int | None], None]


class Nursery:
    """The process that starts workers. Each has a number, which a later one may take over.

    Use it as a context: at its end every worker that is still there is told to leave.
    """

    command = (sys.executable, "-m", "cloud_aggregator.emulation.nursery_process")

    def __init__(self) -> None:
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as this is
        self._process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,  # closes with this process, and all of them leave
            stdout=subprocess.PIPE,
            stderr=self._said,
        )
        self._lock = threading.Lock()
        self._ended: dict[int, Ended] = {}
        self._pids: dict[int, int] = {}
        self._reader = threading.Thread(target=self._read, name="pwff-nursery", daemon=True)
        self._reader.start()

    def __enter__(self) -> Nursery:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pids(self) -> list[int]:
        """Process ids of the nursery and of the workers that are there."""
        return [self._process.pid, *self._pids.values()]

    def start(
        self, number: int, spec: Path, log: Path, environment: Mapping[str, str], ended: Ended
    ) -> None:
        """Start a worker; return at once.

        Args:
            number: That no worker has that is there.
            spec: File that describes it.
            log: File that what it says is added to.
            environment: Variables that it gets besides this process's.
            ended: Called on another thread when it has ended.
        """
        self._ended[number] = ended
        order = {"spec": str(spec), "log": str(log), "environment": dict(environment)}
        self._tell({"start": number, **order})
        if not self._reader.is_alive() and number in self._ended:
            self._ended.pop(number)(None)  # the reader was gone before it could say so

    def signal(self, number: int, signum: signal.Signals) -> None:
        """Send a signal to a worker, if it is there."""
        self._tell({"signal": number, "signum": int(signum)})

    def close(self) -> None:
        """Make the nursery leave, and its workers with it."""
        with self._lock, contextlib.suppress(OSError):
            if self._process.stdin is not None:
                self._process.stdin.close()
        self._process.wait()
        self._reader.join()
        self._said.close()

    def last_words(self) -> str:
        """Return the last line of what the nursery itself wrote to its standard error."""
        self._said.seek(0)
        lines = self._said.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"

    def _tell(self, order: Mapping[str, object]) -> None:
        line = (json.dumps(order) + "\n").encode()
        pipe = self._process.stdin
        with self._lock, contextlib.suppress(OSError, ValueError):  # it is gone: the reader says so
            if pipe is not None:
                pipe.write(line)
                pipe.flush()

    def _read(self) -> None:
        pipe = self._process.stdout
        for line in pipe or ():
            told = json.loads(line)
            if "pid" in told:
                self._pids[told["number"]] = told["pid"]
            else:
                self._pids.pop(told["number"], None)
                self._ended.pop(told["number"])(told["code"])
        if pipe is not None:
            pipe.close()
        self._pids.clear()
        while self._ended:
            self._ended.popitem()[1](None)


_early: list[Nursery] = []
_NEEDS_NONE = frozenset(
    {"-h", "--help", "--list", "memory", "--transport=memory", "ray", "--engine=ray"}
)


def prepare(arguments: Sequence[str]) -> None:
    """Start a nursery now, before anything of the command is imported, if it may want one.

    It ends with this process, whatever comes of the command.

    Args:
        arguments: Of ``pwff emulate``.
    """
    if not _early and _NEEDS_NONE.isdisjoint(arguments):
        _early.append(Nursery())


def take() -> Nursery:
    """Return the nursery that was started early, or one that is started now."""
    return _early.pop() if _early else Nursery()


def dismiss() -> None:
    """Make a nursery leave that was started early and is not needed."""
    while _early:
        _early.pop().close()
