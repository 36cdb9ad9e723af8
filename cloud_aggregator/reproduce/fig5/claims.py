"""What the paper says of Fig. 5, held against the figures: held, not held, or undecided.

A percentage of a reward needs a zero. Rewards that are learned from comparisons have none of their
own, so the one that is taken is said: the mean of the public reference set's scores. Where the
other method's reward is not above it, a percentage means nothing and is not given.
"""

from __future__ import annotations

import statistics

from cloud_aggregator.reproduce.claims import (
    Claim,
    lacking_of,
    least_of,
    saving_of,
    spent_by,
    undecided,
)
from cloud_aggregator.reproduce.differences import Difference, difference, values
from cloud_aggregator.reproduce.fig4 import OURS
from cloud_aggregator.reproduce.fig5.gather import RewardRun, RewardRuns
from cloud_aggregator.reproduce.words import counted, named, signed

REPORTED_GAIN = 0.40  # of PWFF's reward against SFL's
_SFL, _PFL, _SHEPHERD = "sfl", "pfl", "shepherd"
_MOST_CLIENTS = 0.8  # that alignment has to help, of the control


def judge(runs: RewardRuns) -> list[Claim]:
    """Return every claim, held against the figures of one experiment; the control is the last."""
    claims = (more_reward, saves_energy, shepherd_spends_least, alignment_helps)
    return [claim(runs) for claim in claims]


def more_reward(runs: RewardRuns) -> Claim:
    """Return whether PWFF ends with a reward at least 40 % above SFL's."""
    text = "PWFF ends with a reward 40 % above SFL's"
    if lacking := lacking_of(runs, (OURS, _SFL)):
        return undecided(text, lacking)
    d = difference(runs, OURS, _SFL, final)
    if d is None:
        return undecided(text, "PWFF and sfl share no seed")
    ours, theirs = (values(runs, m, final) for m in (OURS, _SFL))
    seeds = sorted(set(ours) & set(theirs))
    mine, other = (statistics.fmean(each[seed] for seed in seeds) for each in (ours, theirs))
    said = f"{reward_phrase(_SFL, d)}: {signed(mine)} against {signed(other)}"
    why = {
        "unknown": f"PWFF is {said}; one seed shows no spread and decides nothing",
        "none": f"PWFF is not shown to win: it is {said}",
    }
    if d.sign == "less":
        return Claim(text=text, verdict="not held", sentence=f"PWFF does not win: it is {said}.")
    if d.sign == "more" and other > 0:
        return _percentage(text, said, mine / other - 1)
    zero = (
        f"PWFF is {said}; sfl's reward is not above the reference set's mean, which is the only "
        "zero that there is, so it has no percentage"
    )
    return undecided(text, why.get(d.sign, zero))


def _percentage(text: str, said: str, gain: float) -> Claim:
    percent = f"{100 * gain:.0f} % with the reference set's mean as zero"
    if gain >= REPORTED_GAIN:
        return Claim(text=text, verdict="held", sentence=f"PWFF is {said}: {percent}.")
    return Claim(
        text=text,
        verdict="not held",
        sentence=f"PWFF is {said}: {percent}, less than the 40 % that the paper reports.",
    )


def saves_energy(runs: RewardRuns) -> Claim:
    """Return whether PWFF saves 43 % of PFL's uplink energy."""
    text = "PWFF spends 43 % less uplink energy than PFL"
    return saving_of(text, *spent_by(runs, (OURS, _PFL), _joules), theirs=_PFL)


def shepherd_spends_least(runs: RewardRuns) -> Claim:
    """Return whether Shepherd spends the least; aligned or not it sends the same in a round."""
    text = "Shepherd spends the least uplink energy"
    found = spent_by(runs, (OURS, _SFL, _PFL, _SHEPHERD), _joules)
    return least_of(text, *found, theirs=_SHEPHERD)


def alignment_helps(runs: RewardRuns) -> Claim:
    """Return, as a control, whether alignment raises the judge's reward for most of the clients."""
    text = "Control: alignment raises the judge's reward for at least 8 of 10 clients of PWFF"
    if lacking := lacking_of(runs, (OURS,)):
        return undecided(text, lacking)
    mine = [runs[OURS][seed] for seed in sorted(runs[OURS])]
    counts = ", ".join(f"{run.risen} of {run.clients}" for run in mine)
    rise = statistics.fmean(run.final.reward - run.before.reward for run in mine)
    held = all(run.risen >= _MOST_CLIENTS * run.clients for run in mine)
    return Claim(
        text=text,
        verdict="held" if held else "not held",
        sentence=f"By their own users' weights it rose for {counts} clients "
        f"({counted(len(mine), 'seed')}); the reward changed by {signed(rise)} on average.",
    )


def hacking(runs: RewardRuns) -> list[str]:
    """Return what the runs' own reward models say beside the judge, for each aligned method."""
    said = []
    for method, by_seed in runs.items():
        own = [run for run in by_seed.values() if run.aligned]
        rises = [
            run.own_after - run.own_before
            for run in own
            if run.own_after is not None and run.own_before is not None
        ]
        if rises:
            theirs = statistics.fmean(run.final.reward - run.before.reward for run in own) / 2
            said.append(
                f"{named(method)}: {signed(statistics.fmean(rises))} by its own reward models "
                f"(weighted), {signed(theirs)} by the judge (mean of both objectives)"
            )
    return said


def reward_phrase(method: str, d: Difference) -> str:
    """Return how far ours is from another method's reward, in deviations of the scores."""
    if d.sign == "unknown":
        return f"{signed(d.mean)} from {named(method)} in one seed"
    if d.sign == "none":
        return (
            f"no different from {named(method)} ({signed(d.mean)} on average, ± {d.spread:.2f} "
            f"over the seeds, ahead in {d.times(above=True)})"
        )
    above = d.sign == "more"
    word = "above" if above else "below"
    return f"{abs(d.mean):.2f} {word} {named(method)} (in {d.times(above=above)})"


def final(run: RewardRun) -> float:
    """Return a run's final reward."""
    return run.final.reward


def _joules(run: RewardRun) -> float:
    return run.uplink_joules
