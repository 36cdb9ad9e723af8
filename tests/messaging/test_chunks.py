"""A chunk that is parsed is the piece that was made; everything else is a ProtocolError."""

from __future__ import annotations

import hashlib
import random
import struct
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from messaging.chunks import (
    CHUNK_BYTES,
    HEADER_BYTES,
    MAX_CHUNKS,
    SMALL_CHUNK_BYTES,
    ChunkBytes,
    Missing,
    chunk_count,
    fitting_chunk_bytes,
    make_chunk,
    parse_chunk,
    wire_bytes,
)
from messaging.errors import ProtocolError

BLOB = bytes(range(256)) * 8  # 2,048 bytes: pieces of 960, 960 and 128 bytes at 1,024 a chunk
HASH = hashlib.sha256(BLOB).hexdigest()


def packet(**fields: int | bytes) -> bytes:
    """Return a packet of 10 bytes written field by field from the format, with some changed."""
    payload = b"0123456789"
    good: dict[str, int | bytes] = {
        "magic": b"PWFF",
        "version": 1,
        "run": hashlib.sha256(b"night-1").digest()[:8],
        "blob": bytes.fromhex(HASH),
        "index": 2,
        "count": 5,
        "length": len(payload),
        "crc": zlib.crc32(payload),
    }
    values = (good | fields).values()
    return struct.pack(">4s B xxx 8s 32s I I I I", *values) + payload


def test_a_packet_written_from_the_format_is_read() -> None:
    chunk = parse_chunk("night-1", packet())
    assert (chunk.blob, chunk.index, chunk.count, chunk.payload) == (HASH, 2, 5, b"0123456789")


def test_a_made_chunk_follows_the_format() -> None:
    made = make_chunk("night-1", HASH, BLOB, 2, 1_024)
    payload = BLOB[1_920:]
    assert made[:4] == b"PWFF"
    assert made[4:8] == b"\x01\0\0\0"
    assert made[8:16] == hashlib.sha256(b"night-1").digest()[:8]
    assert made[16:48].hex() == HASH
    assert made[48:64] == struct.pack(">4I", 2, 3, 128, zlib.crc32(payload))
    assert made[64:] == payload


def test_wire_bytes_are_the_blob_and_64_bytes_a_piece() -> None:
    assert HEADER_BYTES == 64
    # 36 adapters of size 10 in fp32: 2,323,872 bytes; 122,816 a piece -> 18.9; 61,376 -> 37.9
    assert chunk_count(2_323_872, CHUNK_BYTES) == 19
    assert wire_bytes(2_323_872, CHUNK_BYTES) == 2_323_872 + 19 * 64
    assert wire_bytes(2_323_872, SMALL_CHUNK_BYTES) == 2_323_872 + 38 * 64
    assert wire_bytes(1, 1_024) == 65
    assert wire_bytes(960, 1_024) == 1_024
    assert wire_bytes(961, 1_024) == 961 + 128


@given(st.binary(min_size=1, max_size=5_000), st.integers(65, 1_500), st.randoms())
def test_pieces_in_any_order_make_the_blob_and_the_stated_bytes(
    blob: bytes, chunk_bytes: int, rng: random.Random
) -> None:
    name = hashlib.sha256(blob).hexdigest()
    count = chunk_count(len(blob), chunk_bytes)
    packets = [make_chunk("r", name, blob, i, chunk_bytes) for i in range(count)]
    assert sum(map(len, packets)) == wire_bytes(len(blob), chunk_bytes)
    assert max(map(len, packets)) <= chunk_bytes
    rng.shuffle(packets)
    joined = bytearray(len(blob))
    for chunk in (parse_chunk("r", p) for p in packets):
        start = chunk.index * (chunk_bytes - 64)
        joined[start : start + len(chunk.payload)] = chunk.payload
    assert bytes(joined) == blob


@pytest.mark.parametrize(
    ("bad", "code"),
    [
        (packet(magic=b"HTTP"), "chunk"),
        (packet(version=2), "chunk"),
        (packet(run=b"\0" * 8), "run"),
        (packet(index=5), "chunk"),
        (packet(index=2**32 - 1), "chunk"),
        (packet(index=0, count=0), "chunk"),
        (packet(count=MAX_CHUNKS + 1), "chunk"),
        (packet(count=2**32 - 1), "chunk"),
        (packet(length=9), "chunk"),
        (packet(length=2**32 - 1), "chunk"),
        (packet(crc=0), "chunk"),
        (packet() + b"0", "chunk"),
    ],
    ids=lambda value: value if isinstance(value, str) else "packet",
)
def test_a_header_that_lies_is_refused(bad: bytes, code: str) -> None:
    with pytest.raises(ProtocolError) as caught:
        parse_chunk("night-1", bad)
    assert caught.value.code == code


