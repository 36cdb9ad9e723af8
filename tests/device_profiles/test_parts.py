"""Rate and power are stated in one way, and something of the memory is free."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from device_profiles.config_files import check
from device_profiles.errors import InputError
from device_profiles.parts import Compute, Memory, Mode, Radio, check_idle

CYCLES = {"kappa": 1e-27, "flops_per_cycle": 16, "frequency_hz": "2 GHz"}


def test_a_clock_gives_rate_and_power() -> None:
    compute = check(Compute, CYCLES, "f")
    # 16 * 2e9 FLOP/s; 1e-27 * (2e9)**3 W = 1e-27 * 8e27 W. Products of doubles: a few roundings.
    assert compute.flops == 32e9
    assert compute.watts == pytest.approx(8.0, rel=1e-15)


def test_a_tenth_of_the_clock_takes_a_thousandth_of_the_power() -> None:
    slow = check(Compute, CYCLES | {"frequency_hz": "200 MHz"}, "f")
    assert slow.watts == pytest.approx(8.0 / 1000, rel=1e-15)
    assert slow.flops == pytest.approx(32e9 / 10, rel=1e-15)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (CYCLES | {"flops": 1e9, "watts": 5}, "compute: 'flops' and 'watts' are given beside 'kap"),
        (CYCLES | {"flops": 32e9, "watts": 5}, "make 3.2e+10 FLOP/s and 8 W; give one of both"),
        (CYCLES | {"watts": 5}, "'compute.flops' is missing"),
        ({"kappa": 1e-27, "flops": 1e9, "watts": 5}, "not some of each"),
        (
            {"kappa": 1e-27, "flops_per_cycle": 16},
            "'compute.flops' is missing; add it with 'wat",
        ),
        ({}, "in place of both"),
        ({"flops": 1e9}, "'compute.watts' is missing; add it"),
        (CYCLES | {"kappa": 0}, "compute.kappa = 0: Input should be greater than 0"),
        (CYCLES | {"kappa": "1 W"}, "compute.kappa = '1 W': 'W' is a unit of power"),
        (CYCLES | {"frequency_hz": "2 GB"}, "compute.frequency_hz = '2 GB': 'GB' is a unit of mem"),
        (CYCLES | {"idle_watts": 9}, "compute: idle_watts = 9 is above watts = 8; give less"),
        (CYCLES | {"kapa": 1}, "unknown key 'compute.kapa'; did you mean 'kappa'?"),
    ],
)
def test_rate_and_power_are_stated_in_exactly_one_way(values: dict[str, Any], says: str) -> None:
    memory = {"bytes": 1, "bandwidth": 1}
    with pytest.raises(InputError) as err:
        check(Whole, {"compute": values, "memory": memory}, "f")
    assert says in str(err.value)


class Whole(Mode):
    """Something that holds a compute part."""

    flops: float = 1.0
    watts: float = 1.0
    compute: Compute
    memory: Memory


@given(st.integers(1, 2**50))
def test_some_memory_is_free_by_default_and_the_rest_is_reserved(size: int) -> None:
    memory = check(Memory, {"bytes": size, "bandwidth": 1}, "f")
    assert memory.free_bytes + memory.reserved_bytes == size
    assert memory.free_bytes >= 3 * size / 4
    assert memory.reserved_bytes <= 4e9


@pytest.mark.parametrize(
    ("size", "reserved"), [("8 GB", 2e9), ("16 GB", 4e9), ("64 GB", 4e9), (3, 0)]
)
def test_a_quarter_of_the_memory_is_reserved_by_default_up_to_4_gb(
    size: object, reserved: float
) -> None:
    assert check(Memory, {"bytes": size, "bandwidth": 1}, "f").reserved_bytes == reserved


def test_what_is_reserved_can_be_stated() -> None:
    memory = check(Memory, {"bytes": "8 GB", "bandwidth": 1, "reserved_bytes": "512 MiB"}, "f")
    assert memory.free_bytes == 8_000_000_000 - 536_870_912


def test_circuit_and_receiver_are_not_counted_unless_stated() -> None:
    radio = Radio(snr_db=5, bandwidth_hz=1e6, transmit_watts=1)
    assert (radio.circuit_watts, radio.receive_watts) == (0, 0)


@pytest.mark.parametrize("name", ["transmit_watts", "circuit_watts", "receive_watts"])
def test_a_radio_takes_no_negative_power(name: str) -> None:
    values = {"snr_db": 5, "bandwidth_hz": 1e6, "transmit_watts": 1, name: -0.1}
    with pytest.raises(InputError, match=f"{name} = -0.1: negative"):
        check(Radio, values, "f")


def test_waiting_takes_at_most_the_power_of_training() -> None:
    check_idle(5.0, 5.0, "watts")
    with pytest.raises(ValueError, match=r"idle_watts = 5\.1 is above watts = 5; give less"):
        check_idle(5.1, 5.0, "watts")


def test_parts_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Mode(flops=1, watts=1).flops = 2
