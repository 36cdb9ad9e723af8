"""How many LoRA modules a device trains, and how: a headroom policy under hard limits.

The policy gives ``12 + floor(24 * min(scores))``, each score clipped to 0..1 and computed at one
way of training (``Case.canonical``: fp32, whole batches, nothing computed twice), so that more of
anything never lowers it:

- memory: log2(free bytes / 2 GB) / 3
- time: log10(deadline / T12), T12 the seconds of training a round with 12 modules
- energy: log10(budget / (watts * T12 + joules of the upload))
- data: log10(samples / 500)

It leaves room on purpose: hardly a device of the catalog is held below 36 by what fits. The hard
limit is the largest count that fits memory, deadline and energy in some way of training; the lower
of the two is taken, in the least compromised way that fits it: smaller parts of a batch, then
blocks computed twice (both exact), then a smaller codec, then a lower precision. Text is cut only
where else not even 12 would fit, and then for 12 alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from device_profiles.channel import Link, profile_link
from device_profiles.plan_limits import (
    LIMITS,
    Budget,
    Case,
    InfeasiblePlanError,
    codecs,
    length_and_most,
    most_modules,
    ways,
)
from device_profiles.profile import LORA_COUNTS, Precision, Profile
from device_profiles.round_estimate import GPT2_SMALL, Job, RoundEstimate, Setting
from device_profiles.step_model import StepShape

__all__ = [
    "REFERENCE_BUDGET",
    "REFERENCE_JOB",
    "Budget",
    "InfeasiblePlanError",
    "Plan",
    "plan",
    "planned_precision",
    "policy_count",
    "profile_lora_count",
]

_POLICY_BYTES = 2e9  # free, for a score of 0; eight times that for 1
_POLICY_SAMPLES = 500


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a device will do in a round, and every input of its LoRA count.

    Attributes:
        profile: The device's name, with its power mode where it has some.
        lora_count: 12 to 36.
        binds: What keeps the count from being larger: a name of ``scores`` for the policy, rows of
            ``LIMITS`` for what fits, ``base`` where that has fewer sites; empty at 36.
        policy_count: What the policy alone gives.
        hard_count: What fits.
        scores: Of the policy, unclipped, by name.
        free_bytes: For training.
        canonical: A round with 12 modules, as the scores see it.
        estimate: A round as planned.
    """

    profile: str
    lora_count: int
    setting: Setting
    binds: tuple[str, ...]
    policy_count: int
    hard_count: int
    scores: dict[str, float]
    free_bytes: int
    canonical: RoundEstimate
    estimate: RoundEstimate
    job: Job
    budget: Budget


REFERENCE_JOB = Job(
    shape=StepShape(
        base=GPT2_SMALL,
        heads=12,
        vocabulary=50_257,
        positions=1024,
        adapter_size=10,
        placement="qkv",
        lora_rank=96,
    ),
    samples=5_200,
    tokens=128,
    response=64,
    max_length=256,
    local_steps=50,
    batch_size=4,
)
REFERENCE_BUDGET = Budget(deadline_seconds=600.0, energy_joules=20_000.0)


def plan(profile: Profile, job: Job, budget: Budget, link: Link | None = None) -> Plan:
    """Return what a device does in a round.

    Args:
        profile: What the device is.
        job: What is asked of it.
        budget: What that may take.
        link: Its uplink; its own radio's by default.

    Raises:
        InfeasiblePlanError: If not even 12 LoRA modules fit.
        InputError: If the job does not fit its base, or the base has fewer than 12 sites.
    """
    case = Case(
        profile=profile,
        job=job,
        budget=budget,
        link=profile_link(profile.radio) if link is None else link,
    )
    canonical = case.estimate(LORA_COUNTS[0], case.canonical)
    scores = _scores(case, canonical)
    policy = policy_count(scores)
    length, hard = length_and_most(case)
    count = min(policy, hard)
    setting = next(way for way in ways(case, length, codecs(case)) if not case.exceeded(count, way))
    return Plan(
        profile=profile.name if profile.mode is None else f"{profile.name}@{profile.mode}",
        lora_count=count,
        setting=setting,
        binds=_binds(case, scores, policy, hard),
        policy_count=policy,
        hard_count=hard,
        scores=scores,
        free_bytes=profile.memory.free_bytes,
        canonical=canonical,
        estimate=case.estimate(count, setting),
        job=job,
        budget=budget,
    )


def profile_lora_count(profile: Profile) -> int:
    """Return how many LoRA modules a device trains in the reference job, over its own radio.

    Raises:
        InfeasiblePlanError: If not even 12 fit.
    """
    return plan(profile, REFERENCE_JOB, REFERENCE_BUDGET).lora_count


def planned_precision(profile: Profile) -> Precision:
    """Return the precision of the base in the reference job.

    Raises:
        InfeasiblePlanError: If not even 12 LoRA modules fit.
    """
    return plan(profile, REFERENCE_JOB, REFERENCE_BUDGET).setting.precision


def policy_count(scores: Mapping[str, float]) -> int:
    """Return the count that the lowest score gives."""
    low, high = LORA_COUNTS
    return low + math.floor((high - low) * min(1.0, max(0.0, min(scores.values()))))


def _scores(case: Case, canonical: RoundEstimate) -> dict[str, float]:
    free, budget = case.profile.memory.free_bytes, case.budget
    spent = canonical.compute_joules + canonical.uplink_joules
    return {
        "memory": math.log2(free / _POLICY_BYTES) / 3,
        "time": math.log10(budget.deadline_seconds / canonical.compute_seconds),
        "energy": math.log10(budget.energy_joules / spent),
        "data": math.log10(case.job.samples / _POLICY_SAMPLES),
    }


def _binds(case: Case, scores: Mapping[str, float], policy: int, hard: int) -> tuple[str, ...]:
    if min(policy, hard) == LORA_COUNTS[1]:
        return ()
    if policy <= hard:
        return (min(scores, key=lambda name: scores[name]),)
    if hard == case.most_sites:
        return ("base",)
    whole = case.job.max_length
    alone = [name for name in LIMITS if (most_modules(case, whole, [name]) or 0) <= hard]
    return tuple(alone) or LIMITS
