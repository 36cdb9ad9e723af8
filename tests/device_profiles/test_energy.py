"""Time and energy of training and of the link, by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from device_profiles.channel import PAPER_LINK, Link, upload_seconds
from device_profiles.energy import (
    compute_cost,
    downlink_seconds,
    training_flops_per_token,
    uplink_cost,
)
from device_profiles.errors import InputError
from device_profiles.modules import BaseShape
from device_profiles.profile import Compute

SMALL = BaseShape(layers=12, width=768, inner=3072)
SMALL_PARAMETERS = 124_439_808


@pytest.mark.parametrize(
    ("trainable", "mflop"),
    [
        # 4 * 124.440 M = 497.759; attention 12*12*128*768 = 14.156; LoRA of rank 96, six each:
        (12 * 294_912, 533.1),  # + 21.234
        (12 * (294_912 + 368_640), 559.7),  # + 47.776
        (12 * (294_912 + 368_640 + 368_640), 586.2),  # + 74.318
    ],
)
def test_a_training_step_on_gpt2_small_costs_533_to_586_mflop_a_token(
    trainable: int, mflop: float
) -> None:
    flops = training_flops_per_token(SMALL_PARAMETERS, trainable, SMALL, tokens=128)
    assert flops / 1e6 == pytest.approx(mflop, abs=0.05)


def test_each_part_of_a_training_step_has_its_own_passes() -> None:
    tiny = BaseShape(layers=2, width=3, inner=12)
    assert training_flops_per_token(1, 0, tiny, tokens=0) == 4  # forward, input gradient
    assert training_flops_per_token(0, 1, tiny, tokens=0) == 6  # and a weight gradient
    # Scores and mixing are 2*T*D multiply-adds a block and token: 4*T*D, three times with training.
    assert training_flops_per_token(0, 0, tiny, tokens=5) == 2 * 3 * 4 * 5 * 3


def test_compute_takes_work_over_rate_at_the_stated_power() -> None:
    cost = compute_cost(80e9, Compute(flops=40e9, watts=11.0))
    assert (cost.seconds, cost.joules) == (2.0, 22.0)


def test_no_work_costs_nothing() -> None:
    cost = compute_cost(0.0, Compute(flops=40e9, watts=11.0))
    assert (cost.seconds, cost.joules) == (0.0, 0.0)
    sent = uplink_cost(0.0, PAPER_LINK, np.random.default_rng(0))
    assert (sent.seconds, sent.joules) == (0.0, 0.0)


def test_an_uplink_costs_its_airtime_at_the_transmit_power() -> None:
    # 3 Mbit at 1 bit/s/Hz over 1 MHz: 3 s at half a watt.
    half = Link(snr_db=0.0, bandwidth_hz=1e6, transmit_watts=0.5, fading="none")
    cost = uplink_cost(3e6, half, np.random.default_rng(0))
    assert (cost.seconds, cost.joules) == (pytest.approx(3.0), pytest.approx(1.5))


def test_an_uplink_over_fading_has_the_airtime_that_the_channel_draws() -> None:
    cost = uplink_cost(1e6, PAPER_LINK, np.random.default_rng(5))
    assert cost.seconds == upload_seconds(1e6, PAPER_LINK, np.random.default_rng(5))
    assert cost.joules == cost.seconds  # one watt


def test_a_downlink_takes_bits_over_the_rate_without_fading() -> None:
    # 10*log10(15) dB is 4 bit/s/Hz, on a fading link too: the base station makes up for it.
    good = Link(snr_db=10 * math.log10(15), bandwidth_hz=1e6, transmit_watts=1.0)
    assert downlink_seconds(8e6, good) == pytest.approx(2.0)
    assert downlink_seconds(0.0, good) == 0.0


@pytest.mark.parametrize("bits", [-1.0, math.nan, math.inf])
def test_a_downlink_of_bits_that_cannot_be_is_refused(bits: float) -> None:
    with pytest.raises(InputError, match=f"bits = {bits}; "):
        downlink_seconds(bits, PAPER_LINK)
