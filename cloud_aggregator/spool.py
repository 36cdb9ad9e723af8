"""Updates on disk from their first chunk to the end of their round.

An update is acknowledged once it is here whole, verified and flushed, with the offer it came with:
an aggregator that is started again in the middle of a round finds both. Aggregation then reads one
at a time, in client order.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from cloud_aggregator.run_folder import write_atomically
from messaging.codecs import BlobHeader, decode_blob
from messaging.errors import ProtocolError
from messaging.layout import Layout, Vector
from messaging.protocol import Offer, decode, encode


class SpoolFullError(Exception):
    """The disk that holds the spool has no room; what was acknowledged is safe."""

    exit_code = 1


class Spool:
    """The updates of one round.

    Args:
        folder: Of this round; made where it is missing.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with _full_is_told(folder):
            folder.mkdir(parents=True, exist_ok=True)

    def open_partial(self, offer: Offer) -> PartialFile:
        """Return the file that an offer's chunks go to.

        Raises:
            SpoolFullError: If the disk has no room for it.
        """
        free = shutil.disk_usage(self._folder).free
        if free < offer.bytes:
            raise _full(self._folder, f"{free} bytes free, {offer.bytes} needed")
        return PartialFile(self._partial(offer.client))

    def _partial(self, client: str) -> Path:
        return self._folder / f"{client}.part"

    def path(self, client: str) -> Path:
        """Return where a client's whole update is."""
        return self._folder / f"{client}.safetensors"

    def keep(self, offer: Offer) -> None:
        """Make a client's finished partial its update of the round.

        Raises:
            DiskFullError: If the disk has no room for the offer beside it.
        """
        write_atomically(self._folder / f"{offer.client}.json", encode(offer))
        self._partial(offer.client).replace(self.path(offer.client))
        folder = os.open(self._folder, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def kept(self) -> Iterator[tuple[Offer, bytes]]:
        """Yield offer and update of those kept by an earlier process; what is damaged is passed."""
        for path in sorted(self._folder.glob("*.json")):
            try:
                offer, blob = decode(path.read_bytes()), self.path(path.stem).read_bytes()
            except (OSError, ProtocolError):
                continue
            if isinstance(offer, Offer) and hashlib.sha256(blob).hexdigest() == offer.blob:
                yield offer, blob

    def update(self, client: str, layout: Layout) -> tuple[BlobHeader, Vector]:
        """Return a client's update."""
        return decode_blob(self.path(client).read_bytes(), layout)

    def clear(self) -> None:
        """Remove the round's updates."""
        shutil.rmtree(self._folder, ignore_errors=True)


class PartialFile:
    """One update that is still arriving."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with _full_is_told(path):
            self._file = path.open("w+b", buffering=0)

    def write(self, offset: int, payload: bytes) -> None:
        """Put ``payload`` at ``offset``.

        Raises:
            SpoolFullError: If the disk has no room.
        """
        with _full_is_told(self._path):
            written = 0
            while written < len(payload):
                written += os.pwrite(self._file.fileno(), payload[written:], offset + written)

    def finish(self) -> bytes:
        """Flush to the disk and return the whole blob.

        Raises:
            SpoolFullError: If the disk has no room.
        """
        with _full_is_told(self._path):
            os.fsync(self._file.fileno())
        self._file.seek(0)
        blob = self._file.read()
        self._file.close()
        return blob

    def discard(self) -> None:
        """Remove what has arrived."""
        self._file.close()
        self._path.unlink(missing_ok=True)


@contextlib.contextmanager
def _full_is_told(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as err:
        if err.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _full(path.parent, err.strerror or "no space") from err
        raise


def _full(folder: Path, detail: str) -> SpoolFullError:
    return SpoolFullError(
        f"the disk of the spool {folder} is full ({detail}); make room there, then resume the run"
    )
