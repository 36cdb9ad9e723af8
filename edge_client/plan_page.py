"""The page docs/devices.md: every catalog device's LoRA count, what binds it, and every input."""

from __future__ import annotations

from collections.abc import Sequence

from device_profiles.planning import Budget, Plan
from device_profiles.profile import Profile
from device_profiles.round_estimate import Job

_HEAD = """# What each device would do

Written by `pwff devices plan --all --markdown`; a test holds that it is what the command prints.
Everything here is modelled from the profiles (`pwff devices show NAME` has the source of each
figure); most sustained rates there are assumed.

**The rule is a headroom policy, not a need.** `12 + floor(24 x min(scores))`, each score clipped to
0..1: memory log2(free / 2 GB) / 3, time log10(deadline / T12), energy
log10(budget / (W x T12 + upload)), data log10(examples / 500). T12 is the time of training in a
round with 12 modules, fp32, nothing compromised. The count never exceeds what fits memory, deadline
and energy; where it is lower, more modules would fit and the policy leaves the room.

"""


def plan_page(plans: Sequence[tuple[Profile, Plan | str]], job: Job, budget: Budget) -> str:
    """Return the page as Markdown."""
    shape = job.shape
    lines = [
        _HEAD + f"**The job**: a base of {shape.base.layers} blocks of width {shape.base.width}, "
        f"{shape.vocabulary:,} tokens in its vocabulary, adapters of size {shape.adapter_size}, "
        f"LoRA of rank {shape.lora_rank} on `{shape.placement}`; {job.samples:,} examples of "
        f"{job.tokens} tokens ({job.response} of them predicted), at most {job.max_length}; "
        f"{job.local_steps} steps of batch {job.batch_size} a round. **The budget**: "
        f"{budget.deadline_seconds:g} s and {budget.energy_joules:g} J a round.",
        "",
        "| device | LoRA | binds | fits at most | base | batch in parts of | upload | memory, GB "
        "| training, s | training, J | upload, s | upload, J |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [_plan_row(profile, found) for profile, found in plans]
    lines += [
        "",
        "The inputs of each count:",
        "",
        "| device | free, GB | W | FLOP/s | T12, s | upload at fp32, J | memory score | time score "
        "| energy score | data score |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [_input_row(p, found) for p, found in plans if not isinstance(found, str)]
    return "\n".join(lines) + "\n"


def _plan_row(profile: Profile, found: Plan | str) -> str:
    if isinstance(found, str):
        return f"| {_name(profile)} | none | {found} |" + " |" * 9
    estimate, setting = found.estimate, found.setting
    cells = [
        _name(profile),
        str(found.lora_count),
        ", ".join(found.binds) or "nothing",
        str(found.hard_count),
        setting.precision,
        str(setting.micro_batch),
        setting.codec,
        f"{estimate.memory.total / 1e9:.2f}",
        f"{estimate.compute_seconds:.4g}",
        f"{estimate.compute_joules:.4g}",
        f"{estimate.uplink_seconds:.4g}",
        f"{estimate.uplink_joules:.4g}",
    ]
    return f"| {' | '.join(cells)} |"


def _input_row(profile: Profile, found: Plan) -> str:
    canonical = found.canonical
    cells = [
        _name(profile),
        f"{found.free_bytes / 1e9:.3g}",
        f"{profile.compute.watts:g}",
        f"{profile.compute.flops:.3g}",
        f"{canonical.compute_seconds:.5g}",
        f"{canonical.uplink_joules:.5g}",
        *(f"{found.scores[name]:.4f}" for name in ("memory", "time", "energy", "data")),
    ]
    return f"| {' | '.join(cells)} |"


def _name(profile: Profile) -> str:
    name = profile.name if profile.mode is None else f"{profile.name}@{profile.mode}"
    return name + (" (emulation only)" if profile.emulation_only else "")
