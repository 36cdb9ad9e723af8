"""A fleet: devices drawn from a mix of profiles, in fixed shares and a seeded order."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated

from pydantic import Field

from device_profiles.config_files import Config, choose, load
from device_profiles.errors import InputError
from device_profiles.profile import LORA_COUNTS, Profile, find_profile
from device_profiles.seeds import stream


class Member(Config):
    """One kind of device of a fleet.

    ``profile``: a name of the catalog, or a TOML file beside the fleet's. ``share``: of the fleet,
    in (0, 1]. ``lora_count``: 12 to 36, instead of the profile's.
    """

    profile: str
    share: Annotated[float, Field(gt=0, le=1)]
    lora_count: int | None = None


class Fleet(Config):
    """A mix of devices; ``find_fleet`` holds that the shares of its members sum to one."""

    title: str = ""
    member: Annotated[list[Member], Field(min_length=1)]


@dataclass(frozen=True, kw_only=True)
class Device:
    """One drawn device.

    Attributes:
        id: Its kind and its place in the fleet, such as ``pi5-02``.
        profile: What it is.
        lora_count: How many LoRA modules it trains, 12 to 36.
        preference: Weight of helpfulness, in [0, 1]; harmlessness has the rest.
    """

    id: str
    profile: Profile
    lora_count: int
    preference: float


def fleets() -> dict[str, Path]:
    """Return the fleets that come with the project, by name."""
    folder = resources.files("device_profiles") / "fleets"
    return {
        entry.name[: -len(".toml")]: Path(str(entry))
        for entry in folder.iterdir()
        if entry.name.endswith(".toml")
    }


def find_fleet(name: str) -> Fleet:
    """Return the fleet of that name, or of that TOML file.

    Raises:
        InputError: If it is unknown, a profile is unknown, a LoRA count is out of range, or the
            shares do not sum to one.
    """
    path = Path(name) if name.endswith(".toml") else fleets()[choose("fleet", name, fleets())]
    fleet = load(Fleet, path)
    total = sum(m.share for m in fleet.member)
    if abs(total - 1) > 1e-6:
        raise InputError(
            f"{path}: the shares of the members sum to {total:.6g}; make them sum to 1"
        )
    members = []
    for number, member in enumerate(fleet.member, 1):
        if member.lora_count is not None:
            check_lora_count(member.lora_count, f"{path}: lora_count of member {number}")
        profile = member.profile
        if profile.endswith(".toml"):
            profile = str(path.parent / profile)
        find_profile(profile)
        members.append(member.model_copy(update={"profile": profile}))
    return fleet.model_copy(update={"member": members})


def check_lora_count(count: int, field: str) -> int:
    """Return ``count`` if it is one that a device may train.

    Raises:
        InputError: Outside 12 to 36.
    """
    low, high = LORA_COUNTS
    if not low <= count <= high:
        raise InputError(f"{field} = {count}; choose {low} to {high}, what a device may train")
    return count


def _whole_numbers(shares: list[float], clients: int) -> list[int]:
    """Return how many of ``clients`` each share gets: largest remainders, first come first."""
    exact = [round(share * clients / sum(shares), 9) for share in shares]  # 0.29 * 100 is 29
    counts = [int(x) for x in exact]
    order = sorted(range(len(shares)), key=lambda i: (round(counts[i] - exact[i], 9), i))
    for i in order[: clients - sum(counts)]:
        counts[i] += 1
    return counts


def draw_fleet(fleet: Fleet, clients: int, seed: int) -> list[Device]:
    """Return ``clients`` devices in a seeded order, named after their kind.

    Raises:
        InputError: If ``clients`` is not positive, or a profile is unknown.
    """
    if clients < 1:
        raise InputError(f"clients = {clients}; a fleet has at least 1")
    kinds: list[Member] = []
    for member, count in zip(
        fleet.member, _whole_numbers([m.share for m in fleet.member], clients), strict=True
    ):
        kinds += [member] * count
    order = stream(seed, "fleet").permutation(len(kinds))
    weights = stream(seed, "preference").uniform(size=len(kinds))
    devices = []
    for place, kind in enumerate(order):
        member = kinds[kind]
        profile = find_profile(member.profile)
        devices.append(
            Device(
                id=f"{profile.short}-{place:02d}",
                profile=profile,
                lora_count=profile.lora_count if member.lora_count is None else member.lora_count,
                preference=round(float(weights[place]), 3),
            )
        )
    return devices
