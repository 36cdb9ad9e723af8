"""A fleet: devices drawn from a mix of profiles in a seeded order, or named one by one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import Field, model_validator

from device_profiles.config_files import Config, choose, load
from device_profiles.errors import InputError
from device_profiles.planning import profile_lora_count
from device_profiles.profile import LORA_COUNTS, Profile, find_profile
from device_profiles.seeds import stream
from device_profiles.units import Decibels, Frequency, Power


class Kind(Config):
    """What a device of a fleet is: a profile, and what differs from it.

    Attributes:
        profile: A name of the catalog, or a TOML file beside the fleet's; ``NAME@MODE`` for a power
            mode.
        mode: The same, apart.
        lora_count: 12 to 36.
        snr_db: Mean, decibels, -100 to 100.
        bandwidth_hz: > 0.
        transmit_watts: >= 0.
    """

    profile: str
    mode: str | None = None
    lora_count: int | None = None
    snr_db: Decibels | None = None
    bandwidth_hz: Frequency | None = None
    transmit_watts: Power | None = None


AnyKind = TypeVar("AnyKind", bound=Kind)


class Member(Kind):
    """One kind of device of a mixed fleet.

    Attributes:
        share: Of the fleet, in (0, 1].
        count: Or how many of them there are, > 0.
    """

    share: Annotated[float, Field(gt=0, le=1)] | None = None
    count: Annotated[int, Field(gt=0, le=100_000)] | None = None

    @model_validator(mode="after")
    def _has_a_share_or_a_count(self) -> Member:
        if (self.share is None) == (self.count is None):
            raise ValueError("give either 'share' or 'count'")
        return self


class NamedDevice(Kind):
    """One device of a fleet that is given device by device. ``id``: its name in the run."""

    id: Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9._-]{0,62}[a-z0-9])?$")]


class Fleet(Config):
    """Devices of a run; ``find_fleet`` reads one from its file.

    Attributes:
        title: What it is called among people.
        seed: Of the order of a mixed fleet, instead of the run's.
        member: Kinds of a mixed fleet; their shares sum to one, or all have counts.
        device: Or every device by itself, in this order.
    """

    title: str = ""
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] | None = None
    member: tuple[Member, ...] = ()
    device: tuple[NamedDevice, ...] = ()

    @property
    def size(self) -> int | None:
        """How many devices it has, or None where shares leave that to the run."""
        if self.device:
            return len(self.device)
        counts = [member.count for member in self.member if member.count is not None]
        return sum(counts) or None

    @model_validator(mode="after")
    def _is_a_mix_or_a_list(self) -> Fleet:
        if bool(self.member) == bool(self.device):
            raise ValueError(
                "give either [[member]] tables, for a mix, or [[device]] tables, for devices by "
                "name" + ("" if self.member else "; there is neither")
            )
        if self.device and self.seed is not None:
            raise ValueError("'seed' orders a mix, and named devices have an order; leave it out")
        twice = [name for name, n in Counter(d.id for d in self.device).items() if n > 1]
        if twice:
            raise ValueError(f"two devices have the id '{twice[0]}'; give each its own")
        shares = [member.share for member in self.member if member.share is not None]
        if shares and len(shares) < len(self.member):
            raise ValueError("some members have a share and some a count; give all the same")
        if shares and abs(sum(shares) - 1) > 1e-6:
            raise ValueError(
                f"the shares of the members sum to {sum(shares):.6g}; make them sum to 1"
            )
        return self


@dataclass(frozen=True, kw_only=True)
class Device:
    """One drawn device.

    Attributes:
        id: Its kind and its place in the fleet, such as ``pi5-02``, or its own name.
        profile: What it is, in its power mode and with its link.
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
    """Return the fleet of that name, or of that TOML file, with its profiles' files found.

    Raises:
        InputError: If it is unknown or contradicts itself, a profile or mode is unknown, or a
            figure is out of range.
    """
    path = Path(name) if name.endswith(".toml") else fleets()[choose("fleet", name, fleets())]
    fleet = load(Fleet, path)
    members = [_found(m, path, f"member {number}") for number, m in enumerate(fleet.member, 1)]
    devices = [_found(d, path, f"device {number}") for number, d in enumerate(fleet.device, 1)]
    return fleet.model_copy(update={"member": tuple(members), "device": tuple(devices)})


