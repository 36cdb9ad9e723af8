"""How a packed vector becomes bytes: fp32, fp16, and int8 or int4 scaled along the bottleneck axis.

An encoded vector is a set of named arrays (``packed``, and ``scales`` where the codec has them)
inside a safetensors file whose metadata holds one JSON header. Nothing is ever unpickled.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import numpy.typing as npt
from pydantic import Field, TypeAdapter
from safetensors.numpy import save

from messaging.chunks import Bytes
from messaging.errors import ProtocolError
from messaging.layout import Layout, TensorSpec, Vector
from messaging.protocol import Codec, Count, Identifier, Loss, Record, Round, Sha256

Arrays = dict[str, npt.NDArray[np.generic]]

_MAX_HEADER_BYTES = 16_384
_KINDS = {"F32": "float32", "F16": "float16", "I8": "int8", "U8": "uint8"}  # of safetensors


class BlobHeader(Record):
    """What a blob says of itself, inside the hash that names it."""

    run: Identifier
    round: Round
    sender: Identifier
    codec: Codec
    layout: Sha256
    examples: Count
    train_loss: Loss | None = None


@dataclass(frozen=True, kw_only=True)
class CodecRow:
    """One row of the codec table: two functions and what they make."""

    encode: Callable[[Vector, Layout], Arrays]
    decode: Callable[[Arrays, Layout], Vector]
    arrays: Callable[[Layout], dict[str, tuple[str, tuple[int, ...]]]]


def _segments(vector: Vector, layout: Layout) -> Iterator[tuple[TensorSpec, Vector]]:
    """Yield each tensor as rows that share a scale. Shape (scales, entries a scale)."""
    start = 0
    for spec in layout.specs:
        tensor = vector[start : start + spec.size].reshape(spec.shape)
        rows = tensor if spec.scale_axis is None else np.moveaxis(tensor, spec.scale_axis, 0)
        yield spec, rows.reshape(spec.scales, -1)
        start += spec.size


def _quantise(vector: Vector, layout: Layout, most: int) -> Arrays:
    """Round to the nearest of the steps ``-most`` to ``most`` of ``max |x| / most`` per scale.

    A value that is not finite makes its scale not finite, and the receiver refuses the blob.
    """
    packed = np.empty(layout.size, np.int8)
    scales = np.empty(layout.scales, np.float32)
    start = at = 0
    for spec, rows in _segments(vector, layout):
        scale = (np.abs(rows).max(axis=1) / np.float32(most)).astype(np.float32)
        safe = np.where(scale > 0, scale, np.float32(1))
        with np.errstate(invalid="ignore"):
            steps = np.clip(np.rint(rows / safe[:, None]), -most, most)  # subnormal scale: coarse
            packed[start : start + spec.size] = steps.reshape(-1)
        scales[at : at + spec.scales] = scale
        start += spec.size
        at += spec.scales
    return {"packed": packed, "scales": scales}


def _dequantise(arrays: Arrays, layout: Layout) -> Vector:
    """Return the vector; the packed integers lie scale by scale, not in the tensor's own order."""
    vector = np.empty(layout.size, np.float32)
    start = at = 0
    for spec in layout.specs:
        rows = arrays["packed"][start : start + spec.size].reshape(spec.scales, -1)
        scale = arrays["scales"][at : at + spec.scales].astype(np.float32)
        with np.errstate(over="ignore"):  # an infinity is refused by whoever reads the vector
            values = rows.astype(np.float32) * scale[:, None]
        if spec.scale_axis is not None:
            axis = spec.scale_axis
            rest = spec.shape[:axis] + spec.shape[axis + 1 :]
            values = np.moveaxis(values.reshape(spec.shape[axis], *rest), 0, axis)
        vector[start : start + spec.size] = values.reshape(-1)
        start += spec.size
        at += spec.scales
    return vector


