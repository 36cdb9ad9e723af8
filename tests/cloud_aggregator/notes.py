"""A spool's ledger of one small file an update, in client order."""

from __future__ import annotations

import contextlib
from pathlib import Path

from cloud_aggregator.run_folder import write_atomically
from cloud_aggregator.spool import Spool
from messaging.errors import ProtocolError
from messaging.protocol import Offer, decode, encode


def a_spool(folder: Path) -> Spool:
    """Return the spool of a folder, with its ledger beside the updates."""
    return Spool(folder, Notes(folder))


class Notes:
    """The ledger."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def keep(self, offer: Offer) -> None:
        """Write an update down."""
        write_atomically(self._folder / f"{offer.client}.json", encode(offer))

    def kept(self) -> list[Offer]:
        """Return what was written down and can be read."""
        offers = []
        for path in sorted(self._folder.glob("*.json")):
            with contextlib.suppress(OSError, ProtocolError):
                message = decode(path.read_bytes())
                if isinstance(message, Offer):
                    offers.append(message)
        return offers

    def clear(self) -> None:
        """Forget it."""
        for path in self._folder.glob("*.json"):
            path.unlink(missing_ok=True)
