"""A profile of this machine from what was measured on it; what was not is called assumed.

SI units, as in ``device_profiles.profile``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from device_profiles.config_files import check
from device_profiles.profile import Profile
from edge_client.measure import Speed
from edge_client.preflight import FreeMemory

#: Where `devices measure` writes, and `devices plan --this-machine` looks: in the current folder.
THIS_MACHINE = Path("this-machine.toml")

_PAPER_RADIO = {"snr_db": 5.0, "bandwidth_hz": 1e6, "transmit_watts": 1.0}
_ASSUMED_WATTS, _ASSUMED_WATTS_A_THREAD = 10.0, 8.0


@dataclass(frozen=True, kw_only=True)
class PowerFigures:
    """Power of the machine, and where the figures are from.

    Attributes:
        watts: While training, > 0.
        idle_watts: While waiting; none where it is not known.
        source: In words.
    """

    watts: float
    idle_watts: float | None
    source: str


def known_power(
    *,
    given: float | None,
    given_idle: float | None,
    metered: float | None,
    metered_idle: float | None,
    meter: str,
    threads: int,
) -> PowerFigures:
    """Return the power to write down: what a person gives, else what was metered, else a guess.

    Args:
        given: Watts of training, by a person.
        given_idle: Of waiting, likewise.
        metered: Watts of training, as measured; none without a meter.
        metered_idle: Of waiting, likewise.
        meter: What the meter covers, or why there is none.
        threads: Processor threads that train.
    """
    if given is not None:
        return PowerFigures(watts=given, idle_watts=given_idle, source="given by the user")
    if metered is not None:
        idle = given_idle if given_idle is not None else metered_idle
        return PowerFigures(
            watts=metered,
            idle_watts=None if idle is None else min(idle, metered),
            source=f"measured: {meter}",
        )
    watts = _ASSUMED_WATTS + threads * _ASSUMED_WATTS_A_THREAD
    return PowerFigures(
        watts=watts,
        idle_watts=given_idle,
        source=f"assumed, so energy is modelled: {_ASSUMED_WATTS:g} W and "
        f"{_ASSUMED_WATTS_A_THREAD:g} W a thread; {meter}",
    )


def machine_profile(
    *,
    name: str,
    title: str,
    stamp: str,
    speed: Speed,
    power: PowerFigures,
    total_bytes: int,
    free: FreeMemory,
    radio: dict[str, float],
    precisions: tuple[str, ...],
    backends: tuple[str, ...],
) -> Profile:
    """Return a profile of this machine.

    Args:
        name: Of the profile.
        title: For people.
        stamp: When and with what it was measured, behind 'measured on this machine'.
        speed: What was timed.
        power: What it takes.
        total_bytes: Memory of the machine.
        free: What of it was free.
        radio: Figures of the radio that were given; the others are assumed.
        precisions: Those that were tried and work.
        backends: Of torch, that are here.

    Raises:
        InputError: If a figure is out of range.
    """
    measured = f"measured on this machine, {stamp}"
    compute: dict[str, Any] = {"flops": round(speed.flops), "watts": round(power.watts, 2)}
    if power.idle_watts is not None:
        compute["idle_watts"] = round(power.idle_watts, 2)
    sources = {
        "compute.flops": f"{measured}: products in a training step of GPT-2's width; a large "
        f"product alone reaches {speed.gemm_flops / 1e9:.3g} GFLOP/s",
        "compute.watts": _stamped(power.source, measured),
        "memory.bytes": measured,
        "memory.bandwidth": f"{measured}: a copy, reading and writing counted each",
        "memory.reserved_bytes": f"{measured}: what was not free then ({free.source})",
        "precisions": f"{measured}: tried",
        "backends": f"{measured}: what torch sees",
    }
    if power.idle_watts is not None:
        sources["compute.idle_watts"] = sources["compute.watts"]
    for field in _PAPER_RADIO:
        sources[f"radio.{field}"] = (
            "given by the user" if field in radio else "assumed: the link of arXiv 2404.13238v2"
        )
    return check(
        Profile,
        {
            "name": name,
            "title": title,
            "short": re.sub(r"[^a-z0-9]", "", name)[:12] or "here",
            "compute": compute,
            "memory": {
                "bytes": total_bytes,
                "bandwidth": round(speed.bandwidth),
                "reserved_bytes": max(0, total_bytes - free.bytes),
            },
            "radio": {**_PAPER_RADIO, **radio},
            "precisions": list(precisions),
            "backends": list(backends),
            "sources": sources,
        },
        "this machine",
    )


def profile_name(words: str) -> str:
    """Return words as a profile may be called."""
    plain = re.sub(r"[^a-z0-9._-]+", "-", words.lower()).strip("._-")[:42].strip("._-")
    return plain or "this-machine"


def _stamped(source: str, measured: str) -> str:
    return source.replace("measured", measured, 1) if source.startswith("measured") else source
