"""What is decoded is what was encoded to the codec's precision, or a ProtocolError says why not."""

from __future__ import annotations

import json
import struct
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load, save

from device_profiles.modules import BaseShape, adapter_tensors
from messaging.chunks import CHUNK_BYTES, wire_bytes
from messaging.codecs import (
    CODECS,
    BlobHeader,
    decode_blob,
    encode_blob,
    max_blob_bytes,
    quantise_with_feedback,
    read_header,
)
from messaging.errors import ProtocolError
from messaging.layout import Layout, TensorSpec, Vector

F32 = npt.NDArray[np.float32]

LAYOUT = Layout(
    (
        TensorSpec(name="down.weight", shape=(2, 5), scale_axis=0),
        TensorSpec(name="down.bias", shape=(2,)),
        TensorSpec(name="up.weight", shape=(5, 2), scale_axis=1),
        TensorSpec(name="cube", shape=(2, 3, 4), scale_axis=1),
    )
)
GPT2_SMALL = Layout(
    tuple(
        TensorSpec(name=t.name, shape=t.shape, scale_axis=t.bottleneck_axis)
        for t in adapter_tensors(BaseShape(layers=12, width=768, inner=3072), 10)
    )
)

QUANTISED = [("int8", 127), ("int4", 7)]  # codec, and the largest step of either sign


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """Draw up to four small tensors, each with a scale axis or without."""
    specs = []
    for at in range(draw(st.integers(1, 4))):
        shape = tuple(draw(st.lists(st.integers(1, 7), min_size=1, max_size=3)))
        axis = draw(st.none() | st.integers(0, len(shape) - 1))
        specs.append(TensorSpec(name=f"t{at}", shape=shape, scale_axis=axis))
    return Layout(tuple(specs))


def header(codec: str, layout: Layout = LAYOUT, **fields: Any) -> BlobHeader:
    return BlobHeader.model_validate(
        {
            "run": "night-1",
            "round": 3,
            "sender": "pi5-07",
            "codec": codec,
            "layout": layout.sha256,
            "examples": 100,
            "train_loss": 2.5,
        }
        | fields
    )


def noise(layout: Layout = LAYOUT, *, seed: int = 0, scale: float = 1.0) -> Vector:
    return np.random.default_rng(seed).normal(0, scale, layout.size).astype(np.float32)


def through(codec: str, vector: Vector, layout: Layout = LAYOUT) -> Vector:
    return decode_blob(encode_blob(vector, layout, header(codec, layout)), layout)[1]


def refusal(blob: bytes, layout: Layout = LAYOUT) -> str:
    with pytest.raises(ProtocolError) as caught:
        decode_blob(blob, layout)
    return caught.value.code


def scale_groups(layout: Layout) -> list[npt.NDArray[np.intp]]:
    """Return the indices of the packed vector that share a scale, entry by entry."""
    groups: list[npt.NDArray[np.intp]] = []
    start = 0
    for spec in layout.specs:
        members: dict[int, list[int]] = {}
        for offset, place in enumerate(np.ndindex(*spec.shape)):
            key = 0 if spec.scale_axis is None else place[spec.scale_axis]
            members.setdefault(key, []).append(start + offset)
        groups += [np.array(m) for m in members.values()]
        start += spec.size
    return groups


@pytest.mark.parametrize("codec", CODECS)
def test_the_header_comes_back(codec: str) -> None:
    blob = encode_blob(noise(), LAYOUT, header(codec))
    assert read_header(blob) == header(codec)
    assert decode_blob(blob, LAYOUT)[0] == header(codec)


@pytest.mark.parametrize("codec", CODECS)
def test_a_vector_always_makes_the_same_bytes(codec: str) -> None:
    again = [encode_blob(noise(), LAYOUT, header(codec)) for _ in range(2)]
    assert again[0] == again[1]


def test_fp32_is_exact() -> None:
    vector = noise()
    vector[:4] = [0.0, -0.0, 1e-45, 3.4e38]
    assert through("fp32", vector).tobytes() == vector.tobytes()