def check_lora_count(count: int, field: str) -> int:
    """Return ``count`` if it is one that a device may train.

    Raises:
        InputError: Outside 12 to 36.
    """
    low, high = LORA_COUNTS
    if not low <= count <= high:
        raise InputError(f"{field} = {count}; choose {low} to {high}, what a device may train")
    return count


def lora_count_of(profile: Profile, given: int | None) -> int:
    """Return how many LoRA modules a device trains: as given, as its profile says, or as planned.

    Raises:
        InputError: If neither says, and not even 12 fit the device.
    """
    stated = profile.lora_count if given is None else given
    return profile_lora_count(profile) if stated is None else stated


def draw_fleet(fleet: Fleet, clients: int, seed: int) -> list[Device]:
    """Return ``clients`` devices: a mix in a seeded order, or the named ones in theirs.

    Raises:
        InputError: If ``clients`` is not positive or not the fleet's size, a profile is unknown, or
            neither it nor the fleet says how many LoRA modules it trains.
    """
    if clients < 1:
        raise InputError(f"clients = {clients}; a fleet has at least 1")
    if fleet.size not in (None, clients):
        raise InputError(f"clients = {clients}, and the fleet has {fleet.size} devices; give that")
    kinds: Sequence[Kind] = fleet.device or _in_order(fleet, clients, seed)
    weights = stream(seed, "preference").uniform(size=len(kinds))
    devices = []
    for place, kind in enumerate(kinds):
        profile = _profile_of(kind)
        devices.append(
            Device(
                id=kind.id if isinstance(kind, NamedDevice) else f"{profile.short}-{place:02d}",
                profile=profile,
                lora_count=lora_count_of(profile, kind.lora_count),
                preference=round(float(weights[place]), 3),
            )
        )
    return devices


def _in_order(fleet: Fleet, clients: int, seed: int) -> list[Member]:
    """Return a member for each device of a mixed fleet, in the seeded order."""
    shares = [member.share or 0.0 for member in fleet.member]
    counts = (
        [member.count or 0 for member in fleet.member]
        if fleet.size
        else _whole_numbers(shares, clients)
    )
    members = [m for m, n in zip(fleet.member, counts, strict=True) for _ in range(n)]
    order = stream(seed if fleet.seed is None else fleet.seed, "fleet").permutation(len(members))
    return [members[kind] for kind in order]


def _whole_numbers(shares: list[float], clients: int) -> list[int]:
    """Return how many of ``clients`` each share gets: largest remainders, first come first."""
    exact = [round(share * clients / sum(shares), 9) for share in shares]  # 0.29 * 100 is 29
    counts = [int(x) for x in exact]
    order = sorted(range(len(shares)), key=lambda i: (round(counts[i] - exact[i], 9), i))
    for i in order[: clients - sum(counts)]:
        counts[i] += 1
    return counts


def _found(kind: AnyKind, path: Path, place: str) -> AnyKind:
    """Return an entry of a fleet's file with its profile's file found, if all of it is usable."""
    if kind.lora_count is not None:
        check_lora_count(kind.lora_count, f"{path}: lora_count of {place}")
    if kind.mode is not None and "@" in kind.profile:
        raise InputError(
            f"{path}: {place} has mode = '{kind.mode}' and profile = '{kind.profile}', which names "
            f"a mode too; give one of both"
        )
    if kind.profile.endswith(".toml") or ".toml@" in kind.profile:
        kind = kind.model_copy(update={"profile": str(path.parent / kind.profile)})
    try:
        _profile_of(kind)
    except InputError as err:
        raise InputError(f"{path}: {place}: {err}") from err
    return kind


def _profile_of(kind: Kind) -> Profile:
    """Return a device's profile in its power mode and with its own link."""
    profile = find_profile(kind.profile)
    if kind.mode is not None:
        profile = profile.at_mode(kind.mode)
    link = {
        name: getattr(kind, name)
        for name in ("snr_db", "bandwidth_hz", "transmit_watts")
        if getattr(kind, name) is not None
    }
    return profile.model_copy(update={"radio": profile.radio.model_copy(update=link)})
