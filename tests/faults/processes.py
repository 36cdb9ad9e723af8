"""Programs of a run as processes of their own, which a test watches, holds at a point, and kills.

A program tells what happens to it over a pipe. Where it is asked to be held, it stops there, in
the middle of its work, until it is let go or killed: a kill meets the state that the test names,
whatever the machine's speed. Processes are forked from a server that has imported everything, so
one starts in milliseconds; each dies by a real signal.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

LIMIT = 30.0  # seconds after which a test gives up
PRELOADED = ["tests.faults.cloud", "tests.faults.device"]

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(PRELOADED)

Told = tuple[str, dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Hold:
    """Where a program stops: at the ``times``-th event that has these fields."""

    event: str
    fields: dict[str, Any]
    times: int = 1


def at(event: str, *, times: int = 1, **fields: Any) -> Hold:
    """Return the point at which an event with these fields has been told so many times."""
    return Hold(event=event, fields=fields, times=times)


def _fits(told: Told, event: str, fields: dict[str, Any]) -> bool:
    return told[0] == event and fields.items() <= told[1].items()


class Line:
    """A program's end of its pipe; several of its threads may tell."""

    def __init__(self, pipe: multiprocessing.connection.Connection, hold: Hold | None) -> None:
        self._pipe, self._hold = pipe, hold
        self._lock = threading.Lock()
        self._seen = 0

    def tell(self, event: str, **fields: Any) -> None:
        """Say what happens; stop here if this is where the program is held."""
        hold = self._hold
        with self._lock:
            with contextlib.suppress(BrokenPipeError):
                self._pipe.send((event, fields))
            if hold is None or not _fits((event, fields), hold.event, hold.fields):
                return
            self._seen += 1
            if self._seen != hold.times:
                return
            self._pipe.send(("held", {}))
        with contextlib.suppress(EOFError):
            self._pipe.recv()


def on_terminate(line: Line, stop: Callable[[], None]) -> None:
    """Make SIGTERM stop a program, and tell of it (``leaving``)."""

    def leave(*_: object) -> None:
        stop()
        # Whom the signal interrupts may be telling something just now.
        threading.Thread(target=line.tell, args=("leaving",), daemon=True).start()

    signal.signal(signal.SIGTERM, leave)


class _Said(logging.Handler):
    """Tells what a program logs from warnings on."""

    def __init__(self, line: Line) -> None:
        super().__init__(logging.WARNING)
        self._line = line

    def emit(self, record: logging.LogRecord) -> None:
        self._line.tell("log", level=record.levelname, said=record.getMessage())


#: What runs in a process, given a line and its options; returns what it has to say at its end.
Program = Callable[..., dict[str, Any]]


def _enter(
    program: Program,
    pipe: multiprocessing.connection.Connection,
    hold: Hold | None,
    options: dict[str, Any],
) -> None:
    os.setsid()  # Ctrl-C is for the tests, which end what they started
    line = Line(pipe, hold)
    logging.basicConfig(handlers=[_Said(line)], force=True)
    try:
        said = program(line, **options)
    except Exception as err:
        line.tell("failed", kind=type(err).__name__, said=str(err))
        os._exit(getattr(err, "exit_code", 1))
    line.tell("ended", **said)