def test_fp16_is_within_half_a_unit_in_the_last_place() -> None:
    vector = noise()  # 11 significant bits: relative error at most 2**-11
    error = np.abs(through("fp16", vector) - vector)
    assert (error <= np.abs(vector) * 2.0**-11).all()
    assert error.max() > 0


def test_fp16_keeps_tiny_values_to_the_smallest_step_there_is() -> None:
    vector = noise(scale=1e-6)  # below 2**-14 the step is 2**-24
    assert np.abs(through("fp16", vector) - vector).max() <= 2.0**-25


def test_fp16_bounds_what_is_out_of_its_range() -> None:
    vector = noise()
    vector[:3] = [1e6, -1e6, 65_504]
    assert through("fp16", vector)[:3].tolist() == [65_504, -65_504, 65_504]


@pytest.mark.parametrize(("codec", "most"), QUANTISED)
@given(layouts(), st.integers(0, 2**32 - 1), st.floats(-45, 37))
def test_a_quantised_value_is_within_half_a_step_of_its_scale(
    codec: str, most: int, layout: Layout, seed: int, exponent: float
) -> None:
    rng = np.random.default_rng(seed)
    magnitudes = 10.0 ** np.clip(rng.uniform(-3, 3, layout.size) + exponent, -46, 37.5)
    vector = (rng.uniform(-1, 1, layout.size) * magnitudes).astype(np.float32)
    decoded = through(codec, vector, layout)
    for group in scale_groups(layout):
        wanted = vector[group].astype(np.float64)
        step = np.abs(wanted).max() / most
        # The nearest step is half a step away. The scale that travels is fp32: it is off by 2**-24
        # of itself, or by 2**-150 where it is subnormal, `most` times over at the last step. The
        # quotient and the product are fp32 as well: 2**-24 of `most` steps each.
        slack = most * max(step * 2.0**-22, 2.0**-149)
        assert np.abs(decoded[group] - wanted).max() <= step / 2 + slack


