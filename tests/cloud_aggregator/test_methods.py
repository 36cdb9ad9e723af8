"""The methods table: what travels, what stays, and the parameters that reference figures name."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

from cloud_aggregator.methods import (
    METHODS,
    ModuleShape,
    find_method,
    initial_state,
    initial_tensors,
    own_layout,
    stage_layout,
)
from device_profiles.errors import InputError
from device_profiles.methods import Method, RewardShares, held_tensors
from device_profiles.modules import BaseShape, initial_lora, is_lora, lora_sites
from edge_client.costs import own_layout as own_layout_of_a_device
from edge_client.costs import stage_layout as device_layout
from messaging.layout import Layout

GPT2_SMALL = BaseShape(layers=12, width=768, inner=3072)

#: 36 adapters of 2*768*10 + 768 + 10 parameters.
ADAPTERS = 580_968
#: 36 LoRA modules of R*(768 + 768) parameters, by R.
LORA = {8: 442_368, 96: 5_308_416}

#: By method: whether adapters travel, whether LoRA does. One line for each row of the table.
TRAVELS = {
    "pwff": (True, False),
    "vanilla-fl": (True, True),
    "vanilla-fl-own": (True, True),
    "fedada": (True, False),
    "fedlora": (False, True),
    "fedlora-own": (False, True),
    "fedlora-product": (False, True),
    "local-only": (False, False),
    "sfl": (True, False),
    "pfl": (True, True),
    "shepherd": (False, True),
    "shepherd-aligned": (False, True),
}
SHARING_LORA = [name for name, (_, lora) in TRAVELS.items() if lora]

ADAPTER_NAME = re.compile(r"adapters\.\d+\.(attention|mlp|block)\.(down|up)\.(weight|bias)")
LORA_NAME = re.compile(r"transformer\.h\.\d+\.attn\.c_attn\.(query|key|value)\.lora_[AB]\.weight")


def modules(rank: int = 8, adapter_size: int = 10) -> ModuleShape:
    """Return the modules of GPT-2 small on query, key and value."""
    return ModuleShape(base=GPT2_SMALL, adapter_size=adapter_size, placement="qkv", lora_rank=rank)


def shared(method: Method, shape: ModuleShape) -> Layout:
    """Return what travels in instruction tuning."""
    return stage_layout("instruction", method, shape)


def names(name: str) -> list[str]:
    """Return the names that travel under a method, in order."""
    return [spec.name for spec in shared(find_method(name), modules()).specs]


def test_every_method_of_the_table_is_tested_here() -> None:
    assert list(METHODS) == list(TRAVELS)


@pytest.mark.parametrize("rank", [8, 96])
@pytest.mark.parametrize("name", TRAVELS)
def test_what_travels_at_gpt2_small_has_the_parameters_of_the_reference(
    name: str, rank: int
) -> None:
    adapters, lora = TRAVELS[name]
    layout = shared(find_method(name), modules(rank))
    assert layout.size == adapters * ADAPTERS + lora * LORA[rank]
    # an adapter has two matrices and two biases, a LoRA module two factors
    assert len(layout.specs) == adapters * 4 * 36 + lora * 2 * 36


@pytest.mark.parametrize("name", TRAVELS)
def test_the_names_that_travel_are_those_of_the_methods_modules(name: str) -> None:
    adapters, lora = TRAVELS[name]
    assert sum(bool(ADAPTER_NAME.fullmatch(n)) for n in names(name)) == adapters * 144
    assert sum(bool(LORA_NAME.fullmatch(n)) for n in names(name)) == lora * 72
    assert len(set(names(name))) == adapters * 144 + lora * 72


@pytest.mark.parametrize("name", ["pwff", "fedada"])
def test_36_adapters_sit_three_a_block(name: str) -> None:
    sites = ("attention", "mlp", "block")
    assert {n.rsplit(".", 2)[0] for n in names(name)} == {
        f"adapters.{block}.{site}" for block in range(12) for site in sites
    }


@pytest.mark.parametrize("name", ["pwff", "fedada", "local-only"])
@pytest.mark.parametrize("placement", ["qkv", "wide"])
def test_no_name_of_a_lora_module_is_on_the_list_of_a_method_that_keeps_it(
    name: str, placement: str
) -> None:
    base = ModuleShape(base=GPT2_SMALL, adapter_size=10, placement=placement, lora_rank=8)
    allowed = shared(find_method(name), base).names
    assert not [n for n in allowed if "lora" in n or "transformer" in n]


def test_alone_nothing_is_shared() -> None:
    layout = shared(find_method("local-only"), modules())
    assert (layout.specs, layout.size) == ((), 0)


def test_methods_that_share_the_same_tensors_have_the_same_layout() -> None:
    layouts = {n: shared(m, modules()).sha256 for n, m in METHODS.items()}
    alike: dict[str, set[str]] = {}
    for name, sha256 in layouts.items():
        alike.setdefault(sha256, set()).add(name)
    assert sorted(map(sorted, alike.values())) == [
        ["fedada", "pwff", "sfl"],
        ["fedlora", "fedlora-own", "fedlora-product", "shepherd", "shepherd-aligned"],
        ["local-only"],
        ["pfl", "vanilla-fl", "vanilla-fl-own"],
    ]
    assert layouts["pwff"] == shared(METHODS["pwff"], modules(rank=96)).sha256
    assert layouts["pwff"] != shared(METHODS["pwff"], modules(adapter_size=11)).sha256
    assert layouts["fedlora"] != shared(METHODS["fedlora"], modules(rank=9)).sha256


def test_int8_has_one_scale_for_each_bottleneck_unit() -> None:
    # an adapter: 10 rows down, 10 columns up, and one for each of the two biases;
    # a LoRA module of rank 8: 8 rows of A and 8 columns of B
    assert shared(find_method("pwff"), modules()).scales == 36 * 22
    assert shared(find_method("fedlora"), modules()).scales == 36 * 16


# -- a device that holds fewer LoRA modules -------------------------------------------------------


@pytest.mark.parametrize("name", SHARING_LORA)
def test_lora_travels_after_the_adapters_in_the_order_in_which_it_is_filled(name: str) -> None:
    expected = [
        f"transformer.h.{block}.attn.c_attn.{part}.lora_{factor}.weight"
        for part in ("query", "value", "key")
        for block in (11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0)
        for factor in "AB"
    ]
    assert names(name)[-72:] == expected
    assert not any(map(is_lora, names(name)[:-72]))


@pytest.mark.parametrize("count", [0, 1, 12, 23, 36])
@pytest.mark.parametrize("name", TRAVELS)
def test_what_a_device_sends_is_the_first_of_what_the_run_shares(name: str, count: int) -> None:
    adapters, lora = TRAVELS[name]
    run = shared(find_method(name), modules())
    own = own_layout(run, count)
    assert own.specs == run.specs[: len(own.specs)]
    # 8*(768 + 768) parameters a module; adapters are on every device
    assert own.size == adapters * ADAPTERS + lora * count * 12_288
    assert sum(map(is_lora, own.names)) == lora * 2 * count


def test_a_device_with_12_modules_sends_the_queries_of_all_blocks() -> None:
    own = own_layout(shared(find_method("fedlora-own"), modules()), 12)
    assert own.names == {
        f"transformer.h.{block}.attn.c_attn.query.lora_{factor}.weight"
        for block in range(12)
        for factor in "AB"
    }


def test_more_modules_than_the_run_has_are_all_of_them() -> None:
    run = shared(find_method("vanilla-fl"), modules())
    assert own_layout(run, 40) == run
    assert own_layout(run, 36) is run
    assert held_tensors([], 12) == 0


@pytest.mark.parametrize("count", [0, 12, 36])
@pytest.mark.parametrize("name", TRAVELS)
def test_device_and_cloud_hold_the_same_lists(name: str, count: int) -> None:
    """The two sides may not import each other; what they agree on is compared by its hash."""
    cloud = shared(find_method(name), modules())
    device = device_layout("instruction", find_method(name), modules())
    assert device.sha256 == cloud.sha256
    assert own_layout_of_a_device(device, count).sha256 == own_layout(cloud, count).sha256


# -- reward models -------------------------------------------------------------------------------


def rewards(name: str, shares: RewardShares) -> Layout:
    return stage_layout("reward", find_method(name), replace(modules(), reward_shares=shares))


HEAD = 64 * 1537 + 2 * 64 + 1  # 64 units on 2*768 + 1 features


@pytest.mark.parametrize(("name", "objectives"), [("pwff", 2), ("sfl", 1), ("fedlora", 2)])
def test_what_travels_of_reward_models_is_heads_or_heads_and_adapters_and_never_lora(
    name: str, objectives: int
) -> None:
    head, both = rewards(name, "head"), rewards(name, "adapters")
    assert (head.size, both.size) == (objectives * HEAD, objectives * (HEAD + ADAPTERS))
    assert head.names < both.names
    more = both.names - head.names
    assert len(more) == objectives * 144
    for tensor in more:
        reward, _, adapter = tensor.partition(".trunk.")
        assert reward in ("reward.helpfulness", "reward.harmlessness")
        assert ADAPTER_NAME.fullmatch(adapter)
    assert own_layout(both, 0) == both  # every device holds all of it, whatever LoRA it has


@pytest.mark.parametrize("shares", ["head", "adapters"])
def test_reward_models_begin_with_exactly_the_tensors_that_travel_and_change_nothing(
    shares: RewardShares,
) -> None:
    shape = replace(modules(), reward_shares=shares)
    first = initial_state("reward", find_method("pwff"), shape, seed=3)
    assert set(first) == rewards("pwff", shares).names
    assert not any(t.any() for n, t in first.items() if ".trunk." in n and ".up." in n)
    downs = [t for n, t in first.items() if n.endswith(".down.weight")]
    assert all(t.any() for t in downs)
    assert len(downs) == (72 if shares == "adapters" else 0)


# -- where a run begins ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRAVELS)
def test_the_first_state_has_exactly_the_tensors_that_travel(name: str) -> None:
    layout = shared(find_method(name), modules())
    first = initial_tensors(find_method(name), modules(), seed=3)
    assert set(first) == layout.names
    assert layout.pack(first).shape == (layout.size,)


@pytest.mark.parametrize("name", ["vanilla-fl-own", "fedlora-own"])
def test_shared_lora_begins_as_a_device_would_begin_its_own(name: str) -> None:
    first = initial_tensors(find_method(name), modules(), seed=3)
    own = initial_lora(lora_sites(GPT2_SMALL, "qkv")[:12], 8, 3)
    assert all(np.array_equal(first[n], tensor) for n, tensor in own.items())
    assert not any(first[n].any() for n in first if n.endswith("lora_B.weight"))
    another = initial_tensors(find_method(name), modules(), seed=4)
    lora_a = "transformer.h.11.attn.c_attn.query.lora_A.weight"
    assert not np.array_equal(first[lora_a], another[lora_a])


# -- the table ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_only_what_is_trained_is_shared(method: object) -> None:
    assert set(getattr(method, "shared", "?")) <= set(getattr(method, "trained", ""))


def test_the_baselines_hold_all_modules_and_their_variants_what_a_device_affords() -> None:
    everywhere = {name for name, method in METHODS.items() if method.lora == "all"}
    baselines = {"vanilla-fl", "fedlora", "fedlora-product"}
    assert everywhere == baselines | {"pfl", "shepherd", "shepherd-aligned"}


def test_products_are_averaged_only_where_both_factors_travel() -> None:
    by_product = [name for name, method in METHODS.items() if method.average == "product"]
    assert by_product == ["fedlora-product"]
    assert all("lora" in METHODS[name].shared for name in by_product)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("pwf", "pwff"),
        ("fed-ada", "fedada"),
        ("local", "local-only"),
        ("fed-lora", "fedlora"),
        ("vanilla", "vanilla-fl"),
    ],
)
def test_an_unknown_method_is_told_with_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(InputError, match=f"did you mean '{nearest}'") as told:
        find_method(name)
    assert all(known in str(told.value) for known in METHODS)


def test_an_adapter_wider_than_the_base_is_refused() -> None:
    with pytest.raises(InputError, match="adapter size 769; choose 1 to 768"):
        shared(find_method("pwff"), modules(adapter_size=769))
