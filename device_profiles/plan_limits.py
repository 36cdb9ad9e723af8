"""Which ways of training fit a device, and how many LoRA modules in any of them.

SI units: bytes, seconds, joules.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product

from device_profiles.channel import Link
from device_profiles.errors import InputError
from device_profiles.modules import lora_sites
from device_profiles.plan_words import listed, refusal, shortages
from device_profiles.profile import LORA_COUNTS, Profile
from device_profiles.round_estimate import CODEC_BITS, Job, RoundEstimate, Setting, round_estimate

MEMORY_SHARE = 0.9  # of the free bytes that training may fill
UPLINK_SHARE = 0.5  # of deadline or energy that an upload may take before a smaller codec is chosen
LENGTH_SHARES = (1.0, 0.75, 0.5)
LIMITS = ("memory", "deadline", "energy")

_CODECS = tuple(CODEC_BITS)
_PRECISIONS = ("fp32", "bf16", "int8", "nf4")


class InfeasiblePlanError(InputError):
    """Not even 12 LoRA modules fit the device."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a round may take of a device: seconds and joules, both > 0."""

    deadline_seconds: float
    energy_joules: float

    def __post_init__(self) -> None:
        for name in ("deadline_seconds", "energy_joules"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"{name} = {getattr(self, name):g}; give more than 0")


@dataclass(frozen=True, kw_only=True)
class Case:
    """A device, what is asked of it, and what that may take."""

    profile: Profile
    job: Job
    budget: Budget
    link: Link

    def __post_init__(self) -> None:
        if self.most_sites < LORA_COUNTS[0]:
            shape = self.job.shape
            raise InputError(
                f"placement '{shape.placement}' has {self.most_sites} sites on a base of "
                f"{shape.base.layers} blocks, and a plan begins with {LORA_COUNTS[0]} LoRA "
                "modules; choose a base of more blocks"
            )

    @property
    def canonical(self) -> Setting:
        """The way of training in which devices are compared."""
        return Setting(
            precision="fp32",
            codec="fp32",
            checkpoint=False,
            micro_batch=self.job.batch_size,
            max_length=self.job.max_length,
        )

    @property
    def most_sites(self) -> int:
        """The largest count that the base has sites for, 36 at most."""
        shape = self.job.shape
        return min(len(lora_sites(shape.base, shape.placement)), LORA_COUNTS[1])

    @property
    def allowed(self) -> dict[str, float]:
        """How much of each limit there is."""
        return {
            "memory": MEMORY_SHARE * self.profile.memory.free_bytes,
            "deadline": self.budget.deadline_seconds,
            "energy": self.budget.energy_joules,
        }

    def estimate(self, count: int, setting: Setting) -> RoundEstimate:
        """Return what a round takes with so many modules, trained that way."""
        return round_estimate(self.profile, self.job, self.link, count, setting)

    def exceeded(self, count: int, setting: Setting) -> list[str]:
        """Return the limits that do not hold so many modules, trained that way."""
        taken = _taken(self.estimate(count, setting))
        return [name for name, most in self.allowed.items() if taken[name] > most]


def _taken(estimate: RoundEstimate) -> dict[str, float]:
    """Return how much of each limit a round takes."""
    return {
        "memory": estimate.memory.total,
        "deadline": estimate.seconds,
        "energy": estimate.joules,
    }


def ways(case: Case, max_length: int, allowed: Sequence[str]) -> Iterator[Setting]:
    """Yield the ways of training, the least compromised first.

    Args:
        case: The device and what is asked of it.
        max_length: Of the examples.
        allowed: Codecs, the least compromised first.
    """
    batch = case.job.batch_size
    parts = sorted({math.ceil(batch / n) for n in range(1, batch + 1)}, reverse=True)
    for precision in _PRECISIONS:
        if precision not in case.profile.precisions:
            continue
        for codec, checkpoint, part in product(allowed, (False, True), parts):
            yield Setting(
                precision=precision,
                codec=codec,
                checkpoint=checkpoint,
                micro_batch=part,
                max_length=max_length,
            )


def codecs(case: Case) -> tuple[str, ...]:
    """Return the codecs from the first whose upload leaves room for training."""
    for i, codec in enumerate(_CODECS):
        sent = case.estimate(LORA_COUNTS[0], replace(case.canonical, codec=codec))
        if (
            sent.uplink_seconds <= UPLINK_SHARE * case.budget.deadline_seconds
            and sent.uplink_joules <= UPLINK_SHARE * case.budget.energy_joules
        ):
            return _CODECS[i:]
    return _CODECS[-1:]


def length_and_most(case: Case) -> tuple[int, int]:
    """Return the longest text with which 12 fit, and the largest count that fits then.

    A cut text is for 12 alone: else less memory could give a larger count.
    """
    whole = case.job.max_length
    for share in LENGTH_SHARES:
        length = max(8, int(share * whole))
        count = most_modules(case, length)
        if count is not None:
            return length, count if length == whole else LORA_COUNTS[0]
    raise InfeasiblePlanError(_why_not(case))


def most_modules(case: Case, max_length: int, limits: Sequence[str] = LIMITS) -> int | None:
    """Return the largest count that fits in some way, none below 12; by the limits named alone.

    The smallest codec stands for all: a larger one only takes more.
    """
    all_ways = list(ways(case, max_length, _CODECS[-1:]))

    def fits(count: int) -> bool:
        return any(not set(case.exceeded(count, way)) & set(limits) for way in all_ways)

    low, high = LORA_COUNTS[0] - 1, case.most_sites
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low if low >= LORA_COUNTS[0] else None


def _why_not(case: Case) -> str:
    """Return which limits do not hold 12 modules in any way, and what would."""
    length = max(8, int(LENGTH_SHARES[-1] * case.job.max_length))
    taken = [_taken(case.estimate(LORA_COUNTS[0], way)) for way in ways(case, length, _CODECS[-1:])]
    sets = [some for size in (1, 2, 3) for some in combinations(LIMITS, size)]
    short = next(
        some
        for some in sets
        if all(any(row[name] > case.allowed[name] for name in some) for row in taken)
    )
    if len(short) == 1:  # others may be short by themselves as well
        short = tuple(n for n in LIMITS if all(row[n] > case.allowed[n] for row in taken))
        least = {name: min(row[name] for row in taken) for name in short}
        return refusal(case.profile.name, length, shortages(least, case.allowed), short)
    return refusal(case.profile.name, length, f"no way of training meets {listed(short)}", short)
