"""Files with secrets: readable by their owner alone, written whole or not at all.

Whoever reads one refuses it while others can, with the command that mends it: a key that was open
for a day is a key to be made anew, and nobody finds out later.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path

from messaging.errors import SecretError

LARGEST_BYTES = 65_536
_OTHERS = stat.S_IRWXG | stat.S_IRWXO


def read_secret(path: Path, what: str) -> bytes:
    """Return what a secret file holds.

    Args:
        path: Of the file.
        what: That it is, for the sentence of an error.

    Raises:
        SecretError: If it is missing, larger than 64 KiB, no file, or open to others.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as err:
        raise SecretError(
            f"{what}: cannot read {path}: {err.strerror or err}; give a file of this user's"
        ) from err
    with open(handle, "rb") as file:  # noqa: PTH123 - of the handle whose mode is looked at
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            raise SecretError(f"{what}: {path} is no file; give one")
        if found.st_mode & _OTHERS:
            raise SecretError(
                f"{what}: {path} is open to others (mode {stat.S_IMODE(found.st_mode):o}); make it "
                f"its owner's alone: chmod 600 {path}"
            )
        content = file.read(LARGEST_BYTES + 1)
    if len(content) > LARGEST_BYTES:
        raise SecretError(f"{what}: {path} is larger than {LARGEST_BYTES} bytes; it is no secret")
    return content


def check_secret(path: Path, what: str) -> None:
    """Refuse a secret file that ``read_secret`` would refuse; what it holds is not kept.

    Raises:
        SecretError: As ``read_secret``.
    """
    read_secret(path, what)


def write_new(path: Path, content: bytes, *, secret: bool) -> bool:
    """Write a file unless there is one already; return whether it was written.

    It appears with its whole content or not at all, and is never written over.

    Args:
        path: Of the file; its folder is made if it is not there.
        content: All of it.
        secret: Whether its owner alone may read it.

    Raises:
        SecretError: If it cannot be written.
    """
    with _beside(path, content, secret=secret) as new:
        try:
            os.link(new, path)
        except FileExistsError:
            return False
    return True


def write_over(path: Path, content: bytes, *, secret: bool) -> None:
    """Write a file in the place of what was there: the old one or the new, never a part.

    Raises:
        SecretError: If it cannot be written.
    """
    with _beside(path, content, secret=secret) as new:
        new.replace(path)


@contextlib.contextmanager
def _beside(path: Path, content: bytes, *, secret: bool) -> Iterator[Path]:
    new = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    mode = 0o600 if secret else 0o644
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        try:
            with open(handle, "wb") as file:  # noqa: PTH123 - made with its mode
                file.write(content)
                file.flush()
                os.fsync(handle)
            yield new
        finally:
            new.unlink(missing_ok=True)
    except OSError as err:
        raise SecretError(
            f"cannot write {path}: {err.strerror or err}; choose a folder that can be written"
        ) from err