@given(layouts(), st.integers(0, 2**32 - 1))
def test_int4_carries_two_values_a_byte_whatever_the_layout(layout: Layout, seed: int) -> None:
    vector = noise(layout, seed=seed)
    arrays = load(encode_blob(vector, layout, header("int4", layout)))
    assert arrays["packed"].size == -(-layout.size // 2)
    assert arrays["scales"].size == len(scale_groups(layout))
    np.testing.assert_array_equal(
        through("int4", -vector, layout), -through("int4", vector, layout)
    )


def test_int8_steps_by_hand() -> None:
    layout = Layout((TensorSpec(name="w", shape=(2, 3), scale_axis=0),))
    # steps 1 and 0.5: 0.4 -> 0, 63.6 -> 64; 0.3 -> 0.5, -0.2 -> 0
    vector = np.array([127, 0.4, 63.6, 0.3, -0.2, -63.5], np.float32)
    assert through("int8", vector, layout).tolist() == [127, 0, 64, 0.5, 0, -63.5]


def test_int4_steps_and_bytes_by_hand() -> None:
    layout = Layout(
        (
            TensorSpec(name="w", shape=(2, 3), scale_axis=0),
            TensorSpec(name="b", shape=(3,)),
        )
    )
    # steps 1, 0.5 and 2: -3.6 -> -4; -0.2 -> 0; 13 / 2 = 6.5 -> 6 (to even), -14 -> -7
    vector = np.array([7, 0.4, -3.6, 0.3, -0.2, 3.5, 13, -14, 2], np.float32)
    assert through("int4", vector, layout).tolist() == [7, 0, -4, 0.5, 0, 3.5, 12, -14, 2]
    arrays = load(encode_blob(vector, layout, header("int4", layout)))
    assert arrays["scales"].tolist() == [1, 0.5, 2]
    # steps 7 0, -4 1, 0 7, 6 -7, 1: the first of two is the low half, -4 is c, -7 is 9
    assert arrays["packed"].tobytes() == bytes.fromhex("07 1c 70 96 01")


@pytest.mark.parametrize(("codec", "most", "largest"), [("int8", 127, 190), ("int4", 7, 10)])
def test_where_the_scale_itself_is_rounded_down_the_last_step_is_the_limit(
    codec: str, most: int, largest: int
) -> None:
    layout = Layout((TensorSpec(name="b", shape=(2,)),))
    least = 2.0**-149  # the smallest fp32: 190 / 127 and 10 / 7 of it are rounded to one of it
    vector = np.array([largest * least, -largest * least], np.float32)
    assert (through(codec, vector, layout) / least).tolist() == [most, -most]


@pytest.mark.parametrize(("codec", "most"), QUANTISED)
@pytest.mark.parametrize("axis", [0, 1])
def test_each_entry_of_the_bottleneck_keeps_its_own_relative_precision(
    codec: str, most: int, axis: int
) -> None:
    magnitudes = np.array([1e-6, 1.0, 1e4], np.float32)
    shape = (3, 50) if axis == 0 else (50, 3)
    layout = Layout((TensorSpec(name="w", shape=shape, scale_axis=axis),))
    tensor = np.random.default_rng(1).uniform(-1, 1, (50, 3)).astype(np.float32) * magnitudes
    tensor = tensor if axis == 1 else tensor.T
    decoded = through(codec, tensor.reshape(-1), layout).reshape(shape)
    error = np.abs(decoded - tensor).max(axis=1 - axis) / np.abs(tensor).max(axis=1 - axis)
    # half of one step, nearly met by one of 50; with one scale the smallest would be all zero
    assert error == pytest.approx([0.5 / most] * 3, rel=0.2)


@pytest.mark.parametrize("codec", CODECS)
def test_zeros_stay_zeros(codec: str) -> None:
    assert not through(codec, np.zeros(LAYOUT.size, np.float32)).any()


@pytest.mark.parametrize(("codec", "most"), QUANTISED)
def test_zeros_beside_values_stay_zeros(codec: str, most: int) -> None:
    vector = np.zeros(LAYOUT.size, np.float32)
    vector[0] = most
    assert through(codec, vector).tolist() == vector.tolist()


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_update_that_diverged_is_refused_at_the_other_end(codec: str, value: float) -> None:
    vector = noise()
    vector[3] = value
    assert refusal(encode_blob(vector, LAYOUT, header(codec))) == "finite"


@pytest.mark.parametrize(
    ("codec", "payload", "ratio"),
    [
        ("fp32", 2_323_872, 1.0),  # 4 * 580,968
        ("fp16", 1_161_936, 0.5),  # 2 * 580,968
        ("int8", 584_136, 0.25136),  # 580,968 + 4 * 792
        ("int4", 293_652, 0.12636),  # 290,484 + 4 * 792
    ],
)
def test_gpt2_small_adapters_cost_what_the_codec_says(
    codec: str, payload: int, ratio: float
) -> None:
    # 36 * (2*768*10 + 768 + 10) parameters; a scale for each of 10 rows, 10 columns and 2 biases
    assert GPT2_SMALL.size == 580_968
    assert GPT2_SMALL.scales == 36 * 22 == 792
    blob = encode_blob(noise(GPT2_SMALL), GPT2_SMALL, header(codec, GPT2_SMALL))
    assert payload < len(blob) < payload + 1_024  # one JSON header
    on_the_wire = wire_bytes(len(blob), CHUNK_BYTES)
    assert on_the_wire > payload
    # the headers of a blob and of up to 19 chunks, each below 200 bytes: 4 kB of 2.3 MB
    assert on_the_wire / (4 * 580_968) == pytest.approx(ratio, abs=0.002)


@pytest.mark.parametrize(("codec", "most"), QUANTISED)
def test_gpt2_small_adapters_are_decoded_within_half_a_step(codec: str, most: int) -> None:
    vector = noise(GPT2_SMALL)
    # a step is max / most, and no scale has a maximum beyond six standard deviations
    assert np.abs(through(codec, vector, GPT2_SMALL) - vector).max() <= 6 / (2 * most)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("layout", [LAYOUT, GPT2_SMALL])
def test_no_blob_is_larger_than_its_bound(codec: str, layout: Layout) -> None:
    blob = encode_blob(noise(layout), layout, header(codec, layout))
    assert len(blob) <= max_blob_bytes(layout, codec) <= len(blob) + 16_384


def test_a_layout_without_tensors_makes_an_empty_update() -> None:
    layout = Layout(())
    for codec in CODECS:
        assert through(codec, np.zeros(0, np.float32), layout).shape == (0,)


# --- what a hostile sender may try ---


def forged(arrays: dict[str, Any], **fields: Any) -> bytes:
    """Return a well-formed safetensors file with these arrays and a header with these fields."""
    codec = fields.pop("codec", "fp32")
    meta = json.loads(header(codec).model_dump_json()) | fields
    return bytes(save(arrays, metadata={"pwff": json.dumps(meta)}))


def raw(head: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(head)) + head + data


def named(
    dtype: str, shape: list[int], offsets: list[int], data: bytes = b"", *, padding: int = 0
) -> bytes:
    """Return a file whose one tensor is described by hand, its header followed by spaces."""
    meta = {"pwff": header("fp32").model_dump_json()}
    tensor = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
    head = json.dumps({"__metadata__": meta, "packed": tensor}).encode()
    return raw(head + b" " * padding, data)


ZEROS = np.zeros(LAYOUT.size, np.float32)
CODES = np.zeros(LAYOUT.size, np.int8)
HALVES = np.zeros(LAYOUT.size // 2, np.uint8)  # LAYOUT has 46 entries
SCALES = np.zeros(LAYOUT.scales, np.float32)
FULL = 4 * LAYOUT.size


def test_the_forge_makes_files_that_pass_when_nothing_is_wrong() -> None:
    assert not decode_blob(forged({"packed": ZEROS}), LAYOUT)[1].any()
    int8 = forged({"packed": CODES, "scales": SCALES}, codec="int8")
    assert not decode_blob(int8, LAYOUT)[1].any()
    int4 = forged({"packed": HALVES, "scales": SCALES}, codec="int4")
    assert not decode_blob(int4, LAYOUT)[1].any()
    size = 4 * LAYOUT.size
    by_hand = named("F32", [LAYOUT.size], [0, size], bytes(size), padding=1_000)
    assert not decode_blob(by_hand, LAYOUT)[1].any()


def test_tensors_that_share_bytes_are_refused() -> None:
    blob = forged({"packed": CODES, "scales": SCALES}, codec="int8")
    (length,) = struct.unpack_from("<Q", blob)
    table = json.loads(blob[8 : 8 + length])
    table["packed"]["data_offsets"] = [0, LAYOUT.size]
    table["scales"]["data_offsets"] = [0, 4 * LAYOUT.scales]
    data = blob[8 + length :][: max(LAYOUT.size, 4 * LAYOUT.scales)]  # as much as they say
    assert refusal(raw(json.dumps(table).encode(), data)) == "format"


def test_a_view_of_a_file_is_read_without_a_copy() -> None:
    blob = memoryview(encode_blob(noise(), LAYOUT, header("fp32")))
    head, vector = decode_blob(blob, LAYOUT)
    assert head == header("fp32")
    assert np.shares_memory(vector, np.frombuffer(blob, np.uint8))
    assert vector.tobytes() == noise().tobytes()


def test_a_header_of_more_than_16_kib_is_not_read() -> None:
    size = 4 * LAYOUT.size
    blob = named("F32", [LAYOUT.size], [0, size], bytes(size), padding=16_384)
    assert refusal(blob) == "format"


@pytest.mark.parametrize(
    ("blob", "code"),
    [
        (forged({"packed": ZEROS, "lora_A": ZEROS}), "name"),
        (forged({"PACKED": ZEROS}), "name"),
        (forged({}), "name"),
        (forged({"packed": CODES}, codec="int8"), "name"),
        (forged({"packed": ZEROS, "scales": SCALES}), "name"),
        (forged({"packed": ZEROS.astype(np.float16)}), "dtype"),
        (forged({"packed": ZEROS.astype(np.float64)}), "dtype"),
        (forged({"packed": ZEROS.astype(np.int32)}), "dtype"),
        (forged({"packed": ZEROS}, codec="fp16"), "dtype"),
        (
            forged({"packed": CODES, "scales": SCALES.astype(np.float64)}, codec="int8"),
            "dtype",
        ),
        (forged({"packed": ZEROS[1:]}), "shape"),
        (forged({"packed": ZEROS.reshape(1, -1)}), "shape"),
        (forged({"packed": ZEROS[:0]}), "shape"),
        (forged({"packed": CODES, "scales": SCALES[1:]}, codec="int8"), "shape"),
        (forged({"packed": HALVES}, codec="int4"), "name"),
        (forged({"packed": HALVES, "scales": SCALES}, codec="int8"), "dtype"),
        (forged({"packed": HALVES.view(np.int8), "scales": SCALES}, codec="int4"), "dtype"),
        (forged({"packed": HALVES[1:], "scales": SCALES}, codec="int4"), "shape"),
        (forged({"packed": HALVES, "scales": SCALES[1:]}, codec="int4"), "shape"),
        (forged({"packed": HALVES + 0x80, "scales": SCALES}, codec="int4"), "range"),
        (
            forged({"packed": HALVES, "scales": SCALES + np.float32(np.nan)}, codec="int4"),
            "finite",
        ),
        (
            forged({"packed": HALVES + 7, "scales": SCALES + np.float32(1e38)}, codec="int4"),
            "finite",
        ),
        (forged({"packed": ZEROS + np.float32(np.nan)}), "finite"),
        (forged({"packed": ZEROS - np.float32(np.inf)}), "finite"),
        (
            forged({"packed": CODES, "scales": SCALES + np.float32(np.inf)}, codec="int8"),
            "finite",
        ),
        (
            forged({"packed": CODES + 127, "scales": SCALES + np.float32(3e38)}, codec="int8"),
            "finite",
        ),
        (forged({"packed": ZEROS}, layout="0" * 64), "layout"),
        (forged({"packed": ZEROS}, layout="short"), "format"),
        (forged({"packed": ZEROS}, codec="fp32", extra=1), "format"),
        (forged({"packed": ZEROS}, sender="../x"), "format"),
        (forged({"packed": ZEROS}, examples=-1), "format"),
        (forged({"packed": ZEROS}, examples=1.5), "format"),
        (forged({"packed": ZEROS}, train_loss=float("nan")), "format"),
        (forged({"packed": ZEROS}, run=None), "format"),
        (bytes(save({"packed": ZEROS})), "format"),
        (bytes(save({"packed": ZEROS}, metadata={"pwff": "null"})), "format"),
        (bytes(save({"packed": ZEROS}, metadata={"pwff": "[" * 10_000})), "format"),
        (bytes(save({"packed": ZEROS}, metadata={"pwff": "x" * 20_000})), "format"),
        (b"", "format"),
        (b"\0" * 7, "format"),
        (b"\0" * 8, "format"),
        (b"\xff" * 100, "format"),
        (raw(b"[" * 16_000), "format"),
        (raw(b'{"__metadata__": {"pwff": ' + b"[" * 16_000), "format"),
        (raw(b'{"__metadata__": []}'), "format"),
        (raw(b'{"__metadata__": {"pwff": {"run": 1}}}'), "format"),
        (raw(b'{"__metadata__": {"pwff": "\\ud800"}}'), "format"),
        (raw(b'{"__metadata__": {"pwff": ' + b"1" * 10_000 + b"}}"), "format"),
        (raw(b"\xff\xfe" * 10), "format"),
        (named("F32", [LAYOUT.size], [0, 8], bytes(8)), "format"),
        (named("F32", [LAYOUT.size], [0, 2**63], bytes(8)), "format"),
        (named("F32", [2**62, 4], [0, 0]), "shape"),
        (named("F32", [-1], [0, 4], bytes(4)), "format"),
        (named("F32", [2], [0, 8], bytes(9)), "shape"),
        (named("BF16", [2], [0, 4], bytes(4)), "dtype"),
        (named("X99", [2], [0, 4], bytes(4)), "dtype"),
        (named("F32", [LAYOUT.size], [0, FULL], bytes(FULL + 1)), "format"),
        (named("F32", [LAYOUT.size], [1, FULL + 1], bytes(FULL + 1)), "format"),
        (named("F32", [LAYOUT.size], [-FULL, 0], bytes(FULL)), "format"),
        (named("F32", [LAYOUT.size], [0, FULL], bytes(FULL - 1)), "format"),
    ],
    ids=lambda value: value if isinstance(value, str) else "blob",
)
def test_what_is_not_an_update_of_this_layout_is_refused(blob: bytes, code: str) -> None:
    assert refusal(blob) == code


@pytest.mark.parametrize("byte", range(256))
def test_a_byte_of_int4_is_two_steps_from_minus_seven_to_seven_or_refused(byte: int) -> None:
    pair, single = (Layout((TensorSpec(name="b", shape=(n,)),)) for n in (2, 1))
    # two's complement by hand: 0 to 7, the refused -8, then -7 to -1; the low half is the first
    steps = [0, 1, 2, 3, 4, 5, 6, 7, None, -7, -6, -5, -4, -3, -2, -1]
    first, second = steps[byte % 16], steps[byte // 16]
    arrays = {"packed": np.array([byte], np.uint8), "scales": np.array([0.5], np.float32)}

    def sent(layout: Layout) -> bytes:
        return forged(arrays, codec="int4", layout=layout.sha256)

    if first is None or second is None:
        assert refusal(sent(pair), pair) == "range"
    else:
        assert decode_blob(sent(pair), pair)[1].tolist() == [first / 2, second / 2]
    if first is None or second != 0:  # a single value leaves the high half empty
        assert refusal(sent(single), single) == "range"
    else:
        assert decode_blob(sent(single), single)[1].tolist() == [first / 2]


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "I8", "BOOL", "C64", "F8_E4M3", "F4"])
@pytest.mark.parametrize("shape", [[0, 2**64 - 1], [0, 2**63], [0] * 40, [2**40, 0], [0], []])
def test_an_impossible_shape_is_refused(dtype: str, shape: list[int]) -> None:
    assert refusal(named(dtype, shape, [0, 0])) in ("format", "dtype", "shape")


@given(st.binary(max_size=300))
def test_arbitrary_bytes_are_no_update(noise_bytes: bytes) -> None:
    assert refusal(noise_bytes) == "format"
    assert refusal(raw(noise_bytes, noise_bytes)) == "format"
    with pytest.raises(ProtocolError):
        read_header(noise_bytes)


@given(st.data(), st.sampled_from(sorted(CODECS)))
def test_an_update_with_bytes_replaced_is_an_update_or_a_protocol_error(
    data: st.DataObject, codec: str
) -> None:
    blob = bytearray(encode_blob(noise(), LAYOUT, header(codec)))
    for _ in range(data.draw(st.integers(1, 4))):
        blob[data.draw(st.integers(0, len(blob) - 1))] = data.draw(st.integers(0, 255))
    try:
        vector = decode_blob(bytes(blob), LAYOUT)[1]
    except ProtocolError:
        return
    assert vector.shape == (LAYOUT.size,)
    assert np.isfinite(vector).all()


@given(st.integers(0, 400))
def test_an_update_cut_short_is_refused(length: int) -> None:
    blob = encode_blob(noise(), LAYOUT, header("fp32"))
    assert refusal(blob[: min(length, len(blob) - 1)]) == "format"
    assert refusal(blob[:-1]) == "format"
    assert refusal(blob + b"\0") == "format"


# --- error feedback ---


@pytest.mark.parametrize("codec", CODECS)
def test_what_was_sent_and_what_is_left_sum_to_what_was_wanted(codec: str) -> None:
    rng = np.random.default_rng(7)
    differences = [noise(seed=int(rng.integers(2**31)), scale=0.01) for _ in range(30)]
    residual: F32 | None = None
    sent = np.zeros(LAYOUT.size)
    alone = np.zeros(LAYOUT.size)
    for difference in differences:
        wanted, residual = quantise_with_feedback(difference, residual, LAYOUT, codec)
        sent += through(codec, wanted)
        alone += through(codec, difference)
    assert residual is not None
    total = np.sum(differences, axis=0, dtype=np.float64)
    # 30 roundings of fp32 sums below 0.1
    np.testing.assert_allclose(sent + residual, total, atol=30 * 0.1 * 2.0**-24)
    if codec == "fp32":
        assert not residual.any()
    else:
        assert np.abs(sent - total).sum() < np.abs(alone - total).sum()


def test_what_int8_leaves_out_stays_below_half_a_step_however_many_rounds() -> None:
    layout = Layout((TensorSpec(name="w", shape=(1, 2), scale_axis=0),))
    difference = np.array([127.0, 0.3], np.float32)  # a step of 1: alone, 0.3 is never sent
    residual: F32 | None = None
    sent = np.zeros(2)
    for rounds in range(1, 41):
        wanted, residual = quantise_with_feedback(difference, residual, layout, "int8")
        sent += through("int8", wanted, layout)
        assert sent[1] == pytest.approx(0.3 * rounds, abs=0.5 + 1e-3)
    assert sent[1] == pytest.approx(12.0, abs=0.5 + 1e-3)


@pytest.mark.parametrize(("codec", "most"), QUANTISED)
@given(layouts(), st.integers(0, 2**32 - 1), st.integers(1, 40))
def test_the_same_difference_again_and_again_is_sent_but_for_a_bounded_rest(
    codec: str, most: int, layout: Layout, seed: int, rounds: int
) -> None:
    difference = np.random.default_rng(seed).standard_t(2, layout.size).astype(np.float32)
    residual: F32 | None = None
    sent = np.zeros(layout.size)
    for _ in range(rounds):
        wanted, residual = quantise_with_feedback(difference, residual, layout, codec)
        sent += through(codec, wanted, layout)
    for group in scale_groups(layout):
        largest = np.abs(difference[group]).max()
        # With D the largest difference of a scale and R the largest rest, a step is at most
        # (D + R) / most and the next rest half of it: R stays below D / (2 * most - 1) for ever.
        # Each round rounds a sum and a difference of fp32, both below 2 D: 2**-22 D.
        bound = largest / (2 * most - 1) + rounds * largest * 2.0**-22
        owed = rounds * difference[group].astype(np.float64)
        assert np.abs(sent[group] - owed).max() <= bound


@pytest.mark.parametrize(("codec", "most"), QUANTISED)
def test_without_feedback_what_is_left_out_grows_with_the_rounds(codec: str, most: int) -> None:
    difference = noise()
    residual: F32 | None = None
    sent = np.zeros(LAYOUT.size)
    for _ in range(200):
        wanted, residual = quantise_with_feedback(difference, residual, LAYOUT, codec)
        sent += through(codec, wanted)
    owed = 200 * difference.astype(np.float64)
    alone = 200.0 * through(codec, difference)
    # 200 times an error near half a step of D / most, against at most D / (2 * most - 1) in all
    assert np.abs(alone - owed).max() > 50 * np.abs(sent - owed).max()
    assert np.abs(sent - owed).max() / 200 < np.abs(difference).max() / (200 * (2 * most - 1)) * 1.1


def test_a_residual_that_was_not_committed_changes_nothing() -> None:
    first = quantise_with_feedback(noise(), None, LAYOUT, "int8")
    residual = first[1].copy()
    kept = residual.copy()
    quantise_with_feedback(noise(seed=1), residual, LAYOUT, "int8")
    np.testing.assert_array_equal(residual, kept)
    np.testing.assert_array_equal(first[0], noise())
