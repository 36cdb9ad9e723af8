"""The global states that devices may ask for, by content.

The newest, the one before it, and those that are pinned: what a later stage goes on needing. A
device is given each of them a few times over at once, and then at a rate: who asks without end is
refused, and neither the thread that answers nor the broker is kept from the others.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Callable

from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from cloud_aggregator.door import Bucket
from cloud_aggregator.run_folder import RunFolder, write_atomically
from device_profiles.errors import InputError
from messaging.chunks import Missing, chunk_count, fitting_chunk_bytes, make_chunk, wire_bytes
from messaging.claims import Claims
from messaging.codecs import BlobHeader, encode_blob
from messaging.errors import ProtocolError
from messaging.layout import Layout, Vector
from messaging.protocol import StateRef, Want

log = logging.getLogger(__name__)

_KEPT = 2
_DOWN_WINDOW = 8
# Of one state to one device. An honest one takes it once; one that is started again, once more; on
# a bad link it says a request again after five seconds, which is 0.4 MB/s in the largest chunks.
_TIMES_AT_ONCE, _LEAST_AT_ONCE = 4, 4 * 2**20  # wholes, bytes
_DOWN_BYTES_PER_SECOND = 2.0**21
_KEPT_CUT_BYTES = 8 * 2**20  # a state up to here is in memory twice: whole, and cut


class Shelf:
    """Global states as blobs in memory and as named tensors in the run's folder.

    Args:
        run: Its name.
        layout: Of the states.
        folder: Of the run.
        chunk_bytes: Of a piece on its way down.
        claims: Where large states lie too, to be fetched from; by default nowhere.
    """

    def __init__(
        self,
        run: str,
        layout: Layout,
        folder: RunFolder,
        chunk_bytes: int,
        claims: Claims | None = None,
    ) -> None:
        self._claims = claims
        self._run = run
        self._layout = layout
        self._folder = folder
        self._chunk_bytes = chunk_bytes
        self._blobs: dict[str, tuple[StateRef, bytes]] = {}
        self._packets: dict[tuple[int, int], bytes] = {}  # of the newest state
        self._pinned: set[str] = set()
        self._given: dict[str, dict[str, Bucket]] = {}  # by state and device
        self.newest: StateRef | None = None
        self.vector: Vector | None = None

    def fit(self, largest_packet: int | None) -> bool:
        """Cut states into smaller pieces where the broker takes less; return whether it does.

        They stay small: a device may hold a reference to them.
        """
        fitting = fitting_chunk_bytes(self._chunk_bytes, largest_packet)
        if fitting == self._chunk_bytes:
            return False
        log.info("the broker takes %s bytes a packet: pieces of %d", largest_packet, fitting)
        self._chunk_bytes = fitting
        self._blobs = {name: (self._cut(ref), blob) for name, (ref, blob) in self._blobs.items()}
        self.newest = self.current(self.newest)
        return True

    def _cut(self, ref: StateRef) -> StateRef:
        pieces = chunk_count(ref.bytes, self._chunk_bytes)
        return ref.model_copy(update={"chunk_bytes": self._chunk_bytes, "chunks": pieces})

    def current(self, ref: StateRef | None) -> StateRef | None:
        """Return the reference to the same state in the pieces that it goes down in now."""
        return None if ref is None else self._blobs.get(ref.blob, (ref, b""))[0]

    def enter(self, layout: Layout) -> None:
        """Hold states of another layout from now on; those that are here can still be asked for."""
        self._layout = layout
        self.newest, self.vector = None, None
        self._packets.clear()

    def pin(self, ref: StateRef) -> None:
        """Keep a state on the shelf to the end of the run."""
        self._pinned.add(ref.blob)

    def put(self, vector: Vector, round_: int, *, keep: bool = True) -> StateRef:
        """Make ``vector`` the newest state, on disk first.

        Args:
            vector: Packed.
            round_: That it comes after.
            keep: Whether it is written; a state that can be made again need not be.
        """
        if keep:
            tensors = self._layout.unpack(vector)
            write_atomically(self._folder.global_path(round_), save(tensors))
        header = BlobHeader(
            run=self._run,
            round=round_,
            sender="aggregator",
            codec="fp32",
            layout=self._layout.sha256,
            examples=0,
        )
        blob = encode_blob(vector, self._layout, header)
        name = hashlib.sha256(blob).hexdigest()
        ref = StateRef(
            round=round_,
            blob=name,
            bytes=len(blob),
            chunk_bytes=self._chunk_bytes,
            chunks=chunk_count(len(blob), self._chunk_bytes),
            url=None if self._claims is None else self._claims.put_if_large(blob, name),
        )
        self._blobs[ref.blob] = (ref, blob)
        loose = [name for name in self._blobs if name not in self._pinned]
        for old in loose[:-_KEPT]:
            gone, _ = self._blobs.pop(old)
            self._given.pop(old, None)
            if self._claims is not None and gone.url is not None:
                self._claims.store.remove(old)
        self.newest, self.vector = ref, vector
        self._packets.clear()
        return ref

    def load(self, round_: int) -> Vector:
        """Return the state after a round from the run's folder.

        Raises:
            InputError: If it is missing or damaged.
        """
        path = self._folder.global_path(round_)
        try:
            return self._layout.pack(load_file(path))
        except (OSError, SafetensorError, ProtocolError) as err:
            raise InputError(
                f"{path} is missing, damaged or of another run's shape; the run cannot go on"
            ) from err

    def has(self, round_: int) -> bool:
        """Return whether the state after a round is in the run's folder."""
        return self._folder.global_path(round_).exists()

    def remove(self, round_: int) -> None:
        """Remove the state after a round from the run's folder."""
        path = self._folder.global_path(round_)
        path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # somebody put something else beside it
            path.parent.rmdir()

    def answer(self, want: Want, send: Callable[[bytes], None], now: float) -> None:
        """Send the first chunks of those that a device lacks.

        Args:
            want: Of a device that takes part.
            send: Takes each packet.
            now: Seconds, which never go back.

        Raises:
            ProtocolError: If the state is not, or no longer, on the shelf; with code ``rate`` if
                the device has had it too often. It may ask again.
        """
        if want.blob not in self._blobs:
            raise ProtocolError("state", "a global state that is not on the shelf any longer")
        ref, blob = self._blobs[want.blob]
        wanted = Missing.from_bitmap(want.missing, ref.chunks).first(_DOWN_WINDOW)
        packets = [self._packet(ref, blob, index) for index in wanted]
        self._give(want.client, ref, sum(map(len, packets)), now)
        for packet in packets:
            send(packet)

    def _give(self, client: str, ref: StateRef, octets: int, now: float) -> None:
        """Take so many bytes of a state from what a device may still be given of it."""
        buckets = self._given.setdefault(ref.blob, {})
        if client not in buckets:
            whole = wire_bytes(ref.bytes, ref.chunk_bytes)
            at_once = max(_LEAST_AT_ONCE, _TIMES_AT_ONCE * whole)
            buckets[client] = Bucket(_DOWN_BYTES_PER_SECOND, at_once, now)
        if not buckets[client].holds(octets, now):
            raise ProtocolError("rate", "a global state that it was given several times already")
        buckets[client].take(octets)

    def _packet(self, ref: StateRef, blob: bytes, index: int) -> bytes:
        """Return a piece as it travels; of the state that everybody asks for it is made once."""
        key = (ref.chunk_bytes, index)
        if self.newest is None or ref.blob != self.newest.blob or ref.bytes > _KEPT_CUT_BYTES:
            return make_chunk(self._run, ref.blob, blob, index, ref.chunk_bytes)
        if key not in self._packets:
            self._packets[key] = make_chunk(self._run, ref.blob, blob, index, ref.chunk_bytes)
        return self._packets[key]
