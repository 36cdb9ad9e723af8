"""Whom the broker itself turned away, counted from its log (mosquitto 2).

A device without a certificate never reaches the aggregator, so nothing here could refuse it; what
the broker writes down is the only trace. The log is read when the metrics are asked for, from where
the last reading ended. What stands in it was partly chosen by strangers: lines are matched and
counted, nothing of them is kept, and a reading takes no more than the last ``READ_BYTES``.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from pathlib import Path

from device_profiles.errors import InputError

READ_BYTES = 8 * 2**20

#: Of a line: a time of at most two words, in syslog's file with a host before. What strangers call
#: their topics comes later in it.
_START = rb"^(?:\w{3} +\d+ [\d:]+ [^ ]+ mosquitto\[\d+\]: )?(?:[^ ]+ ){0,2}"
_TLS = _START + rb"(?:OpenSSL Error\[\d+\]|Client connection from [^ ]+ failed): "
#: By reason: a certificate that is missing or of another authority, any other failure of TLS, a
#: user or password that is not right, what is no MQTT, and a message that may not be published
#: where it was, which mosquitto tells when it is to debug (``pwff certs --log-denials``).
REASONS = {
    "certificate": re.compile(_TLS + rb".*(?:certificate|unknown ca)"),
    "tls": re.compile(_TLS + rb"(?!.*(?:certificate|unknown ca|unexpected eof))"),
    "authorisation": re.compile(_START + rb"Client .* disconnected[,:] not authori[sz]ed"),
    "protocol": re.compile(
        _START + rb"Client .* disconnected due to (?:protocol error|malformed|oversize)"
    ),
    "denied": re.compile(_START + rb"Denied PUBLISH from "),
}


class BrokerLog:
    """A broker's log, from now on.

    Args:
        path: Of the file; it may be rotated.
        refused: Told a reason and how often.

    Raises:
        InputError: If it cannot be read.
    """

    def __init__(self, path: Path, refused: Callable[[str, int], None]) -> None:
        self._path, self._refused = path, refused
        self._reading = threading.Lock()  # whoever asks for metrics does so on a thread of its own
        self._unfinished = b""
        try:
            with path.open("rb") as file:
                self._place = _identity(path), file.seek(0, 2)
        except OSError as err:
            raise InputError(
                f"broker_log = '{path}' cannot be read ({err.strerror}); give the file that the "
                "broker writes its log to, readable by the aggregator, or leave it out"
            ) from err

    def read(self) -> None:
        """Count what was written since the last reading; a log that is away says nothing."""
        with self._reading:
            self._read()

    def _read(self) -> None:
        try:
            known, start = self._place
            identity, size = _identity(self._path), self._path.stat().st_size
            if identity != known or size < start:  # rotated, or emptied
                start, self._unfinished = 0, b""
            with self._path.open("rb") as file:
                skips = size - READ_BYTES > start
                file.seek(size - READ_BYTES if skips else start)
                read = file.read(READ_BYTES)
                self._place = identity, file.tell()
            if skips:  # in the middle of a line, and perhaps of a stranger's words
                self._unfinished, read = b"", read.partition(b"\n")[2]
        except OSError:
            return
        *lines, self._unfinished = (self._unfinished + read).split(b"\n")
        self._unfinished = self._unfinished[:READ_BYTES]
        for reason, pattern in REASONS.items():
            if count := sum(pattern.search(line) is not None for line in lines):
                self._refused(reason, count)


def _identity(path: Path) -> tuple[int, int]:
    there = path.stat()
    return there.st_dev, there.st_ino
