"""Binary DATA: one blob in numbered pieces, each with a fixed header of 64 bytes.

    magic 4s | version B | reserved 3x | run 8s | blob 32s | index I | count I | length I | crc32 I

Big-endian. ``run`` is the first eight bytes of the SHA-256 of the run's name; ``crc32`` covers the
bytes of the piece. A piece's place in the blob is ``index * (chunk_bytes - 64)``, so order does not
matter and a duplicate changes nothing.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from typing import Annotated

from pydantic import BeforeValidator, Field
from zlib_ng import zlib_ng

from messaging.errors import ProtocolError

#: Bytes in memory, or a view of the file that they lie in.
Bytes = bytes | memoryview

MAGIC = b"PWFF"
VERSION = 1
HEADER = struct.Struct(">4sB3x8s32sIIII")
HEADER_BYTES = HEADER.size  # 64
CHUNK_BYTES = 122_880  # header included; AWS IoT Core takes 128 KB
SMALL_CHUNK_BYTES = 61_440  # for brokers that take 64 KB
CHUNK_PROFILES = {"standard": CHUNK_BYTES, "small": SMALL_CHUNK_BYTES}
MAX_CHUNKS = 32_768
LEAST_CHUNK_BYTES = 1024
PACKET_ROOM_BYTES = 512  # what a packet holds beside a chunk at most: topic, packet header

_BITS = [[bit for bit in range(8) if octet >> bit & 1] for octet in range(256)]


def chunk_profile(value: object) -> object:
    """Return the size that the name of a profile stands for; anything else unchanged.

    Raises:
        ValueError: If it is a string of no profile's name.
    """
    if not isinstance(value, str):
        return value
    if value not in CHUNK_PROFILES:
        raise ValueError(
            f"unknown chunk profile '{value}'; choose one of {', '.join(CHUNK_PROFILES)}, or give "
            "a number of bytes"
        )
    return CHUNK_PROFILES[value]


#: Of a configuration: bytes with the header, or the name of a profile.
ChunkBytes = Annotated[int, BeforeValidator(chunk_profile), Field(ge=LEAST_CHUNK_BYTES, le=262_144)]


def fitting_chunk_bytes(chunk_bytes: int, largest_packet: int | None) -> int:
    """Return the chunk size to use where the broker takes packets of ``largest_packet`` bytes.

    That is ``chunk_bytes`` where it fits or nothing is known, the small profile where that fits,
    and else what does, but never below 1024.
    """
    if largest_packet is None or chunk_bytes + PACKET_ROOM_BYTES <= largest_packet:
        return chunk_bytes
    room = largest_packet - PACKET_ROOM_BYTES
    return SMALL_CHUNK_BYTES if room >= SMALL_CHUNK_BYTES else max(LEAST_CHUNK_BYTES, room)


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """One verified piece of a blob."""

    blob: str
    index: int
    count: int
    payload: memoryview


def run_tag(run: str) -> bytes:
    """Return the eight bytes that stand for a run in every header."""
    return hashlib.sha256(run.encode()).digest()[:8]


def chunk_count(blob_bytes: int, chunk_bytes: int) -> int:
    """Return how many pieces a blob of ``blob_bytes`` (>= 1) makes."""
    return -(-blob_bytes // (chunk_bytes - HEADER_BYTES))


def wire_bytes(blob_bytes: int, chunk_bytes: int) -> int:
    """Return the canonical application bytes of one transmission: headers and payload."""
    return blob_bytes + HEADER_BYTES * chunk_count(blob_bytes, chunk_bytes)


def make_chunk(run: str, blob_hash: str, blob: bytes, index: int, chunk_bytes: int) -> bytes:
    """Return piece ``index`` of ``blob`` with its header."""
    size = chunk_bytes - HEADER_BYTES
    piece = memoryview(blob)[index * size : (index + 1) * size]
    header = HEADER.pack(
        MAGIC,
        VERSION,
        run_tag(run),
        bytes.fromhex(blob_hash),
        index,
        chunk_count(len(blob), chunk_bytes),
        len(piece),
        zlib_ng.crc32(piece),
    )
    return b"".join((header, piece))


def parse_chunk(run: str, packet: bytes) -> Chunk:
    """Return the verified piece that ``packet`` holds.

    Raises:
        ProtocolError: Where the packet is truncated, oversize, of another run or corrupted.
    """
    if len(packet) < HEADER_BYTES:
        raise ProtocolError(
            "chunk", f"chunk of {len(packet)} bytes; the header alone has {HEADER_BYTES}"
        )
    magic, version, tag, blob, index, count, length, crc = HEADER.unpack_from(packet)
    if magic != MAGIC or version != VERSION:
        raise ProtocolError("chunk", f"not a version-{VERSION} chunk")
    if tag != run_tag(run):
        raise ProtocolError("run", "chunk of another run")
    if not 1 <= count <= MAX_CHUNKS or index >= count:
        raise ProtocolError("chunk", f"chunk {index} of {count}; at most {MAX_CHUNKS} chunks")
    payload = memoryview(packet)[HEADER_BYTES:]
    if len(payload) != length:
        raise ProtocolError("chunk", f"chunk says {length} bytes and carries {len(payload)}")
    if zlib_ng.crc32(payload) != crc:
        raise ProtocolError("chunk", f"chunk {index} is corrupted (CRC-32)")
    return Chunk(blob=blob.hex(), index=index, count=count, payload=payload)


class Missing:
    """Which pieces of a blob have not arrived; a set that travels as a hexadecimal bitmap."""

    def __init__(self, count: int, indices: set[int] | None = None) -> None:
        self.count = count
        self.indices = set(range(count)) if indices is None else indices

    @classmethod
    def from_bitmap(cls, bitmap: str, count: int) -> Missing:
        """Return the set that ``bitmap`` names.

        Raises:
            ProtocolError: If it is not hexadecimal, or names a piece that the blob does not have.
        """
        try:
            octets = bytes.fromhex(bitmap)
        except ValueError as err:
            raise ProtocolError("bitmap", "bitmap is not hexadecimal") from err
        indices = {8 * at + bit for at, octet in enumerate(octets) for bit in _BITS[octet]}
        last = max(indices, default=-1)
        if last >= count:
            raise ProtocolError("bitmap", f"bitmap names chunk {last} of {count}")
        return cls(count, indices)

    def bitmap(self) -> str:
        """Return the set as a bitmap, least significant bit first."""
        octets = bytearray((self.count + 7) // 8)
        for index in self.indices:
            octets[index // 8] |= 1 << index % 8
        return octets.hex()

    def first(self, number: int) -> list[int]:
        """Return the ``number`` lowest missing pieces."""
        return sorted(self.indices)[:number]

    def arrived(self, index: int) -> bool:
        """Strike piece ``index`` off; return whether it was missing."""
        if index not in self.indices:
            return False
        self.indices.remove(index)
        return True

    def __len__(self) -> int:
        return len(self.indices)
