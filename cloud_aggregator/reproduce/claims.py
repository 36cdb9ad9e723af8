"""The paper's claims, each held against the figures: held, not held, or undecided.

When a difference between two methods counts is said in ``differences``. Energy and airtime are
modelled; 'the paper' is arXiv 2404.13238v2.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from cloud_aggregator.reproduce.differences import (
    Difference,
    Run,
    accuracy_difference,
    difference,
    points_phrase,
    rounds_phrase,
    values,
)
from cloud_aggregator.reproduce.fig4 import BASELINES, CONTROL, OURS
from cloud_aggregator.reproduce.gather import RunFigures, Runs
from cloud_aggregator.reproduce.words import amount, joined, named

Verdict = Literal["held", "not held", "undecided"]

FEDERATED = (OURS, *BASELINES)
REPORTED_SAVING = 0.43  # of PWFF against the baseline PFL
_A_PERCENT = 0.01  # the paper gives no digit after the point
# One upload of 18.6 Mbit over Rayleigh blocks of 10 ms varies by 1.8 %, the mean of 300 by 0.1 %.
_SAME_ENERGY = 0.01
_SHEPHERD, _PFL = "fedlora", "vanilla-fl"  # what uploads the same as those baselines of the paper


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What is claimed, what came of it, and the sentence with the figures."""

    text: str
    verdict: Verdict
    sentence: str


def judge(runs: Runs) -> list[Claim]:
    """Return every claim, held against the figures of one experiment; the control is the last."""
    claims = (
        most_accurate, converges_fastest, saves_energy, shepherd_spends_least, better_than_alone,
    )  # fmt: skip
    return [claim(runs) for claim in claims]


def most_accurate(runs: Runs) -> Claim:
    """Return whether PWFF ends with the highest accuracy among the federated methods."""
    text = "PWFF has the highest accuracy among the federated methods"
    found = {m: accuracy_difference(runs, OURS, m) for m in BASELINES}
    return _wins(text, "on accuracy", found, points_phrase, lacking=lacking_of(runs, FEDERATED))


def converges_fastest(runs: Runs) -> Claim:
    """Return whether PWFF needs the fewest rounds to an accuracy that every method reaches.

    That accuracy is, in each seed, the lowest at which one of the methods ends.
    """
    text = "PWFF converges fastest"
    lacking = lacking_of(runs, FEDERATED)
    finals = [values(runs, m, lambda run: run.final) for m in FEDERATED]
    seeds = set.intersection(*map(set, finals))
    if lacking or not seeds:
        return undecided(text, lacking or "no seed has all of the methods")
    targets = {seed: min(final[seed] for final in finals) for seed in seeds}

    def rounds(run: RunFigures) -> float | None:
        return run.reaches(targets[run.seed]) if run.seed in targets else None

    # theirs minus ours: the rounds that PWFF is ahead
    found = {m: difference(runs, m, OURS, rounds) for m in BASELINES}
    needed = {m: statistics.fmean(values(runs, m, rounds).values()) for m in FEDERATED}
    claim = _wins(text, "on speed", found, rounds_phrase, lacking="")
    figures = joined([f"{named(m)} {mean:.1f}" for m, mean in needed.items()])
    return Claim(
        text=text,
        verdict=claim.verdict,
        sentence=f"{claim.sentence} Mean rounds to the accuracy at which the lowest of them ends: "
        f"{figures}.",
    )


def saves_energy(runs: Runs) -> Claim:
    """Return whether PWFF saves 43 % of the uplink energy of PFL (``vanilla-fl``)."""
    text = "PWFF spends 43 % less uplink energy than PFL, which uploads what vanilla-fl does"
    return saving_of(text, *uplink_joules(runs, (OURS, _PFL)), theirs=_PFL)


def saving_of(text: str, spent: Mapping[str, float], lacking: str, *, theirs: str) -> Claim:
    """Return whether PWFF saves 43 % of the uplink energy of another method.

    Args:
        text: What is claimed.
        spent: Joules a client and round, by method.
        lacking: What a comparison lacks; empty for nothing.
        theirs: The other method.
    """
    if lacking:
        return undecided(text, lacking)
    saving = 1 - spent[OURS] / spent[theirs]
    ours, other = amount(spent[OURS]), amount(spent[theirs])
    figures = (
        f"PWFF spends {100 * abs(saving):.1f} % {'less' if saving >= 0 else 'more'} uplink energy "
        f"than {named(theirs)}, {ours} against {other} J a client and round (modelled)"
    )
    held = abs(saving - REPORTED_SAVING) <= _A_PERCENT
    end = "the paper reports 43 %" if held else "not the 43 % that the paper reports"
    verdict: Verdict = "held" if held else "not held"
    return Claim(text=text, verdict=verdict, sentence=f"{figures}; {end}.")


def shepherd_spends_least(runs: Runs) -> Claim:
    """Return whether Shepherd (``fedlora``) spends the least uplink energy."""
    text = "Shepherd, which uploads what fedlora does, spends the least uplink energy"
    return least_of(text, *uplink_joules(runs, FEDERATED), theirs=_SHEPHERD)


