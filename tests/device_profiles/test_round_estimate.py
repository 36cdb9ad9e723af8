"""A round's memory, seconds and joules: each activity by its own figures of the device."""

from __future__ import annotations

from dataclasses import replace

import pytest

from device_profiles.channel import PAPER_LINK
from device_profiles.modules import adapter_tensors
from device_profiles.planning import REFERENCE_JOB
from device_profiles.profile import Profile
from device_profiles.round_estimate import CODEC_BITS, Setting, round_estimate, upload_bits
from messaging.codecs import max_blob_bytes
from messaging.layout import Layout

SETTING = Setting(precision="fp32", codec="fp32", checkpoint=False, micro_batch=4, max_length=256)
BOARD = Profile.model_validate(
    {
        "name": "board",
        "title": "A board",
        "short": "board",
        "compute": {"flops": 1e11, "watts": 7.0},
        "memory": {"bytes": 8 * 10**9, "bandwidth": 2e10},
        "radio": {
            "snr_db": 5.0,
            "bandwidth_hz": 1e6,
            "transmit_watts": 1.0,
            "circuit_watts": 0.5,
            "receive_watts": 0.25,
        },
    }
)


def test_the_adapters_of_gpt2_small_are_18_6_megabits() -> None:
    assert upload_bits(REFERENCE_JOB.shape, "fp32") == 32 * 580_968 == 18_590_976


@pytest.mark.parametrize("codec", sorted(CODEC_BITS))
def test_codecs_take_what_the_protocol_packs(codec: str) -> None:
    shape = REFERENCE_JOB.shape
    tensors = adapter_tensors(shape.base, shape.adapter_size)
    layout = Layout.of(tensors)
    header = max_blob_bytes(Layout(()), codec)
    packed = max_blob_bytes(layout, codec) - header
    assert upload_bits(shape, codec) == 8 * packed


def test_activities_cost_their_own_power() -> None:
    found = round_estimate(BOARD, REFERENCE_JOB, PAPER_LINK, 24, SETTING)
    assert found.compute_joules == pytest.approx(7.0 * found.compute_seconds)
    # 18.59 Mbit at the ergodic 1.715974 bit/s/Hz: 10.834 s, at 1 W and half a watt of electronics
    assert found.uplink_seconds == pytest.approx(10.834, abs=0.01)
    assert found.uplink_joules == pytest.approx(1.5 * found.uplink_seconds)
    # at the rate without fading, 2.057373 bit/s/Hz: 9.036 s
    assert found.downlink_seconds == pytest.approx(9.036, abs=0.001)
    assert found.downlink_joules == pytest.approx(0.25 * found.downlink_seconds)
    assert found.seconds == found.downlink_seconds + found.compute_seconds + found.uplink_seconds
    assert found.joules == found.downlink_joules + found.compute_joules + found.uplink_joules


def test_a_round_is_its_steps() -> None:
    one, ten = (
        round_estimate(BOARD, replace(REFERENCE_JOB, local_steps=n), PAPER_LINK, 24, SETTING)
        for n in (1, 10)
    )
    assert ten.compute_seconds == pytest.approx(10 * one.compute_seconds)
    assert ten.memory == one.memory


def test_parts_of_a_batch_take_less_memory_and_hardly_more_time() -> None:
    whole, parts = (
        round_estimate(BOARD, REFERENCE_JOB, PAPER_LINK, 24, replace(SETTING, micro_batch=n))
        for n in (4, 2)
    )
    assert parts.memory.total < whole.memory.total
    assert whole.compute_seconds < parts.compute_seconds < 1.3 * whole.compute_seconds


def test_time_is_of_mean_lengths_and_memory_of_the_longest() -> None:
    longer = replace(REFERENCE_JOB, max_length=512)
    here, there = (
        round_estimate(BOARD, job, PAPER_LINK, 24, replace(SETTING, max_length=job.max_length))
        for job in (REFERENCE_JOB, longer)
    )
    assert there.compute_seconds == here.compute_seconds
    assert there.memory.total > here.memory.total


def test_a_cut_below_the_mean_length_saves_time() -> None:
    whole, cut = (
        round_estimate(BOARD, REFERENCE_JOB, PAPER_LINK, 24, replace(SETTING, max_length=n))
        for n in (256, 64)
    )
    assert cut.compute_seconds < 0.6 * whole.compute_seconds


def test_the_response_keeps_its_share_of_an_example() -> None:
    job = replace(REFERENCE_JOB, tokens=100, response=25)
    assert (job.longest(2, 200).tokens, job.longest(2, 200).response) == (200, 50)
    assert (job.typical(2, 40).tokens, job.typical(2, 40).response) == (40, 10)
    assert job.typical(3, 256).examples == 3
