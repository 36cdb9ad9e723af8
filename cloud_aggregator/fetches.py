"""Updates that lie in a store are fetched on threads of their own, onto the spool's disk.

The thread of the protocol goes on meanwhile; what came of a fetch is handed to it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from messaging.claims import ClaimStore
from messaging.errors import ProtocolError
from messaging.protocol import Offer

log = logging.getLogger(__name__)

_AT_ONCE = 4


@dataclass(frozen=True, kw_only=True)
class Fetched:
    """What came of an offer's fetch: its verified bytes in ``path``, or a ``fault`` (its code)."""

    offer: Offer
    path: Path
    fault: str | None = None


class Fetches:
    """The fetches of one run.

    Args:
        store: The only one that is asked.
        deliver: Takes what came of each; called on a thread of this object.
    """

    def __init__(self, store: ClaimStore, deliver: Callable[[Fetched], None]) -> None:
        self.store = store
        self._deliver = deliver
        self._pool = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="pwff-fetch")

    def begin(self, offer: Offer, url: str, path: Path) -> None:
        """Fetch an offer's blob into ``path``."""
        self._pool.submit(self._fetch, offer, url, path)

    def _fetch(self, offer: Offer, url: str, path: Path) -> None:
        fault = None
        try:
            with path.open("wb") as sink:
                self.store.fetch(url, sha256=offer.blob, size=offer.bytes, sink=sink)
        except ProtocolError as err:
            fault = err.code
            log.warning("'%s': %s; asking for its chunks", offer.client, err.reason)
        except OSError as err:  # the disk is full, or the round is over and its folder gone
            fault = "disk"
            log.warning("'%s': %s: %s", offer.client, path.name, err.strerror or err)
        self._deliver(Fetched(offer=offer, path=path, fault=fault))

    def remove(self, blob: str) -> None:
        """Remove a blob that is here from the store."""
        self._pool.submit(self.store.remove, blob)

    def close(self) -> None:
        """Drop what has not begun; what is under way is left, whatever the store does."""
        self.store.leave()
        self._pool.shutdown(wait=False, cancel_futures=True)
