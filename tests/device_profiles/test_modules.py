"""Sites, names and sizes of adapters and LoRA modules, held against GPT-2 small by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from device_profiles.errors import InputError
from device_profiles.modules import (
    BaseShape,
    adapter_name,
    adapter_sites,
    adapter_tensors,
    first_lora_sites,
    is_lora,
    lora_rank,
    lora_sites,
    lora_tensors,
)

SMALL = BaseShape(layers=12, width=768, inner=3072)

shapes = st.builds(
    lambda layers, width, factor: BaseShape(layers=layers, width=width, inner=factor * width),
    st.integers(1, 24), st.integers(1, 256), st.integers(1, 4),
)  # fmt: skip


def lora_parameters(placement: str, count: int, rank: int) -> int:
    sites = first_lora_sites(SMALL, placement, count)
    return sum(tensor.size for tensor in lora_tensors(sites, rank))


def test_36_adapters_of_size_10_on_gpt2_small_hold_580968_parameters() -> None:
    # 12 blocks * 3 sites * (2*768*10 + 768 + 10)
    assert sum(tensor.size for tensor in adapter_tensors(SMALL, 10)) == 580_968
    assert 580_968 * 32 == 18_590_976  # bits of one fp32 upload, 18.591 Mbit


@given(base=shapes, data=st.data())
def test_an_adapter_holds_2dm_plus_d_plus_m_parameters(
    base: BaseShape, data: st.DataObject
) -> None:
    m = data.draw(st.integers(1, base.width))
    d = base.width
    total = sum(tensor.size for tensor in adapter_tensors(base, m))
    assert total == 3 * base.layers * (2 * d * m + d + m)


@pytest.mark.parametrize(
    ("placement", "count", "rank", "parameters"),
    [
        ("qkv", 1, 96, 147_456),  # 96 * (768 + 768)
        ("qkv", 1, 8, 12_288),
        ("qkv", 36, 96, 5_308_416),
        ("qkv", 36, 8, 442_368),
        ("wide", 1, 96, 294_912),  # 96 * (768 + 2304)
        ("wide", 12, 96, 12 * 294_912),
        ("wide", 13, 96, 12 * 294_912 + 368_640),  # + 96 * (768 + 3072)
        ("wide", 25, 96, 12 * 294_912 + 12 * 368_640 + 368_640),  # + 96 * (3072 + 768)
        ("wide", 36, 96, 12 * (294_912 + 368_640 + 368_640)),
    ],
)
def test_lora_modules_on_gpt2_small_hold_rank_times_inputs_plus_outputs(
    placement: str, count: int, rank: int, parameters: int
) -> None:
    assert lora_parameters(placement, count, rank) == parameters


@given(base=shapes, rank=st.integers(1, 64), placement=st.sampled_from(["qkv", "wide"]))
def test_lora_factors_multiply_to_the_shape_of_their_projection(
    base: BaseShape, rank: int, placement: str
) -> None:
    sites = lora_sites(base, placement)
    tensors = lora_tensors(sites, rank)
    for site, a, b in zip(sites, tensors[::2], tensors[1::2], strict=True):
        assert a.name == f"{site.path}.lora_A.weight"
        assert b.name == f"{site.path}.lora_B.weight"
        assert (a.shape[1], b.shape[0]) == (site.inputs, site.outputs)
        assert a.shape[0] == b.shape[1] == rank


@pytest.mark.parametrize("placement", ["qkv", "wide"])
def test_factors_of_lora_are_told_from_adapters_by_their_names(placement: str) -> None:
    factors = lora_tensors(lora_sites(SMALL, placement), 8)
    assert len(factors) == 72
    assert all(is_lora(tensor.name) for tensor in factors)
    assert not any(is_lora(tensor.name) for tensor in adapter_tensors(SMALL, 10))
    assert not is_lora("adapters.0.lora_A.weights")


def test_qkv_sites_are_query_then_value_then_key_each_from_the_top_block() -> None:
    expected = [
        f"transformer.h.{block}.attn.c_attn.{part}"
        for part in ("query", "value", "key")
        for block in (11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0)
    ]
    assert [site.path for site in lora_sites(SMALL, "qkv")] == expected


def test_wide_sites_are_attention_then_the_two_mlp_projections_each_from_the_top_block() -> None:
    paths = [site.path for site in lora_sites(SMALL, "wide")]
    assert paths[::12] == [
        "transformer.h.11.attn.c_attn", "transformer.h.11.mlp.c_fc", "transformer.h.11.mlp.c_proj",
    ]  # fmt: skip
    assert paths[11::12] == [
        "transformer.h.0.attn.c_attn", "transformer.h.0.mlp.c_fc", "transformer.h.0.mlp.c_proj",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("count", "kinds"),
    [(12, {"query"}), (24, {"query", "value"}), (36, {"query", "value", "key"})],
)
def test_12_24_and_36_modules_cover_one_two_and_three_projections_of_every_block(
    count: int, kinds: set[str]
) -> None:
    paths = [site.path for site in first_lora_sites(SMALL, "qkv", count)]
    assert len(set(paths)) == count
    assert {path.rsplit(".", 1)[1] for path in paths} == kinds
    assert {path.split(".")[2] for path in paths} == {str(block) for block in range(12)}


@given(base=shapes, placement=st.sampled_from(["qkv", "wide"]))
def test_every_placement_has_three_sites_a_block_and_none_twice(
    base: BaseShape, placement: str
) -> None:
    paths = [site.path for site in lora_sites(base, placement)]
    assert len(set(paths)) == len(paths) == 3 * base.layers


def test_more_modules_than_sites_are_refused_with_what_the_base_has() -> None:
    half = BaseShape(layers=6, width=768, inner=3072)
    with pytest.raises(
        InputError, match=r"LoRA count 19 on a base of 6 blocks; placement 'qkv' has 18 sites"
    ):
        first_lora_sites(half, "qkv", 19)
    with pytest.raises(InputError, match="LoRA count -1"):
        first_lora_sites(half, "qkv", -1)
    assert len(first_lora_sites(half, "qkv", 18)) == 18
    assert first_lora_sites(half, "qkv", 0) == []


def test_an_unknown_placement_is_told_with_all_known() -> None:
    with pytest.raises(InputError, match=r"unknown LoRA placement 'qvk'.*hoose one of qkv, wide"):
        lora_sites(SMALL, "qvk")


def test_adapters_sit_three_a_block_block_by_block() -> None:
    two = BaseShape(layers=2, width=8, inner=32)
    assert adapter_sites(two) == [
        (0, "attention"), (0, "mlp"), (0, "block"), (1, "attention"), (1, "mlp"), (1, "block"),
    ]  # fmt: skip
    assert adapter_sites(two, 6) == adapter_sites(two)


def test_an_adapter_count_that_the_sites_do_not_give_is_refused_with_what_they_give() -> None:
    with pytest.raises(
        InputError, match=r"adapter count 30; a base of 12 blocks has 36 sites.*so give 36"
    ):
        adapter_sites(SMALL, 30)


@pytest.mark.parametrize("size", [-1, 0, 769])
def test_an_adapter_size_outside_the_width_is_refused(size: int) -> None:
    with pytest.raises(InputError, match=f"adapter size {size}; choose 1 to 768"):
        adapter_tensors(SMALL, size)


def test_the_tensors_of_one_adapter_are_named_and_shaped_as_they_travel() -> None:
    base = BaseShape(layers=1, width=8, inner=32)
    assert adapter_name(0, "attention") == "adapters.0.attention"
    assert [(t.name, t.shape, t.bottleneck_axis) for t in adapter_tensors(base, 3)[:4]] == [
        ("adapters.0.attention.down.weight", (3, 8), 0),
        ("adapters.0.attention.down.bias", (3,), None),
        ("adapters.0.attention.up.weight", (8, 3), 1),
        ("adapters.0.attention.up.bias", (8,), None),
    ]


def test_the_bottleneck_axis_has_the_bottleneck_size() -> None:
    tensors = adapter_tensors(SMALL, 10) + lora_tensors(lora_sites(SMALL, "wide"), 10)
    for tensor in tensors:
        if tensor.bottleneck_axis is not None:
            assert tensor.shape[tensor.bottleneck_axis] == 10
        else:
            assert len(tensor.shape) == 1


@pytest.mark.parametrize("placement", ["qkv", "wide"])
def test_no_tensor_name_is_shared_by_what_travels_and_what_stays(placement: str) -> None:
    shared = [tensor.name for tensor in adapter_tensors(SMALL, 10)]
    personal = [tensor.name for tensor in lora_tensors(lora_sites(SMALL, placement), 8)]
    assert len(set(shared + personal)) == len(shared) + len(personal)


@pytest.mark.parametrize(("width", "rank"), [(768, 96), (384, 48), (128, 16), (4, 1)])
def test_the_rank_left_out_is_an_eighth_of_the_width_and_at_least_1(width: int, rank: int) -> None:
    base = BaseShape(layers=12, width=width, inner=4 * width)
    assert lora_rank(base, None) == (rank, "proportional")


def test_a_given_rank_is_taken_from_1_to_the_width() -> None:
    assert lora_rank(SMALL, 8) == (8, "given")
    assert lora_rank(SMALL, 768) == (768, "given")
    for rank in (0, -1, 769):
        with pytest.raises(InputError, match=f"LoRA rank {rank}; choose 1 to 768"):
            lora_rank(SMALL, rank)
