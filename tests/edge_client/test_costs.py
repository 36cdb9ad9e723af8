"""What a device's part of a round costs, on the run's own shape and priced at GPT-2 small.

Learning is on a base of twelve blocks of width 128. At GPT-2 small, 36 adapters of size 10 hold
580,968 parameters and a LoRA module of rank R on query, key or value R*(768 + 768).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from device_profiles.channel import PAPER_LINK
from device_profiles.methods import METHODS, ModuleShape
from device_profiles.modules import BaseShape
from device_profiles.pricing import CostBasis, cost_basis
from device_profiles.profile import find_profile
from device_profiles.seeds import stream
from edge_client.costs import (
    CostModel,
    Uplink,
    own_layout,
    stage_layout,
    trained_parameters,
)
from messaging.chunks import CHUNK_BYTES, wire_bytes
from messaging.codecs import CODECS, BlobHeader, encode_blob
from messaging.protocol import Codec

MINI = BaseShape(layers=12, width=128, inner=512)
SMALL = BaseShape(layers=12, width=768, inner=3072)
WEIGHTS = 124_439_808
ADAPTERS = 580_968


def modules(base: BaseShape = MINI, rank: int = 16, placement: str = "qkv") -> ModuleShape:
    """Return the modules of a run."""
    return ModuleShape(base=base, adapter_size=10, placement=placement, lora_rank=rank)


def model(
    method: str,
    *,
    count: int = 36,
    priced: int | None = None,
    base: BaseShape = MINI,
    placement: str = "qkv",
) -> CostModel:
    """Return the costs of a device that learns at rank 16; ``priced``: rank at GPT-2 small."""
    basis: CostBasis | None = None if priced is None else cost_basis("gpt2-small", base, priced)
    return CostModel(
        method=METHODS[method],
        modules=modules(base, placement=placement),
        parameters=3_000_000,
        lora_count=count,
        priced=basis,
        profile=find_profile("raspberry-pi-5-8gb"),
        link=PAPER_LINK,
        chunk_bytes=CHUNK_BYTES,
    )


def blob(method: str, codec: Codec, *, count: int = 36, shape: ModuleShape | None = None) -> bytes:
    """Return an update of a device, at the learning shape by default."""
    run = stage_layout("instruction", METHODS[method], shape or modules())
    layout = own_layout(run, count)
    header = BlobHeader(
        run="trial",
        round=1,
        sender="pi5-01",
        codec=codec,
        layout=layout.sha256,
        examples=4,
        train_loss=2.5,
    )
    return encode_blob(np.ones(layout.size, np.float32), layout, header)


def sent(costs: CostModel, size: int, codec: Codec = "fp32", seed: int = 0) -> Uplink:
    """Return what sending a blob of this size at once takes, on a channel of this seed."""
    return costs.uplink(
        "instruction", size, codec, generator=stream(seed, "channel"), wait_until=0.0
    )


def bits(method: str, codec: Codec = "fp32", *, count: int = 36, **changes: Any) -> float:
    """Return the bits on the air of a device's update."""
    size = len(blob(method, codec, count=count))
    return sent(model(method, count=count, **changes), size, codec).bits


# -- bits -----------------------------------------------------------------------------------------


def test_adapters_priced_at_gpt2_small_are_18_591_megabits() -> None:
    # and under 0.1 % for headers: one of the blob and one of 64 bytes a chunk
    assert 32 * ADAPTERS < bits("pwff", priced=96) < 32 * ADAPTERS * 1.001


@pytest.mark.parametrize(("rank", "megabits"), [(96, 169.9), (8, 14.16)])
def test_lora_priced_at_gpt2_small_is_a_tenfold_at_rank_96_and_less_at_8(
    rank: int, megabits: float
) -> None:
    parameters = 36 * rank * (768 + 768)
    on_air = bits("fedlora", priced=rank)
    assert 32 * parameters < on_air < 32 * parameters * 1.001
    assert on_air / 1e6 == pytest.approx(megabits, rel=1e-3)  # four digits, and the headers


def test_both_together_are_the_sum() -> None:
    parameters = ADAPTERS + 36 * 8 * (768 + 768)
    assert 32 * parameters < bits("vanilla-fl", priced=8) < 32 * parameters * 1.001


