"""An update that is still arriving, as a file that the next process can go on with.

Beside the pieces lies a file that says of which blob they are and which are here, a byte each. It
is written after the piece and not flushed: a machine that lost its power may have forgotten either,
and then the hash of the whole tells. No file stays open, whatever the number of uploads under way.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from cloud_aggregator.spool import full_is_told, spool_full
from messaging.chunks import HEADER_BYTES
from messaging.protocol import Offer


class ResumablePartial:
    """The pieces of one offer in ``path``.

    Args:
        path: Of the file that the whole blob will be.
        offer: What the pieces are of. What is there of another offer is overwritten.

    Raises:
        SpoolFullError: If the disk has no room for it.
    """

    def __init__(self, path: Path, offer: Offer) -> None:
        self._path = path
        self._marks = _marks_path(path)
        self._head = _head(offer)
        self._piece_bytes = offer.chunk_bytes - HEADER_BYTES
        here = held_pieces(path, offer)
        free = shutil.disk_usage(path.parent).free
        needed = offer.bytes - len(here) * self._piece_bytes
        if free < needed:
            raise spool_full(path.parent, f"{free} bytes free, {needed} needed")
        if not here:
            with full_is_told(path.parent):
                path.write_bytes(b"")
                self._marks.write_bytes(self._head + bytes(offer.chunks))

    def write(self, offset: int, payload: bytes) -> None:
        """Put the piece ``payload`` at ``offset``, and note that it is here.

        Raises:
            SpoolFullError: If the disk has no room.
        """
        with full_is_told(self._path.parent):
            _write_at(self._path, offset, payload)
            _write_at(self._marks, len(self._head) + offset // self._piece_bytes, b"\1")

    def finish(self) -> bytes:
        """Flush to the disk and return the whole blob.

        Raises:
            SpoolFullError: If the disk has no room.
        """
        with full_is_told(self._path.parent), self._path.open("rb+") as file:
            os.fsync(file.fileno())
            blob = file.read()
        self._marks.unlink(missing_ok=True)
        return blob

    def discard(self) -> None:
        """Remove what has arrived."""
        self._marks.unlink(missing_ok=True)
        self._path.unlink(missing_ok=True)


def adopt(whole: Path, path: Path, offer: Offer) -> None:
    """Make the file ``whole``, which came another way, all pieces of an offer in ``path``.

    Raises:
        SpoolFullError: If the disk has no room for the marks.
    """
    with full_is_told(path.parent):
        whole.replace(path)
        _marks_path(path).write_bytes(_head(offer) + b"\1" * offer.chunks)


def held_pieces(path: Path, offer: Offer) -> set[int]:
    """Return which pieces of an offer lie in ``path``; none where it holds another blob's."""
    try:
        marks = _marks_path(path).read_bytes()
        size = path.stat().st_size
    except OSError:
        return set()
    head = _head(offer)
    if not marks.startswith(head) or len(marks) != len(head) + offer.chunks:
        return set()
    step = offer.chunk_bytes - HEADER_BYTES
    ends = [min((index + 1) * step, offer.bytes) for index in range(offer.chunks)]
    return {i for i, mark in enumerate(marks[len(head) :]) if mark and ends[i] <= size}


def _marks_path(path: Path) -> Path:
    return path.with_name(path.name + ".have")


def _head(offer: Offer) -> bytes:
    return f"{offer.blob} {offer.bytes} {offer.chunk_bytes}\n".encode()


def _write_at(path: Path, offset: int, payload: bytes) -> None:
    file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        written = 0
        while written < len(payload):
            written += os.pwrite(file, payload[written:], offset + written)
    finally:
        os.close(file)