def _int4_encode(vector: Vector, layout: Layout) -> Arrays:
    """Round to the nearest of 15 steps, and put two of them in a byte, the first one low.

    A scale is fp32, as that of int8: half precision spares 0.5 % of GPT-2-small's bytes, and is
    coarse where the largest entry is below 4e-4. A spare half byte at the end is zero.
    """
    arrays = _quantise(vector, layout, 7)
    nibbles = np.zeros(layout.size + layout.size % 2, np.uint8)
    nibbles[: layout.size] = arrays["packed"].view(np.uint8) & 15
    return arrays | {"packed": nibbles[::2] | nibbles[1::2] << 4}


def _int4_decode(arrays: Arrays, layout: Layout) -> Vector:
    """Return the vector.

    Raises:
        ProtocolError: With code ``range``, if a step is -8, or the last byte's spare half is used.
    """
    packed = arrays["packed"].astype(np.uint8)
    nibbles = np.stack([packed & 15, packed >> 4], axis=1).reshape(-1)
    if (nibbles == 8).any():
        raise ProtocolError("range", "'packed' holds the step -8; int4 has -7 to 7")
    if nibbles[layout.size :].any():
        raise ProtocolError("range", "'packed' uses the half byte behind its last step; it is 0")
    steps = (nibbles[: layout.size] ^ 8).astype(np.int8) - np.int8(8)  # two's complement
    return _dequantise(arrays | {"packed": steps}, layout)


def _fp16_encode(vector: Vector, _layout: Layout) -> Arrays:
    """Round to half precision; a finite value beyond its range becomes the largest there is."""
    limit = np.float32(np.finfo(np.float16).max)
    bounded = np.where(np.isfinite(vector), np.clip(vector, -limit, limit), vector)
    return {"packed": bounded.astype(np.float16)}