@pytest.mark.parametrize("count", [12, 23, 36])
def test_a_device_with_fewer_modules_is_priced_with_its_own(count: int) -> None:
    lora = count * 96 * (768 + 768)
    only = bits("fedlora-own", count=count, priced=96)
    assert 32 * lora < only < 32 * lora * 1.001
    both = bits("vanilla-fl-own", count=count, priced=96)
    assert 32 * (ADAPTERS + lora) < both < 32 * (ADAPTERS + lora) * 1.001


def test_a_device_that_trains_less_lora_in_pwff_sends_as_much_as_the_others() -> None:
    assert bits("pwff", count=12, priced=96) == bits("pwff", count=36, priced=96)


def test_int8_priced_at_gpt2_small_is_a_byte_an_entry_and_four_a_scale() -> None:
    # a scale for each of 10 rows and 10 columns and for two biases, of 36 adapters
    payload = ADAPTERS + 4 * 36 * 22
    # headers weigh four times as much as with fp32
    assert 8 * payload < bits("pwff", "int8", priced=96) < 8 * payload * 1.004


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(
    ("method", "count"), [("pwff", 12), ("vanilla-fl-own", 12), ("fedlora", 36)]
)
def test_the_priced_bits_are_those_of_a_real_update_of_that_shape(
    method: str, count: int, codec: Codec
) -> None:
    """All but the digits of the shapes in the header, which is padded to eight bytes."""
    real = blob(method, codec, count=count, shape=modules(SMALL, rank=8))
    priced = bits(method, codec, count=count, priced=8)
    assert abs(priced - 8 * wire_bytes(len(real), CHUNK_BYTES)) <= 8 * 8


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("size", [1, 122_816, 122_817, 1_000_000])
def test_without_a_priced_shape_the_bytes_on_the_wire_are_counted(codec: Codec, size: int) -> None:
    """Whatever the blob's size is: a piece of at most 122,816 bytes and 64 before each."""
    on_air = sent(model("pwff"), size, codec).bits
    assert on_air == 8 * (size + 64 * -(-size // 122_816))


# -- seconds and joules ---------------------------------------------------------------------------


def test_adapters_take_10_83_seconds_and_joules_on_the_papers_link() -> None:
    """18.591 Mbit at the ergodic rate 1.715974 bit/s/Hz of 5 dB Rayleigh and 1 MHz, at 1 W."""
    costs, size = model("pwff", priced=96), len(blob("pwff", "fp32"))
    uploads = [sent(costs, size, seed=seed) for seed in range(300)]
    seconds = np.array([upload.seconds for upload in uploads])
    # headers add less than 0.1 % (0.01 s); an upload spreads by 0.19 s, so the mean of 300 by
    # 0.011 s: four of those
    assert seconds.mean() == pytest.approx(10.834, abs=0.01 + 0.044)
    assert 0.15 < seconds.std() < 0.23  # 0.19, known to a twenty-fifth from 300
    assert [upload.transmit_joules for upload in uploads] == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("count", "modules_of_rank_96"),
    [
        (12, 12 * 96 * (768 + 2304)),
        (24, 12 * 96 * (768 + 2304) + 12 * 96 * (768 + 3072)),
        (36, 12 * 96 * (768 + 2304) + 24 * 96 * (768 + 3072)),
    ],
)
def test_a_step_is_priced_with_the_weights_and_modules_of_gpt2_small(
    count: int, modules_of_rank_96: int
) -> None:
    compute = find_profile("raspberry-pi-5-8gb").compute
    # 4*N + 6*(A + L) + 12*layers*T*d a token, at T = 128
    per_token = 4 * WEIGHTS + 6 * (ADAPTERS + modules_of_rank_96) + 12 * 12 * 128 * 768
    cost = model("pwff", count=count, priced=96, placement="wide").compute(512, 4)
    assert cost.seconds == pytest.approx(512 * per_token / compute.flops, rel=1e-12)
    assert cost.joules == pytest.approx(cost.seconds * compute.watts, rel=1e-12)


def test_without_a_priced_shape_a_step_is_the_bases_own() -> None:
    compute = find_profile("raspberry-pi-5-8gb").compute
    # 36 adapters of 2*128*10 + 128 + 10, and 12 modules of 16*(128 + 128)
    small = 36 * 2698 + 12 * 4096
    per_token = 4 * 3_000_000 + 6 * small + 12 * 12 * 32 * 128
    cost = model("pwff", count=12).compute(64, 2)
    assert cost.seconds == pytest.approx(64 * per_token / compute.flops, rel=1e-12)


def of_rewards(shape: ModuleShape, encoder_parameters: int = 0) -> CostModel:
    """Return the costs of a device that learns reward models, priced at GPT-2 small."""
    return CostModel(
        method=METHODS["pwff"],
        modules=shape,
        parameters=3_000_000,
        lora_count=36,
        priced=cost_basis("gpt2-small", MINI, 96),
        profile=find_profile("raspberry-pi-5-8gb"),
        link=PAPER_LINK,
        chunk_bytes=CHUNK_BYTES,
        encoder_parameters=encoder_parameters,
    )


def test_what_an_encoder_reads_is_priced_with_its_own_weights() -> None:
    costs = of_rewards(modules(), encoder_parameters=22_000_000)
    rate = find_profile("raspberry-pi-5-8gb").compute.flops
    cost = costs.compute(0, 0, 10, 30, stage="reward")
    assert cost.seconds == pytest.approx(2 * (10 * WEIGHTS + 30 * 22_000_000) / rate)


def test_a_method_that_trains_one_kind_is_charged_with_that_alone() -> None:
    by_method = {n: trained_parameters(METHODS[n], modules(SMALL, rank=8), 12) for n in METHODS}
    lora = 12 * 8 * (768 + 768)
    assert by_method["fedada"] == ADAPTERS
    assert by_method["fedlora-own"] == lora
    assert by_method["pwff"] == by_method["local-only"] == ADAPTERS + lora


# -- the way down ---------------------------------------------------------------------------------


def with_adapters() -> CostModel:
    """Return the costs of a device whose reward models have adapters, priced at GPT-2 small."""
    return of_rewards(replace(modules(), reward_shares="adapters"))


def test_a_step_through_a_reward_models_trunk_is_priced_with_what_trains_there() -> None:
    head = 64 * 1537 + 2 * 64 + 1
    # LoRA is on no trunk; 4 examples of 32 tokens
    flops = 128 * (4 * WEIGHTS + 6 * (head + ADAPTERS) + 12 * 12 * 32 * 768)
    rate = find_profile("raspberry-pi-5-8gb").compute.flops
    cost = with_adapters().compute(128, 4, stage="reward")
    assert cost.seconds == pytest.approx(flops / rate)


def test_an_update_of_reward_models_with_adapters_is_priced_with_all_of_both() -> None:
    head, small = 64 * 1537 + 2 * 64 + 1, 64 * 257 + 2 * 64 + 1
    learned = stage_layout("reward", METHODS["pwff"], replace(modules(), reward_shares="adapters"))
    assert learned.size == 2 * (small + 36 * (2 * 128 * 10 + 10 + 128))
    sent = with_adapters().uplink(
        "reward",
        4 * learned.size,  # as if without a header
        "fp32",
        generator=np.random.default_rng(0),
        wait_until=0.0,
    )
    size = 2 * 4 * (head + ADAPTERS)
    chunks = -(-size // (CHUNK_BYTES - 64))
    # what a header of each layout may take differs by no more than a few bytes a tensor
    assert sent.bits == pytest.approx(8 * (size + 64 * chunks), abs=8 * 2000)


def test_a_download_takes_as_long_as_a_state_of_the_priced_shape() -> None:
    costs = model("pwff", priced=96)
    size = wire_bytes(len(blob("pwff", "fp32")), CHUNK_BYTES)
    # 2.057373 bit/s/Hz without fading. The headers of the small state are some 900 of its 389,000
    # bytes and grow with it
    seconds = 32 * ADAPTERS / 2.057373e6
    assert seconds < costs.downlink("instruction", size).seconds < 1.003 * seconds


def test_all_of_the_state_comes_down_whatever_a_device_holds_of_it() -> None:
    full, few = (model("fedlora-own", count=count, priced=96) for count in (36, 12))
    assert few.downlink("instruction", 1_000_000) == full.downlink("instruction", 1_000_000)


def test_without_a_priced_shape_what_was_downloaded_counts() -> None:
    seconds = model("pwff").downlink("instruction", 50_000).seconds
    assert seconds == pytest.approx(400_000 / 2.057373e6, rel=1e-6)


@pytest.mark.parametrize("priced", [None, 96])
def test_where_nothing_was_downloaded_nothing_is_charged(priced: int | None) -> None:
    for method in METHODS:  # local-only as well, which has no state
        assert model(method, priced=priced).downlink("instruction", 0).seconds == 0.0
