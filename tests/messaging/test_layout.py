"""Only what the layout names can be packed, in the layout's order."""

from __future__ import annotations

import numpy as np
import pytest

from messaging.errors import PrivateTensorError, ProtocolError
from messaging.layout import Layout, TensorSpec

DOWN = TensorSpec(name="adapters.0.mlp.down.weight", shape=(2, 3), scale_axis=0)
BIAS = TensorSpec(name="adapters.0.mlp.down.bias", shape=(2,))
UP = TensorSpec(name="adapters.0.mlp.up.weight", shape=(3, 2), scale_axis=1)
LAYOUT = Layout((DOWN, BIAS, UP))
TENSORS = {
    UP.name: np.arange(8, 14, dtype=np.float32).reshape(3, 2),
    DOWN.name: np.arange(6, dtype=np.float32).reshape(2, 3),
    BIAS.name: np.array([6, 7], dtype=np.float32),
}


def test_tensors_are_packed_in_the_order_of_the_layout() -> None:
    packed = LAYOUT.pack(TENSORS)
    assert packed.tolist() == list(range(14))
    assert packed.dtype == np.float32


def test_unpacking_undoes_packing() -> None:
    again = LAYOUT.unpack(LAYOUT.pack(TENSORS))
    assert list(again) == [DOWN.name, BIAS.name, UP.name]
    for name, tensor in TENSORS.items():
        np.testing.assert_array_equal(again[name], tensor)


def test_entries_and_scales_are_counted() -> None:
    # 6 + 2 + 6 entries; 2 rows, one for the bias, 2 columns
    assert (LAYOUT.size, LAYOUT.scales) == (14, 5)
    assert Layout(()).size == 0
    assert Layout(()).pack({}).shape == (0,)


@pytest.mark.parametrize(
    ("count", "entries", "scales"), [(0, 0, 0), (1, 6, 2), (2, 8, 3), (3, 14, 5)]
)
def test_the_first_tensors_are_a_layout_whose_vector_begins_the_whole_one(
    count: int, entries: int, scales: int
) -> None:
    first = LAYOUT.first(count)
    assert first.specs == LAYOUT.specs[:count]
    assert (first.size, first.scales) == (entries, scales)
    some = {name: tensor for name, tensor in TENSORS.items() if name in first.names}
    assert first.pack(some).tolist() == LAYOUT.pack(TENSORS)[:entries].tolist()
    assert (first.sha256 == LAYOUT.sha256) == (count == 3)


def test_a_tensor_behind_the_first_cannot_be_packed_with_them() -> None:
    with pytest.raises(PrivateTensorError, match=UP.name):
        LAYOUT.first(2).pack(TENSORS)


def test_a_lora_tensor_is_refused_by_name() -> None:
    name = "transformer.h.0.attn.c_attn.query.lora_A.weight"
    with pytest.raises(PrivateTensorError, match=name) as caught:
        LAYOUT.pack(TENSORS | {name: np.zeros((2, 3), np.float32)})
    assert caught.value.code == "private"


def test_a_lora_tensor_is_refused_even_in_the_place_of_a_shared_one() -> None:
    tensors = dict(TENSORS)
    tensors["transformer.h.0.mlp.c_fc.lora_B.weight"] = tensors.pop(UP.name)
    with pytest.raises(PrivateTensorError, match="lora_B"):
        LAYOUT.pack(tensors)


def test_an_absent_tensor_is_named() -> None:
    with pytest.raises(ProtocolError, match=BIAS.name) as caught:
        LAYOUT.pack({DOWN.name: TENSORS[DOWN.name], UP.name: TENSORS[UP.name]})
    assert caught.value.code == "name"


@pytest.mark.parametrize("shape", [(2, 3), (6,), (3, 2, 1), ()])
def test_a_tensor_of_another_shape_is_named(shape: tuple[int, ...]) -> None:
    with pytest.raises(ProtocolError, match=UP.name) as caught:
        LAYOUT.pack(TENSORS | {UP.name: np.zeros(shape, np.float32)})
    assert caught.value.code == "shape"


@pytest.mark.parametrize("shape", [(13,), (15,), (1, 14), (0,)])
def test_a_vector_of_another_length_is_not_unpacked(shape: tuple[int, ...]) -> None:
    with pytest.raises(ProtocolError) as caught:
        LAYOUT.unpack(np.zeros(shape, np.float32))
    assert caught.value.code == "shape"


@pytest.mark.parametrize(
    "other",
    [
        Layout((BIAS, DOWN, UP)),
        Layout((DOWN, BIAS)),
        Layout((DOWN, BIAS, TensorSpec(name=UP.name, shape=(2, 3), scale_axis=1))),
        Layout((DOWN, BIAS, TensorSpec(name=UP.name, shape=(3, 2), scale_axis=0))),
        Layout((DOWN, BIAS, TensorSpec(name=UP.name, shape=(3, 2)))),
        Layout((DOWN, BIAS, TensorSpec(name="adapters.1.mlp.up.weight", shape=(3, 2)))),
    ],
)
def test_order_names_shapes_and_scale_axes_are_in_the_hash(other: Layout) -> None:
    assert other.sha256 != LAYOUT.sha256
    assert Layout((DOWN, BIAS, UP)).sha256 == LAYOUT.sha256
