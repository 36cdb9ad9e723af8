"""Figures with units: "8 GB", "2.5 TFLOP/s", "18 Wh" in a file become numbers in SI units.

One table says which units each kind of figure may have; a figure that is a plain number is in the
kind's SI unit. Decibels stay decibels. Below it are the types of the figures that files may state.
"""

from __future__ import annotations

import math
import re
from functools import partial
from typing import Annotated

from pydantic import BeforeValidator, Field

from device_profiles.config_files import nearest

#: Units by kind of figure, each with its size in the kind's first, its SI, unit.
UNITS: dict[str, dict[str, float]] = {
    "memory": {
        "B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12,
        "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40,
    },
    "bandwidth": {
        "B/s": 1, "kB/s": 1e3, "MB/s": 1e6, "GB/s": 1e9, "TB/s": 1e12,
        "KiB/s": 2**10, "MiB/s": 2**20, "GiB/s": 2**30,
    },
    "rate": {"FLOP/s": 1, "MFLOP/s": 1e6, "GFLOP/s": 1e9, "TFLOP/s": 1e12, "PFLOP/s": 1e15},
    "power": {"W": 1, "mW": 1e-3, "kW": 1e3},
    "frequency": {"Hz": 1, "kHz": 1e3, "MHz": 1e6, "GHz": 1e9},
    "energy": {"J": 1, "kJ": 1e3, "MJ": 1e6, "mWh": 3.6, "Wh": 3600, "kWh": 3.6e6},
    "level": {"dB": 1},
    "plain": {},
}  # fmt: skip

_SIGNED = ("level",)
_NAMES = {
    "memory": "memory",
    "bandwidth": "a bandwidth of memory",
    "rate": "a rate of computing",
    "power": "a power",
    "frequency": "a frequency",
    "energy": "an energy",
    "level": "a level",
    "plain": "a figure without a unit",
}
_FIGURE = re.compile(r"\s*([+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)\s*(.*?)\s*")


def parse_figure(value: object, kind: str) -> float | int:
    """Return a figure of a file in SI units.

    Args:
        value: A number in the kind's SI unit, or a string of a number and a unit.
        kind: A row of ``UNITS``; figures of all kinds but ``level`` are 0 or more.

    Returns:
        The number as it stands, or the string's in SI units; memory in whole bytes.

    Raises:
        ValueError: If it is neither, its unit is unknown or of another kind, or it is negative.
            The message says what is accepted; who reads the file adds its name and the field.
    """
    units = UNITS[kind]
    number: float | int
    if isinstance(value, str):
        found = _FIGURE.fullmatch(value)
        if found is None:
            raise ValueError(f"no figure; give {_accepted(kind)}")
        if found[2] not in units:
            raise ValueError(_why_not(found[2], kind))
        number = float(found[1]) * units[found[2]]
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        number = value
    else:
        raise ValueError(f"no figure; give {_accepted(kind)}")  # noqa: TRY004 - pydantic's way
    if not math.isfinite(number):
        raise ValueError(f"not finite; give {_accepted(kind)}")
    if number < 0 and kind not in _SIGNED:
        raise ValueError(f"negative; give {_accepted(kind)}")
    return round(number) if kind == "memory" and isinstance(value, str) else number


def _accepted(kind: str) -> str:
    """Return what a figure of this kind may be, for the end of a sentence."""
    amount = "a number" if kind in _SIGNED else "a number of 0 or more"
    units = list(UNITS[kind])
    if not units:
        return f"{amount}, without a unit"
    return f"{amount} in {units[0]}, or in quotes with a unit ({', '.join(units)})"


def _why_not(unit: str, kind: str) -> str:
    """Return what is wrong with a unit that ``kind`` does not have, and what it has."""
    if not unit:
        return f"a figure in quotes has a unit; give {_accepted(kind)}"
    other = next((name for name, units in UNITS.items() if unit in units), None)
    if other is not None:
        return f"'{unit}' is a unit of {other}, and this is {_NAMES[kind]}; give {_accepted(kind)}"
    hint = nearest(unit, UNITS[kind])
    return f"unknown unit '{unit}'{hint + ' Give' if hint else '; give'} {_accepted(kind)}"


def _figure(kind: str) -> BeforeValidator:
    return BeforeValidator(partial(parse_figure, kind=kind))


Bytes = Annotated[int, _figure("memory"), Field(ge=0, le=2**50)]
ByteRate = Annotated[float, _figure("bandwidth"), Field(gt=0, le=1e15)]
FlopRate = Annotated[float, _figure("rate"), Field(gt=0, le=1e18)]
Power = Annotated[float, _figure("power"), Field(ge=0, le=1e5)]
Frequency = Annotated[float, _figure("frequency"), Field(gt=0, le=1e12)]
Energy = Annotated[float, _figure("energy"), Field(gt=0, le=1e12)]
Decibels = Annotated[float, _figure("level"), Field(ge=-100, le=100)]
Plain = Annotated[float, _figure("plain"), Field(gt=0, le=1e18)]