CODECS: dict[str, CodecRow] = {
    "fp32": CodecRow(
        encode=lambda vector, _layout: {"packed": vector},
        decode=lambda arrays, _layout: arrays["packed"].astype(np.float32, copy=False),
        arrays=lambda layout: {"packed": ("float32", (layout.size,))},
    ),
    "fp16": CodecRow(
        encode=_fp16_encode,
        decode=lambda arrays, _layout: arrays["packed"].astype(np.float32),
        arrays=lambda layout: {"packed": ("float16", (layout.size,))},
    ),
    "int8": CodecRow(
        encode=lambda vector, layout: _quantise(vector, layout, 127),
        decode=_dequantise,
        arrays=lambda layout: {
            "packed": ("int8", (layout.size,)),
            "scales": ("float32", (layout.scales,)),
        },
    ),
    "int4": CodecRow(
        encode=_int4_encode,
        decode=_int4_decode,
        arrays=lambda layout: {
            "packed": ("uint8", ((layout.size + 1) // 2,)),
            "scales": ("float32", (layout.scales,)),
        },
    ),
}


def encode_blob(vector: Vector, layout: Layout, header: BlobHeader) -> bytes:
    """Return a safetensors file that holds ``vector`` in the header's codec."""
    arrays = CODECS[header.codec].encode(vector, layout)
    return bytes(save(arrays, metadata={"pwff": header.model_dump_json()}))


def max_blob_bytes(layout: Layout, codec: str) -> int:
    """Return a bound on a blob's size, so that an offer of more is refused unread."""
    arrays = CODECS[codec].arrays(layout).values()
    return _MAX_HEADER_BYTES + sum(np.dtype(kind).itemsize * shape[0] for kind, shape in arrays)


def read_header(blob: Bytes) -> BlobHeader:
    """Return the JSON header of a blob.

    Raises:
        ProtocolError: If it is no safetensors file with a valid header.
    """
    return _read_table(blob)[0]


def decode_blob(blob: Bytes, layout: Layout) -> tuple[BlobHeader, Vector]:
    """Return header and vector of a blob, after every check that needs no model.

    The vector may be a view of the blob, which cannot be written to.

    Raises:
        ProtocolError: With code ``format``, ``layout``, ``name``, ``shape``, ``dtype``,
            ``range`` or ``finite``: what arrived is not an update of this layout.
    """
    header, table, start = _read_table(blob)
    if header.layout != layout.sha256:
        raise ProtocolError("layout", f"update of layout {header.layout[:12]}, not this run's")
    codec = CODECS[header.codec]
    expected = codec.arrays(layout)
    if set(table) != set(expected):
        stranger = sorted(set(table) ^ set(expected))[0]
        raise ProtocolError(
            "name", f"tensor '{stranger[:80]}' is not what the {header.codec} codec carries"
        )
    for name, (dtype, shape) in expected.items():
        kind = _KINDS.get(table[name].dtype, table[name].dtype[:80])
        if kind != dtype:
            raise ProtocolError("dtype", f"'{name}' is {kind}; expected {dtype}")
        if table[name].shape != shape:
            raise ProtocolError("shape", f"'{name}' is not of shape {shape}")
    arrays = _arrays(memoryview(blob)[start:], table, expected)
    for name, array in arrays.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise ProtocolError("finite", f"'{name}' holds a value that is not finite")
    vector = codec.decode(arrays, layout)
    if vector is not arrays["packed"] and not np.isfinite(vector).all():
        raise ProtocolError("finite", "the decoded update holds a value that is not finite")
    return header, vector


class _Entry(Record):
    """Where a tensor lies in a safetensors file, and what it is."""

    dtype: str
    shape: tuple[Annotated[int, Field(ge=0)], ...]
    data_offsets: tuple[int, int]


_TABLE = TypeAdapter(dict[str, _Entry])


def _read_table(blob: Bytes) -> tuple[BlobHeader, dict[str, _Entry], int]:
    """Return a blob's own header, what it says of each tensor, and where its data begin.

    Read here and not by the library, which copies every tensor that it reads: most of an
    aggregator's work on an update is to look at it once.
    """
    if len(blob) < 8:
        raise ProtocolError("format", "update is shorter than a safetensors header")
    (length,) = struct.unpack_from("<Q", blob)
    if length > min(_MAX_HEADER_BYTES, len(blob) - 8):
        raise ProtocolError("format", f"safetensors header of {length} bytes")
    try:
        said = json.loads(bytes(blob[8 : 8 + length]))
        header = BlobHeader.model_validate_json(said.pop("__metadata__")["pwff"])
        return header, _TABLE.validate_json(json.dumps(said)), 8 + length
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as err:
        raise ProtocolError("format", "update has no valid header") from err


def _arrays(
    data: memoryview, table: dict[str, _Entry], expected: dict[str, tuple[str, tuple[int, ...]]]
) -> Arrays:
    """Return views of tensors whose types and shapes are known; they must fill the data."""
    arrays: Arrays = {}
    at = 0
    for name, entry in sorted(table.items(), key=lambda item: item[1].data_offsets):
        dtype, shape = np.dtype(expected[name][0]), expected[name][1]
        begin, end = entry.data_offsets
        if (begin, end) != (at, at + dtype.itemsize * math.prod(shape)) or end > len(data):
            raise ProtocolError("format", f"'{name}' does not lie where an update has it")
        arrays[name] = np.frombuffer(data[begin:end], dtype).reshape(shape)
        at = end
    if at != len(data):
        raise ProtocolError("format", f"{len(data) - at} bytes behind the last tensor")
    return {name: arrays[name] for name in expected}


def quantise_with_feedback(
    difference: Vector, residual: Vector | None, layout: Layout, codec: str
) -> tuple[Vector, Vector]:
    """Return the vector to encode and the error that its decoding will leave.

    The difference is sent with what earlier rounds left out (error feedback, Seide et al. 2014).
    The caller keeps the new residual only once the update was aggregated.
    """
    wanted = difference if residual is None else difference + residual
    row = CODECS[codec]
    return wanted, wanted - row.decode(row.encode(wanted, layout), layout)
