"""Files that are there whole or not at all, whatever happens while they are written."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError


class DiskError(OSError):
    """A disk that does not take what must be kept; what was kept before is still whole."""

    exit_code = 1


def replace_file(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file beside ``path``, bring it to the disk, and put it in the place of ``path``.

    One process writes in a folder; what a killed one left half-written is written over.

    Args:
        path: Of the file; its folder is made if it is not there.
        write: Writes to the path that it is given.

    Raises:
        DiskError: If the disk is full or broken; the older file is as it was.
    """
    new = path.with_name(f".{path.name.partition('-')[0]}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(new)
        with new.open("rb") as file:
            os.fsync(file.fileno())
        new.replace(path)
        _sync_folder(path.parent)
    except (OSError, SafetensorError) as err:
        new.unlink(missing_ok=True)
        reason = getattr(err, "strerror", None) or str(err)
        raise DiskError(
            f"cannot write {path}: {reason}; what was kept before is whole: make room in "
            f"{path.parent}, start again, and it goes on from there"
        ) from err


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
