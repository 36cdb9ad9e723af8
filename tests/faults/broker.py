"""A real mosquitto that a test starts, stops and kills, always at the same address."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from pathlib import Path

from messaging.broker import HOST, find_mosquitto, free_port
from tests.faults.processes import LIMIT

_CONFIG = """\
listener {port} {host}
allow_anonymous true
max_packet_size 300000
set_tcp_nodelay true
persistence false
log_dest stderr
log_type error
log_type warning
log_type notice
log_type information
{more}
"""


class Mosquitto:
    """A broker at one port.

    Args:
        folder: For its configuration.
        more: Lines of its configuration; of its defaults, the queue of 1000 messages holds.

    Attributes:
        said: What it logged since it was last started.
    """

    def __init__(self, folder: Path, *more: str) -> None:
        self.port = free_port()
        self.url = f"mqtt://{HOST}:{self.port}"
        self.said: list[str] = []
        self._config = folder / f"mosquitto-{self.port}.conf"
        text = _CONFIG.format(port=self.port, host=HOST, more="\n".join(more))
        self._config.write_text(text)
        self._changed = threading.Condition()
        self._process: subprocess.Popen[str] | None = None
        self._reader: threading.Thread | None = None

    def start(self) -> None:
        """Start it, and return once it listens."""
        self.said = []
        self._process = subprocess.Popen(
            [find_mosquitto() or "mosquitto", "-c", str(self._config)],
            stderr=subprocess.PIPE,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, args=(self._process,), daemon=True)
        self._reader.start()
        self.wait_for(" running")

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stderr is not None
        with process.stderr as lines:
            for text in lines:
                with self._changed:
                    self.said.append(text)
                    self._changed.notify_all()

    def wait_for(self, words: str, *, times: int = 1) -> None:
        """Return once it has logged these words so many times."""
        with self._changed:
            came = self._changed.wait_for(
                lambda: sum(words in text for text in self.said) >= times, LIMIT
            )
            assert came, f"mosquitto did not say '{words}': {self.said[-20:]}"

    def stop(self) -> None:
        """Stop it in good order: it closes its connections."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End it as the kernel does: what it queued and retained is gone."""
        self._end(signal.SIGKILL)

    def _end(self, number: signal.Signals) -> None:
        if self._process is None or self._reader is None:
            return
        if self._process.poll() is None:
            os.kill(self._process.pid, number)
        self._process.wait()
        self._reader.join(LIMIT)
        self._process = None
