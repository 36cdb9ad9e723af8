"""An update that is still arriving, as a file that the next process can go on with.

Behind the pieces the file says of which blob they are and which are here, a byte each, until it is
whole. That is written after the piece and not flushed: a machine that lost its power may have
forgotten either, and then the hash of the whole tells. A file stays open only while its upload
holds a grant, whatever the number of uploads under way.
"""

from __future__ import annotations

import mmap
import os
import shutil
import weakref
from pathlib import Path
from typing import IO

from cloud_aggregator.spool import full_is_told, spool_full
from messaging.chunks import HEADER_BYTES, Bytes
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
        self._path, self._offer = path, offer
        self._marks_at = offer.bytes + len(_head(offer))
        self._piece_bytes = offer.chunk_bytes - HEADER_BYTES
        self._folder = path.parent
        self._file = -1
        self._closing: weakref.finalize[..., ResumablePartial] | None = None
        here = held_pieces(path, offer)
        free = shutil.disk_usage(path.parent).free
        needed = offer.bytes - len(here) * self._piece_bytes
        if free < needed:
            raise spool_full(path.parent, f"{free} bytes free, {needed} needed")
        if not here:
            with full_is_told(path.parent), path.open("wb") as file:
                _mark(file, offer, b"\0")

    def write(self, offset: int, payload: Bytes) -> None:
        """Put the piece ``payload`` at ``offset``, and note that it is here.

        Raises:
            SpoolFullError: If the disk has no room.
        """
        with full_is_told(self._folder):
            file = self._open()
            _write_at(file, offset, payload)
            _write_at(file, self._marks_at + offset // self._piece_bytes, b"\1")

    def rest(self) -> None:
        """Keep nothing open until the next piece.

        Raises:
            SpoolFullError: If the disk says only now that it has no room.
        """
        closing, self._closing = self._closing, None
        if closing is not None:
            with full_is_told(self._folder):
                closing()

    def _open(self) -> int:
        if self._closing is None:
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600)
            self._closing = weakref.finalize(self, os.close, self._file)  # forgotten, it closes too
        return self._file

    def finish(self) -> memoryview:
        """Flush to the disk and return the whole blob, as a view of the file.

        From here on nothing says which pieces are here: who is killed before the blob is kept asks
        for all of it again.

        Raises:
            SpoolFullError: If the disk has no room.
        """
        try:
            with full_is_told(self._folder):
                file = self._open()
                os.ftruncate(file, self._offer.bytes)
                os.fsync(file)
                return memoryview(mmap.mmap(file, 0, access=mmap.ACCESS_READ))
        finally:
            self.rest()

    def discard(self) -> None:
        """Remove what has arrived."""
        self.rest()
        self._path.unlink(missing_ok=True)


def adopt(whole: Path, path: Path, offer: Offer) -> None:
    """Make the file ``whole``, which came another way, all pieces of an offer in ``path``.

    Raises:
        SpoolFullError: If the disk has no room for the marks.
    """
    with full_is_told(path.parent):
        with whole.open("rb+") as file:
            _mark(file, offer, b"\1")
        whole.replace(path)


def held_pieces(path: Path, offer: Offer) -> set[int]:
    """Return which pieces of an offer lie in ``path``; none where it holds another blob's."""
    head = _head(offer)
    try:
        with path.open("rb") as file:
            file.seek(offer.bytes)
            marks = file.read(len(head) + offer.chunks + 1)
    except OSError:
        return set()
    if not marks.startswith(head) or len(marks) != len(head) + offer.chunks:
        return set()
    return {i for i, mark in enumerate(marks[len(head) :]) if mark}


def _head(offer: Offer) -> bytes:
    return f"{offer.blob} {offer.bytes} {offer.chunk_bytes}\n".encode()


def _mark(file: IO[bytes], offer: Offer, mark: bytes) -> None:
    """Say behind the pieces of which blob they are, and ``mark`` all of them."""
    file.seek(offer.bytes)
    file.write(_head(offer) + mark * offer.chunks)


def _write_at(file: int, offset: int, payload: Bytes) -> None:
    written = 0
    while written < len(payload):
        written += os.pwrite(file, payload[written:], offset + written)