def test_a_chunk_of_another_run_is_refused() -> None:
    with pytest.raises(ProtocolError) as caught:
        parse_chunk("night-2", packet())
    assert caught.value.code == "run"


@pytest.mark.parametrize("length", range(64 + 10))
def test_a_chunk_cut_anywhere_is_refused(length: int) -> None:
    with pytest.raises(ProtocolError):
        parse_chunk("night-1", packet()[:length])


@pytest.mark.parametrize("bit", range(8 * 10))
def test_a_flipped_bit_of_the_payload_is_refused(bit: int) -> None:
    bad = bytearray(packet())
    bad[64 + bit // 8] ^= 1 << bit % 8
    with pytest.raises(ProtocolError, match="CRC-32"):
        parse_chunk("night-1", bytes(bad))


@given(st.binary(max_size=200), st.booleans())
def test_arbitrary_bytes_are_a_chunk_or_a_protocol_error(noise: bytes, begun_well: bool) -> None:
    try:
        parse_chunk("night-1", packet()[:48] + noise if begun_well else noise)
        code = "read"
    except ProtocolError as err:
        code = err.code
    assert code in ("read", "chunk", "run")


def test_a_bitmap_has_its_least_significant_bit_first() -> None:
    # bits 0 and 9 of 10: 1 in the first byte, 2 in the second
    assert Missing(10, {0, 9}).bitmap() == "0102"
    assert Missing.from_bitmap("0102", 10).indices == {0, 9}
    assert Missing(12).bitmap() == "ff0f"
    assert Missing.from_bitmap("", 12).indices == set()
    assert Missing.from_bitmap("0f000000", 4).indices == {0, 1, 2, 3}


@given(st.integers(1, 300), st.data())
def test_a_set_of_pieces_survives_the_way_through_a_bitmap(count: int, data: st.DataObject) -> None:
    indices = data.draw(st.sets(st.integers(0, count - 1)))
    assert Missing.from_bitmap(Missing(count, set(indices)).bitmap(), count).indices == indices


@pytest.mark.parametrize(("bitmap", "count"), [("10", 4), ("0001", 8), ("zz", 8), ("f", 8)])
def test_a_bitmap_of_pieces_that_are_not_there_is_refused(bitmap: str, count: int) -> None:
    with pytest.raises(ProtocolError) as caught:
        Missing.from_bitmap(bitmap, count)
    assert caught.value.code == "bitmap"


def test_a_piece_is_missing_until_it_arrived_once() -> None:
    missing = Missing(3)
    assert missing.first(2) == [0, 1]
    assert missing.arrived(0)
    assert not missing.arrived(0)
    assert missing.first(9) == [1, 2]
    assert len(missing) == 2
    assert not missing.arrived(7)
    missing.arrived(1)
    missing.arrived(2)
    assert not missing


@pytest.mark.parametrize(
    ("largest", "fitting"),
    [
        (None, 122_880),
        (300_000, 122_880),
        (131_072, 122_880),  # AWS IoT Core
        (122_880, 61_440),  # the chunk alone would fit, its topic would not
        (65_536, 61_440),  # Alibaba
        (20_480, 19_968),
        (100, 1024),
    ],
)
def test_chunks_are_as_large_as_the_brokers_packets_allow(
    largest: int | None, fitting: int
) -> None:
    assert fitting_chunk_bytes(CHUNK_BYTES, largest) == fitting


def test_chunks_that_a_person_made_small_stay_so() -> None:
    assert fitting_chunk_bytes(4096, 65_536) == 4096
    assert fitting_chunk_bytes(4096, 4096) == 3584


def test_a_chunk_size_is_a_number_or_the_name_of_a_profile() -> None:
    read = TypeAdapter(ChunkBytes).validate_python
    assert (read("standard"), read("small"), read(50_000)) == (122_880, 61_440, 50_000)
    with pytest.raises(ValidationError, match="choose one of standard, small, or"):
        read("tiny")
    with pytest.raises(ValidationError, match="1024"):
        read(1023)
