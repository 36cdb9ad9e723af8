"""A figure with a unit is the number that hand arithmetic gives, and a wrong one says why."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from device_profiles.units import UNITS, Bytes, Decibels, Power, parse_figure


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("8 GB", "memory", 8_000_000_000),
        ("7.4 GiB", "memory", 7_945_689_498),  # 7.4 * 1,073,741,824 = 7,945,689,497.6
        ("512MiB", "memory", 536_870_912),
        ("0 B", "memory", 0),
        ("68 GB/s", "bandwidth", 68e9),
        ("2.5 TFLOP/s", "rate", 2.5e12),
        (" 15 W ", "power", 15.0),
        ("500 mW", "power", 0.5),
        ("1 MHz", "frequency", 1e6),
        ("1.5e3 Hz", "frequency", 1500.0),
        ("+2.4 GHz", "frequency", 2.4e9),
        ("18 Wh", "energy", 64_800.0),  # 18 J/s for 3,600 s
        ("0.5 kWh", "energy", 1.8e6),
        ("5 dB", "level", 5.0),
        ("-2.5 dB", "level", -2.5),
        (".5 kW", "power", 500.0),
    ],
)
def test_a_figure_in_quotes_becomes_si_units(text: str, kind: str, value: float) -> None:
    # Products of two doubles: one rounding, 2**-53 of the value.
    assert parse_figure(text, kind) == pytest.approx(value, rel=2**-52, abs=0)


def test_memory_in_quotes_is_whole_bytes() -> None:
    assert isinstance(parse_figure("7.4 GiB", "memory"), int)


@pytest.mark.parametrize("kind", sorted(UNITS))
@pytest.mark.parametrize("number", [0, 3, 2.5])
def test_a_plain_number_stands_as_it_is(kind: str, number: float) -> None:
    assert parse_figure(number, kind) == number


@given(exponent=st.integers(-12, 12), kind=st.sampled_from(["power", "frequency", "energy"]))
def test_the_first_unit_of_a_kind_is_its_si_unit(exponent: int, kind: str) -> None:
    number = 1.25 * 2.0**exponent
    assert parse_figure(f"{number!r} {next(iter(UNITS[kind]))}", kind) == number


def test_prefixes_are_in_their_si_ratio() -> None:
    for units in UNITS.values():
        for unit, size in units.items():
            for prefix, factor in (("k", 1e3), ("M", 1e6), ("G", 1e9), ("T", 1e12), ("m", 1e-3)):
                base = unit.removeprefix(prefix)
                if base != unit and base in units and not base.startswith("i"):
                    assert size == pytest.approx(factor * units[base], rel=1e-15)


@pytest.mark.parametrize(
    ("value", "kind", "says"),
    [
        ("8 GBs", "memory", "unknown unit 'GBs'; did you mean 'GB'? Give a number of 0 or more"),
        ("1 furlong", "memory", "unknown unit 'furlong'; give a number of 0 or more in B"),
        ("2 TFLOPS", "rate", "unknown unit 'TFLOPS'; did you mean 'TFLOP/s'?"),
        ("1 mhz", "frequency", "(Hz, kHz, MHz, GHz)"),
        ("8 W", "memory", "'W' is a unit of power, and this is memory; give a number"),
        ("8 GB", "bandwidth", "'GB' is a unit of memory, and this is a bandwidth of memory"),
        ("5 W", "level", "this is a level; give a number in dB, or in quotes with a unit (dB)"),
        ("16 Hz", "plain", "this is a figure without a unit; give a number of 0 or more"),
        ("16", "plain", "a figure in quotes has a unit; give a number of 0 or more, without a"),
        ("8", "memory", "a figure in quotes has a unit; give a number of 0 or more in B"),
        ("GB", "memory", "no figure; give"),
        ("", "memory", "no figure; give"),
        ("1_000 B", "memory", "unknown unit '_000 B'"),
        ("1,5 GB", "memory", "unknown unit ',5 GB'"),
        ("-8 GB", "memory", "negative; give a number of 0 or more in B"),
        (-1.0, "frequency", "negative; give a number of 0 or more in Hz"),
        (math.nan, "power", "not finite; give"),
        (math.inf, "level", "not finite; give"),
        ("1e999 GB", "memory", "not finite; give"),
        (True, "power", "no figure; give"),
        (None, "power", "no figure; give"),
        ([8], "memory", "no figure; give"),
    ],
)
def test_a_wrong_figure_says_why_and_what_is_accepted(value: object, kind: str, says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        parse_figure(value, kind)


@given(st.text(max_size=20), st.sampled_from(sorted(UNITS)))
def test_any_text_is_a_figure_or_a_value_error(text: str, kind: str) -> None:
    try:
        number = parse_figure(text, kind)
    except ValueError:
        return
    assert math.isfinite(number)


class Part(BaseModel):
    """A record with figures of three kinds."""

    room: Bytes
    gain: Decibels
    draw: Power


def test_a_record_takes_figures_with_and_without_units() -> None:
    assert Part(room="1 kB", gain=-3, draw="2 kW") == Part(room=1000, gain="-3 dB", draw=2000.0)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "change", [{"room": 0.5}, {"room": 2**51}, {"gain": "101 dB"}, {"gain": -101}, {"draw": "1 MW"}]
)
def test_a_record_holds_the_bounds_of_its_figures(change: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Part.model_validate({"room": 1, "gain": 0, "draw": 0} | change)
