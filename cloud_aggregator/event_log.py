"""A file of lines that grows no further than a bound: it and one older file of the same size."""

from __future__ import annotations

from pathlib import Path

LIMIT_BYTES = 64 * 2**20


def append_line(path: Path, line: str, *, limit_bytes: int = LIMIT_BYTES) -> None:
    """Add one line; where the file would pass its limit, it first becomes ``PATH.1``.

    What ``PATH.1`` was is gone then. A line is never split between the two, and a line longer than
    the limit has a file for itself.

    Args:
        path: Of the file; made where it is not there.
        line: Without its end.
        limit_bytes: Of each of the two files, > 0.

    Raises:
        OSError: If the disk is full or the folder cannot be written.
    """
    data = line.encode() + b"\n"
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        size = 0
    if size and size + len(data) > limit_bytes:
        path.replace(path.with_name(f"{path.name}.1"))
    with path.open("ab") as file:
        file.write(data)
