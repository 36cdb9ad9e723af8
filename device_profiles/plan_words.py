"""Plans and refusals in sentences, with the figures that a reader needs to do the sum again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from device_profiles.profile import LORA_COUNTS

if TYPE_CHECKING:
    from device_profiles.planning import Plan

_REMEDIES = {
    "memory": "free memory, or choose a smaller base or a lower rank",
    "deadline": "give a longer deadline, fewer local steps or smaller batches",
    "energy": "give more energy, fewer local steps or smaller batches",
}


def reasons(plan: Plan) -> list[str]:
    """Return why a plan is what it is, a sentence each."""
    lines = [_why_count(plan)]
    setting, job, budget = plan.setting, plan.job, plan.budget
    if setting.max_length < job.max_length:
        lines.append(
            f"TEXT IS CUT to {setting.max_length} of {job.max_length} tokens: with longer text "
            "not even 12 modules fit. What is cut is not learned."
        )
    exact = []
    if setting.micro_batch < job.batch_size:
        exact.append(
            f"batches of {job.batch_size} go through in parts of {setting.micro_batch}, their "
            "gradients summed"
        )
    if setting.checkpoint:
        exact.append("blocks are computed twice instead of kept")
    if exact:
        words = " and ".join(exact)
        lines.append(f"{words[0].upper()}{words[1:]}, to fit; the result is the same.")
    if setting.precision != "fp32":
        lines.append(f"The base is held in {setting.precision}, rounded, since fp32 does not fit.")
    if setting.codec != "fp32":
        lines.append(
            f"Uploads are in {setting.codec}, rounded with error feedback: in fp32 one would take "
            f"too much of {budget.deadline_seconds:g} s or {budget.energy_joules:g} J."
        )
    if len(lines) == 1:
        lines.append("Nothing is compromised: whole batches, whole text, base and upload in fp32.")
    return lines


def _why_count(plan: Plan) -> str:
    low, high = LORA_COUNTS
    count = plan.lora_count
    if not plan.binds:
        return f"All {high} LoRA modules: no score of the policy is below 1, and they fit."
    if plan.binds == ("base",):
        return f"{count} LoRA modules: the base has no more sites."
    if plan.policy_count > plan.hard_count:
        return (
            f"{count} LoRA modules: one more does not fit {listed(plan.binds)} in any way of "
            f"training. The policy alone gives {plan.policy_count}."
        )
    (name,) = plan.binds
    score = plan.scores[name]
    return (
        f"{count} LoRA modules: {name} has the lowest score, {score:.3f}, and "
        f"{low} + floor({high - low} x {min(1.0, max(0.0, score)):.3f}) = {count}. "
        f"Headroom is the reason, not need: {plan.hard_count} would fit."
    )


def refusal(name: str, max_length: int, why: str, short: Sequence[str]) -> str:
    """Return why not even 12 LoRA modules fit a device, and what would help.

    Args:
        name: The device's.
        max_length: The shortest text that was tried, tokens.
        why: What does not fit.
        short: The limits that there should be more of.
    """
    return (
        f"{name} cannot train even {LORA_COUNTS[0]} LoRA modules, with text cut to {max_length} "
        f"tokens: {why}; {'; '.join(_REMEDIES[limit] for limit in short)}"
    )


def shortages(least: Mapping[str, float], allowed: Mapping[str, float]) -> str:
    """Return what the leanest way of training takes of some limits, and how much there is."""
    return ", and ".join(_shortage(limit, takes, allowed[limit]) for limit, takes in least.items())


def listed(words: Sequence[str]) -> str:
    """Return words as a list in a sentence: ``a, b and c``."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _shortage(limit: str, takes: float, allowed: float) -> str:
    if limit == "memory":
        return (
            f"the leanest way of training takes {takes / 1e9:.2f} GB of memory, and "
            f"{allowed / 1e9:.2f} GB may be filled"
        )
    if limit == "deadline":
        return f"the fastest round takes {takes:.4g} s, and the deadline is {allowed:.4g} s"
    return f"the thriftiest round takes {takes:.4g} J, and the budget is {allowed:.4g} J"