def least_of(text: str, spent: Mapping[str, float], lacking: str, *, theirs: str) -> Claim:
    """Return whether one method spends the least uplink energy; as ``saving_of``."""
    if lacking:
        return undecided(text, lacking)
    least = min(spent.values())
    first = [m for m in spent if spent[m] <= least * (1 + _SAME_ENERGY)]
    rest = sorted((m for m in spent if m not in first), key=spent.__getitem__)
    others = "".join(f"; {named(m)} {amount(spent[m])} J" for m in rest)
    figures = (
        f"{joined([named(m) for m in first])} {'spends' if len(first) == 1 else 'spend'} the least "
        f"uplink energy with {amount(least)} J a client and round (modelled){others}"
    )
    if first == [theirs]:
        return Claim(text=text, verdict="held", sentence=f"{figures}.")
    if theirs in first:
        return Claim(text=text, verdict="undecided", sentence=f"{figures}: equal within 1 %.")
    return Claim(text=text, verdict="not held", sentence=f"{figures}.")


def better_than_alone(runs: Runs) -> Claim:
    """Return, as a control, whether PWFF ends above training alone."""
    text = "Control: sharing adapters is worth it, PWFF ends above local-only"
    found = {CONTROL: accuracy_difference(runs, OURS, CONTROL)}
    lacking = lacking_of(runs, (OURS, CONTROL))
    return _wins(text, "against training alone", found, points_phrase, lacking=lacking)


def variants(runs: Runs) -> list[str]:
    """Return a sentence for each variant that was run: accuracy and energy against its baseline."""
    own = "holds as many LoRA modules as its devices afford"
    said = []
    for variant, baseline, what in (
        ("vanilla-fl-own", "vanilla-fl", own),
        ("fedlora-own", "fedlora", own),
        ("fedlora-product", "fedlora", "averages the products B A instead of the factors"),
    ):
        d = accuracy_difference(runs, variant, baseline)
        spent, lacking = uplink_joules(runs, (variant, baseline))
        if d is not None and not lacking:
            said.append(
                f"{variant}, which {what}, ends {points_phrase(baseline, d)}; it spends "
                f"{amount(spent[variant])} instead of {amount(spent[baseline])} J a client and "
                "round (modelled)."
            )
    return said


def uplink_joules(runs: Runs, methods: Sequence[str]) -> tuple[dict[str, float], str]:
    """Return each method's uplink energy, and what lacks for a comparison (empty for nothing).

    Joules a client and round: the mean over the seeds that all of the methods have.
    """
    return spent_by(runs, methods, lambda run: run.mean(lambda r: r.uplink_joules))


def spent_by(
    runs: Mapping[str, Mapping[int, Run]], methods: Sequence[str], of: Callable[[Run], float]
) -> tuple[dict[str, float], str]:
    """Return the mean of a run's energy over the seeds that all of the methods have.

    Beside it, what lacks for a comparison (empty for nothing).
    """
    if lacking := lacking_of(runs, methods):
        return {}, lacking
    seeds = set.intersection(*(set(runs[m]) for m in methods))
    if not seeds:
        return {}, "no seed has all of the methods"
    spent = {m: statistics.fmean(of(runs[m][seed]) for seed in seeds) for m in methods}
    silent = [named(m) for m in methods if spent[m] <= 0]
    return spent, f"{joined(silent)} sent nothing" if silent else ""


def _wins(
    text: str,
    respect: str,
    found: Mapping[str, Difference | None],
    phrase: Callable[[str, Difference], str],
    *,
    lacking: str,
) -> Claim:
    """Return whether PWFF is ahead of each; a difference that does not count decides nothing."""
    known = [(m, d) for m, d in found.items() if d is not None]
    order = ("less", "none", "unknown", "more")
    known.sort(key=lambda pair: order.index(pair[1].sign))
    signs = [d.sign for _, d in known]
    phrases = "; ".join(phrase(m, d) for m, d in known)
    if "less" in signs:
        said = f"PWFF does not win {respect}: it is {phrases}."
        return Claim(text=text, verdict="not held", sentence=said)
    unpaired = joined([named(m) for m, d in found.items() if d is None])
    if lacking or unpaired:
        return undecided(text, lacking or f"PWFF shares no measured seed with {unpaired}")
    if "unknown" in signs:
        said = f"PWFF is {phrases}; one seed shows no spread and decides nothing."
        return Claim(text=text, verdict="undecided", sentence=said)
    if "none" in signs:
        said = f"PWFF is not shown to win {respect}: it is {phrases}."
        return Claim(text=text, verdict="undecided", sentence=said)
    return Claim(text=text, verdict="held", sentence=f"PWFF wins {respect}: it is {phrases}.")


def lacking_of(runs: Mapping[str, Mapping[int, Run]], methods: Sequence[str]) -> str:
    """Return a sentence on the methods that were not run; empty for none."""
    names = [named(m) for m in methods if not runs.get(m)]
    return f"{joined(names)} {'is' if len(names) == 1 else 'are'} not run" if names else ""


def undecided(text: str, why: str) -> Claim:
    """Return a claim that nothing decides, and why."""
    return Claim(text=text, verdict="undecided", sentence=f"{why}.")
