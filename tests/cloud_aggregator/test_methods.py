"""The methods table: what travels, what stays, and the parameters that reference figures name."""

from __future__ import annotations

import pytest

from cloud_aggregator.methods import METHODS, find_method, shared_layout
from device_profiles.errors import InputError
from device_profiles.modules import BaseShape

GPT2_SMALL = BaseShape(layers=12, width=768, inner=3072)


@pytest.mark.parametrize("name", ["pwff", "fedada"])
def test_adapters_of_gpt2_small_are_580968_parameters(name: str) -> None:
    layout = shared_layout(find_method(name), GPT2_SMALL, 10)
    # 36 adapters of 2*768*10 + 768 + 10
    assert layout.size == 580_968
    # each with two matrices and two biases; three sites a block, twelve blocks
    assert len(layout.specs) == 4 * 36
    modules = {spec.name.rsplit(".", 2)[0] for spec in layout.specs}
    sites = ("attention", "mlp", "block")
    assert modules == {f"adapters.{block}.{site}" for block in range(12) for site in sites}


def test_no_name_of_a_lora_module_is_on_an_allow_list() -> None:
    for method in METHODS.values():
        layout = shared_layout(method, GPT2_SMALL, 10)
        assert not [name for name in layout.names if "lora" in name or "attn" in name]


def test_alone_nothing_is_shared() -> None:
    layout = shared_layout(find_method("local-only"), GPT2_SMALL, 10)
    assert (layout.specs, layout.size) == ((), 0)


def test_methods_that_share_the_same_tensors_have_the_same_layout() -> None:
    layouts = {n: shared_layout(m, GPT2_SMALL, 10).sha256 for n, m in METHODS.items()}
    assert layouts["pwff"] == layouts["fedada"] != layouts["local-only"]
    assert layouts["pwff"] != shared_layout(METHODS["pwff"], GPT2_SMALL, 11).sha256


def test_int8_has_one_scale_for_each_bottleneck_unit() -> None:
    layout = shared_layout(find_method("pwff"), GPT2_SMALL, 10)
    # 10 rows down, 10 columns up, and one for each of the two biases
    assert layout.scales == 36 * 22


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_only_what_is_trained_is_shared(method: object) -> None:
    assert set(getattr(method, "shared", "?")) <= set(getattr(method, "trained", ""))


@pytest.mark.parametrize(
    ("name", "nearest"), [("pwf", "pwff"), ("fed-ada", "fedada"), ("local", "local-only")]
)
def test_an_unknown_method_is_told_with_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(InputError, match=f"did you mean '{nearest}'") as told:
        find_method(name)
    assert all(known in str(told.value) for known in METHODS)


def test_an_adapter_wider_than_the_base_is_refused() -> None:
    with pytest.raises(InputError, match="adapter size 769; choose 1 to 768"):
        shared_layout(find_method("pwff"), GPT2_SMALL, 769)
