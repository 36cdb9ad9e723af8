"""Time and energy of training, of the link and of waiting, by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from device_profiles.channel import PAPER_LINK, Link, upload, upload_seconds
from device_profiles.energy import (
    RoundCosts,
    TimeAndEnergy,
    compute_cost,
    cycle_cost,
    downlink_cost,
    downlink_seconds,
    power_cost,
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
    assert cost == TimeAndEnergy(seconds=2.0, joules=22.0, basis="modelled")


def test_clock_cycles_take_kappa_f_squared_each() -> None:
    # 3e9 cycles at 1.5 GHz: 2 s; 1e-27 * 3e9 * (1.5e9)^2 = 6.75 J.
    cost = cycle_cost(3e9, kappa=1e-27, frequency_hz=1.5e9)
    assert cost.seconds == pytest.approx(2.0)
    assert cost.joules == pytest.approx(6.75)
    # Half the clock: twice the time at a quarter of the energy.
    slow = cycle_cost(3e9, kappa=1e-27, frequency_hz=0.75e9)
    assert (slow.seconds, slow.joules) == (pytest.approx(4.0), pytest.approx(6.75 / 4))


def test_a_processor_stated_by_its_clock_costs_what_its_cycles_do() -> None:
    clocked = Compute.model_validate({"kappa": 1e-27, "flops_per_cycle": 8, "frequency_hz": 1.5e9})
    cost = compute_cost(24e9, clocked)  # 3e9 cycles
    assert (cost.seconds, cost.joules) == (pytest.approx(2.0), pytest.approx(6.75))
    # The same rate and power, stated as such.
    stated = compute_cost(24e9, Compute(flops=clocked.flops, watts=clocked.watts))
    assert (cost.seconds, cost.joules) == (
        pytest.approx(stated.seconds),
        pytest.approx(stated.joules),
    )


def test_no_work_costs_nothing() -> None:
    cost = compute_cost(0.0, Compute(flops=40e9, watts=11.0))
    assert (cost.seconds, cost.joules) == (0.0, 0.0)
    sent = uplink_cost(0.0, PAPER_LINK, np.random.default_rng(0), circuit_watts=1.0)
    assert (sent.seconds, sent.joules) == (0.0, 0.0)


def test_an_uplink_costs_its_airtime_at_the_transmit_power() -> None:
    # 3 Mbit at 1 bit/s/Hz over 1 MHz: 3 s at half a watt.
    half = Link(snr_db=0.0, bandwidth_hz=1e6, transmit_watts=0.5, fading="none")
    cost = uplink_cost(3e6, half, np.random.default_rng(0))
    assert (cost.seconds, cost.joules) == (pytest.approx(3.0), pytest.approx(1.5))
    assert cost.circuit.joules == 0.0


def test_electronics_cost_apart_from_what_is_radiated() -> None:
    # In turn with two others: 9 s, of which 3 s on the air and with the radio on.
    third = Link(
        snr_db=0.0, bandwidth_hz=1e6, transmit_watts=0.5, fading="none", sharing="tdma", sharers=3
    )
    cost = uplink_cost(3e6, third, np.random.default_rng(0), circuit_watts=0.2)
    assert cost.seconds == pytest.approx(9.0)
    for part, watts in ((cost.transmit, 0.5), (cost.circuit, 0.2)):
        assert (part.seconds, part.joules) == (pytest.approx(3.0), pytest.approx(3 * watts))
    assert cost.joules == pytest.approx(2.1)


def test_electronics_stay_on_in_the_blocks_in_which_inversion_is_silent() -> None:
    waits = Link(
        snr_db=5.0, bandwidth_hz=1e6, transmit_watts=1.0, scheme="inversion", cut_off_gain=0.7
    )
    cost = uplink_cost(1e6, waits, np.random.default_rng(1), circuit_watts=2.0)
    assert cost.transmit.seconds < 0.8 * cost.seconds
    assert cost.circuit.joules == pytest.approx(2 * cost.seconds)


def test_an_uplink_over_fading_has_the_airtime_that_the_channel_draws() -> None:
    cost = uplink_cost(1e6, PAPER_LINK, np.random.default_rng(5))
    assert cost.seconds == upload_seconds(1e6, PAPER_LINK, np.random.default_rng(5))
    assert cost.joules == cost.seconds  # one watt
    assert cost.delivered


def test_a_lost_upload_costs_as_much_as_one_that_arrives() -> None:
    risky = Link(
        snr_db=5.0, bandwidth_hz=1e6, transmit_watts=1.0, scheme="outage", rate_bits_per_hz=2.0
    )
    costs = [uplink_cost(2e4, risky, np.random.default_rng(seed)) for seed in range(20)]
    assert {cost.delivered for cost in costs} == {True, False}
    assert {cost.joules for cost in costs} == {upload(2e4, risky, np.random.default_rng(0)).seconds}


def test_a_downlink_takes_bits_over_the_rate_without_fading() -> None:
    # 10*log10(15) dB is 4 bit/s/Hz, on a fading link too: the base station makes up for it.
    good = Link(snr_db=10 * math.log10(15), bandwidth_hz=1e6, transmit_watts=1.0)
    assert downlink_seconds(8e6, good) == pytest.approx(2.0)
    assert downlink_seconds(0.0, good) == 0.0
    cost = downlink_cost(8e6, good, receive_watts=0.3)
    assert (cost.seconds, cost.joules) == (pytest.approx(2.0), pytest.approx(0.6))


def test_waiting_costs_idle_power() -> None:
    assert power_cost(30.0, 2.5) == TimeAndEnergy(seconds=30.0, joules=75.0, basis="modelled")
    assert power_cost(30.0, 2.5, "measured").basis == "measured"


def test_a_round_reports_each_activity_and_what_the_battery_gives() -> None:
    costs = RoundCosts(
        compute=power_cost(10.0, 5.0, "measured"),
        transmit=power_cost(2.0, 1.0),
        circuit=power_cost(2.0, 0.5),
        receive=power_cost(1.0, 0.25),
        idle=power_cost(4.0, 2.0),
    )
    joules = {name: part.joules for name, part in costs.parts().items()}
    assert joules == {"compute": 50, "transmit": 2, "circuit": 1, "receive": 0.25, "idle": 8}
    assert costs.joules == 61.25
    assert [part.basis for part in costs.parts().values()] == ["measured"] + 4 * ["modelled"]
    assert RoundCosts().joules == 0.0


@pytest.mark.parametrize("bits", [-1.0, math.nan, math.inf])
def test_a_downlink_of_bits_that_cannot_be_is_refused(bits: float) -> None:
    with pytest.raises(InputError, match=f"bits = {bits}; "):
        downlink_seconds(bits, PAPER_LINK)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: compute_cost(-1.0, Compute(flops=1e9, watts=1.0)), "flops = -1.0; give 0 or more"),
        (lambda: cycle_cost(math.nan, 1e-27, 1e9), "cycles = nan; give 0 or more"),
        (lambda: cycle_cost(1.0, 0.0, 1e9), "kappa = 0.0; give a value above 0"),
        (lambda: cycle_cost(1.0, 1e-27, -1.0), "frequency_hz = -1.0; give a value above 0"),
        (lambda: power_cost(-1.0, 1.0), "seconds = -1.0; give 0 or more"),
        (lambda: power_cost(1.0, math.inf), "watts = inf; give 0 or more"),
        (lambda: downlink_cost(1.0, PAPER_LINK, -1.0), "receive_watts = -1.0; give 0 or more"),
        (
            lambda: uplink_cost(1.0, PAPER_LINK, np.random.default_rng(0), circuit_watts=-1.0),
            "circuit_watts = -1.0; give 0 or more",
        ),
    ],
)
def test_an_amount_that_cannot_be_is_refused(call: Callable[[], object], told: str) -> None:
    with pytest.raises(InputError, match=f"^{told}"):
        call()
