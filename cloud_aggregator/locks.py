"""One aggregator a run: locks that the system frees when a process ends, however it ends."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from device_profiles.errors import InputError


class FileLock:
    """A lock on a file, held until ``release`` or the end of the process.

    Args:
        path: Of the file; made where it is missing, and left.
        what: That is locked, for the sentence of an error.

    Raises:
        InputError: If another process holds it, or the file cannot be made.
    """

    def __init__(self, path: Path, what: str) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as err:
            raise InputError(
                f"cannot write {path}: {err.strerror or err}; choose a folder that can be written"
            ) from err
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as err:
            os.close(self._file)
            raise taken(what) from err

    def release(self) -> None:
        """Let another process have it."""
        os.close(self._file)


def taken(what: str) -> InputError:
    """Return the error of a second aggregator."""
    return InputError(
        f"another aggregator is at work on {what}; stop it first, or give this run another name "
        "and another 'out'"
    )
