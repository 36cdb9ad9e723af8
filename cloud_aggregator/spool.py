"""Updates on disk from their last chunk to the end of their round.

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
from typing import Protocol

from messaging.codecs import BlobHeader, decode_blob
from messaging.layout import Layout, Vector
from messaging.protocol import Offer


class SpoolFullError(Exception):
    """The disk that holds the spool has no room; what was acknowledged is safe."""

    exit_code = 1


class Ledger(Protocol):
    """Where it stands which updates were kept, with the offers that they came with."""

    def keep(self, offer: Offer) -> None:
        """Put an update down before it is acknowledged."""

    def kept(self) -> list[Offer]:
        """Return what was put down, in that order."""

    def clear(self) -> None:
        """Forget it."""


class Spool:
    """The updates of one round.

    Args:
        folder: Of this round; made where it is missing.
        ledger: Of this round.
    """

    def __init__(self, folder: Path, ledger: Ledger) -> None:
        self._folder, self._ledger = folder, ledger
        with full_is_told(folder):
            folder.mkdir(parents=True, exist_ok=True)

    def partial_path(self, client: str) -> Path:
        """Return where a client's update is while it arrives."""
        return self._folder / f"{client}.part"

    def path(self, client: str) -> Path:
        """Return where a client's whole update is."""
        return self._folder / f"{client}.safetensors"

    def keep(self, offer: Offer) -> None:
        """Make a client's finished partial its update of the round.

        Raises:
            DiskFullError: If the disk has no room for the offer beside it.
            StoreError: If the ledger cannot be written.
        """
        self.partial_path(offer.client).replace(self.path(offer.client))
        folder = os.open(self._folder, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        self._ledger.keep(offer)

    def kept(self) -> Iterator[tuple[Offer, bytes]]:
        """Yield offer and update of those kept by an earlier process; what is damaged is passed."""
        for offer in self._ledger.kept():
            try:
                blob = self.path(offer.client).read_bytes()
            except OSError:
                continue
            if hashlib.sha256(blob).hexdigest() == offer.blob:
                yield offer, blob

    def update(self, client: str, layout: Layout) -> tuple[BlobHeader, Vector]:
        """Return a client's update."""
        return decode_blob(self.path(client).read_bytes(), layout)

    def clear(self) -> None:
        """Remove the round's updates."""
        self._ledger.clear()
        shutil.rmtree(self._folder, ignore_errors=True)


@contextlib.contextmanager
def full_is_told(folder: Path) -> Iterator[None]:
    """Tell that a disk is full as a fault of the spool, or of whichever ``folder`` is on it.

    Raises:
        SpoolFullError: In place of what the system says.
    """
    try:
        yield
    except OSError as err:
        if err.errno in (errno.ENOSPC, errno.EDQUOT):
            raise spool_full(folder, err.strerror or "no space") from err
        raise


def spool_full(folder: Path, detail: str) -> SpoolFullError:
    """Return the error of a ``folder`` whose disk is full, with the remedy."""
    return SpoolFullError(
        f"the disk of the spool {folder} is full ({detail}); make room there, then resume the run"
    )