class Actor:
    """One running program.

    Args:
        name: In what a failing test says.
        program: That runs.
        hold: Where it is to stop.
        heard: Called on each event, on a thread.
        options: Of the program.
    """

    def __init__(
        self,
        name: str,
        program: Program,
        *,
        hold: Hold | None = None,
        heard: Callable[[], None] = lambda: None,
        **options: Any,
    ) -> None:
        self.name = name
        self.told: list[Told] = []
        self._changed = threading.Condition()
        self._over = False
        self._heard = heard
        self._options = options  # a clock lives as long as someone here holds it
        self._pipe, theirs = _context.Pipe()
        arguments = (program, theirs, hold, options)
        self._process = _context.Process(target=_enter, args=arguments, daemon=True)
        self._process.start()
        theirs.close()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        while True:
            try:
                told = self._pipe.recv()
            except (EOFError, OSError):
                told = None
            with self._changed:
                if told is None:
                    self._over = True
                else:
                    self.told.append(told)
                self._changed.notify_all()
            self._heard()
            if told is None:
                return

    def count(self, event: str, **fields: Any) -> int:
        """Return how often an event with these fields was told."""
        with self._changed:
            return sum(_fits(told, event, fields) for told in self.told)

    def all(self, event: str) -> list[dict[str, Any]]:
        """Return the fields of every event of this name."""
        with self._changed:
            return [fields for name, fields in self.told if name == event]

    def wait_until(self, holds: Callable[[list[Told]], bool], what: str) -> None:
        """Return once ``holds`` of everything that was told; fail if it cannot any more."""
        with self._changed:
            self._changed.wait_for(lambda: holds(self.told) or self._over, LIMIT)
            assert holds(self.told), f"{self.name}: no {what} among {self._last}"

    def wait_for(self, event: str, *, times: int = 1, **fields: Any) -> None:
        """Return once an event with these fields was told so many times."""

        def came(all_told: list[Told]) -> bool:
            return sum(_fits(told, event, fields) for told in all_told) >= times

        self.wait_until(came, f"{times} x {event} {fields}")

    def wait_held(self) -> None:
        """Return once the program stands where it is held."""
        self.wait_for("held")

    def let_go(self) -> None:
        """Let a held program go on."""
        self._pipe.send("go on")

    @property
    def _last(self) -> str:
        return "\n".join(f"{event} {fields}" for event, fields in self.told[-20:])

    def kill(self) -> None:
        """End the process as the kernel does where memory runs out: it has no say in it."""
        self._signal(signal.SIGKILL)
        self._process.join(LIMIT)
        self._reader.join(LIMIT)

    def terminate(self) -> None:
        """Ask the process to leave, as systemd does."""
        self._signal(signal.SIGTERM)

    def _signal(self, number: signal.Signals) -> None:
        if self._process.pid is not None and self._process.is_alive():
            os.kill(self._process.pid, number)

    @property
    def is_alive(self) -> bool:
        """Whether the process runs."""
        return self._process.is_alive()

    def finish(self) -> dict[str, Any]:
        """Wait for a program that must end well; return what it had to say at its end."""
        self._process.join(LIMIT)
        assert self._process.exitcode is not None, f"{self.name} did not end: {self._last}"
        self._reader.join(LIMIT)
        assert self._process.exitcode == 0, f"{self.name} failed: {self._last}"
        return self.all("ended")[-1]

    def fail(self) -> tuple[int, str]:
        """Wait for a program that must fail; return its exit status and what it said."""
        self._process.join(LIMIT)
        assert self._process.exitcode, f"{self.name} did not fail: {self._last}"
        self._reader.join(LIMIT)
        return self._process.exitcode, self.all("failed")[-1]["said"]


class Clock:
    """Monotonic seconds that run at a pace and jump when a test says so, in every process alike.

    Args:
        pace: Seconds that pass in a second.
        offset: Seconds that it is ahead at first.
    """

    def __init__(self, pace: float = 1.0, offset: float = 0.0) -> None:
        self._pace = pace
        self._offset = _context.Value("d", offset)

    def __call__(self) -> float:
        """Return the time."""
        offset: float = self._offset.value
        return self._pace * time.monotonic() + offset

    def jump(self, seconds: float) -> None:
        """Let so many seconds pass at once; below 0, they have not passed."""
        with self._offset.get_lock():
            self._offset.value += seconds


def wait_for_files(read: Callable[[], object], wanted: object) -> None:
    """Return once what is read of some files is what is wanted of them."""
    deadline = time.monotonic() + LIMIT
    while (found := read()) != wanted:
        assert time.monotonic() < deadline, f"{found}, not {wanted}"
        threading.Event().wait(0.01)  # a file tells nobody that it changed


def set_calendar(ahead: float) -> None:
    """Make the date of this process wrong by so many seconds."""
    right, right_ns = time.time, time.time_ns
    time.time = lambda: right() + ahead
    time.time_ns = lambda: right_ns() + int(ahead * 1e9)


@contextlib.contextmanager
def ended(actors: list[Actor]) -> Iterator[None]:
    """See that no process outlives the block."""
    try:
        yield
    finally:
        for actor in actors:
            actor.kill()
