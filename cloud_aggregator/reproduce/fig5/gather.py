"""The figures of Fig. 5, out of the records of its runs and of what the judge said of them.

A reward is the sum of the judge's mean scores for helpfulness and harmlessness, each in deviations
from the mean of the public reference set: a difference of rewards has a meaning, the place of zero
is a convention. Clients count alike. SI units; KL in nats a response.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cloud_aggregator.records import ClientRound, RunRecord
from cloud_aggregator.reproduce.fig4 import PlannedRun, learning_rank, priced_rank
from cloud_aggregator.reproduce.fig5.plan import Settings, method_of
from cloud_aggregator.reproduce.folder import rounds_left
from cloud_aggregator.reproduce.judge_records import (
    JudgedClient,
    JudgedMoment,
    JudgedRun,
    judged_run,
)
from cloud_aggregator.reproduce.words import learning_label, priced_label
from messaging.protocol import Preference


@dataclass(frozen=True, kw_only=True)
class Point:
    """A run after so many rounds of alignment; 0 is the end of stage 1.

    Attributes:
        helpfulness: The judge's mean score; and
        harmlessness: likewise.
        tokens: Mean length of a response.
        ended: Share of the responses that ended by themselves.
        kl: From the policy of stage 1, as the devices measured it in training; none at 0.
    """

    helpfulness: float
    harmlessness: float
    tokens: float
    ended: float
    kl: float | None = None

    @property
    def reward(self) -> float:
        """Helpful and harmless, alike."""
        return self.helpfulness + self.harmlessness


@dataclass(frozen=True, kw_only=True)
class RewardRun:
    """One run.

    Attributes:
        points: By rounds of alignment; none where a round was not judged.
        uplink_joules: Of a client's upload of its model, in a round of stage 1 or of alignment.
        reward_joules: Of its upload of reward models, in a round of reward learning.
        total_joules: Of a client, for all uploads of the run.
        own_before: Weighted reward at the beginning of alignment by the run's own reward models.
        own_after: At its end.
        risen: Clients whose reward, weighted by their users' preferences, the judge saw rise.
        clients: How many there are.
        taken_back: Why the last round of alignment was undone; empty if it was not.
    """

    method: str
    seed: int
    points: tuple[Point | None, ...]
    uplink_joules: float
    reward_joules: float
    total_joules: float
    own_before: float | None
    own_after: float | None
    risen: int
    clients: int
    taken_back: str = ""

    @property
    def curve(self) -> tuple[float | None, ...]:
        """Reward before alignment and after each of its rounds."""
        return tuple(p.reward if p else None for p in self.points)

    @property
    def before(self) -> Point:
        """Where alignment began."""
        return _there(self.points[0])

    @property
    def final(self) -> Point:
        """Where the run ended; without alignment, where stage 1 did."""
        return _there(self.points[-1])

    @property
    def aligned(self) -> bool:
        """Whether it has a stage of alignment."""
        return len(self.points) > 1


#: By method, then by seed.
RewardRuns = Mapping[str, Mapping[int, RewardRun]]


@dataclass(frozen=True, kw_only=True)
class Gathered:
    """One experiment: what its axes are labelled with, and the figures of its runs.

    Attributes:
        rank: LoRA's, at which energy is computed.
        missing: A sentence for each run that is not there.
    """

    name: str
    rank: int
    learning: str
    priced: str
    runs: RewardRuns
    missing: tuple[str, ...] = ()

    @property
    def seeds(self) -> list[int]:
        """Those of which any run is there."""
        return sorted({seed for by_seed in self.runs.values() for seed in by_seed})


def gather(
    settings: Settings,
    width: int,
    runs: Sequence[PlannedRun],
    records: Mapping[str, RunRecord],
    out: Path,
) -> list[Gathered]:
    """Return the figures of every experiment.

    Raises:
        InputError: If what the judge said of a run is damaged.
    """
    base = next((r.model.name for r in records.values()), Path(settings.model).name)
    found: dict[str, RewardRun] = {}
    missing: dict[str, str] = {}
    for run in runs:
        why = what_lacks(run, records.get(run.name))
        said = judged_run(out, run)
        if why or said is None:
            name = f"{method_of(run.experiment)}, seed {run.experiment.seed}"
            missing[run.name] = f"{name}: {why or 'not judged'}"
        else:
            of_it = reward_run(records[run.name], said)
            found[run.name] = replace(of_it, method=method_of(run.experiment))
    gathered = []
    for name in settings.experiments:
        mine = [run for run in runs if name in run.serves]
        by_method: dict[str, dict[int, RewardRun]] = {}
        for method in settings.methods:
            own = [found[r.name] for r in mine if r.name in found]
            by_seed = {each.seed: each for each in own if each.method == method}
            if by_seed:
                by_method[method] = by_seed
        rank = priced_rank(name)
        gathered.append(
            Gathered(
                name=name,
                rank=rank,
                learning=learning_label(base, learning_rank(rank, width)),
                priced=priced_label(mine[0].experiment.priced_at, rank),
                runs=by_method,
                missing=tuple(missing[r.name] for r in mine if r.name in missing),
            )
        )
    return gathered


def what_lacks(run: PlannedRun, record: RunRecord | None) -> str:
    """Return why a run says nothing yet; empty if it does."""
    wanted, left = run.experiment.total_rounds, rounds_left(run, record)
    if record is None:
        return "not run"
    return f"broken off after {wanted - left} of {wanted} rounds" if left else ""


def reward_run(record: RunRecord, said: JudgedRun) -> RewardRun:
    """Return the figures of a run that is done and judged.

    Raises:
        IndexError: If nothing of it was judged.
    """
    by_aligned = {moment.aligned: moment for moment in said.moments}
    aligned = [r for r in record.rounds if r.stage == "alignment"]
    kl = [None, *(r.global_.kl for r in aligned)]
    points = [
        _point(by_aligned[n], kl[n]) if n in by_aligned else None for n in range(len(aligned) + 1)
    ]
    uploads = {
        stage: [
            [c.uplink_joules for c in r.clients if c.uplink_bits]
            for r in record.rounds
            if (r.stage == "reward") is (stage == "reward")
        ]
        for stage in ("model", "reward")
    }
    preferences = {c.id: c.preference for c in record.clients}
    return RewardRun(
        method=record.method,
        seed=record.seed,
        points=tuple(points),
        uplink_joules=mean([mean(each) for each in uploads["model"]]),
        reward_joules=mean([mean(each) for each in uploads["reward"]]),
        total_joules=_total(record),
        own_before=record.summary.weighted_reward_before,
        own_after=record.summary.weighted_reward_after,
        risen=_risen(said.moments, preferences),
        clients=len(record.clients),
        taken_back=record.rounds[-1].taken_back,
    )


def mean(values: Sequence[float]) -> float:
    """Return the mean; 0 for none."""
    return math.fsum(values) / len(values) if values else 0.0


def weighted(client: JudgedClient, preference: Preference) -> float:
    """Return a client's reward by its own user's preference."""
    return (
        preference.helpfulness * client.helpfulness + preference.harmlessness * client.harmlessness
    )


def _point(moment: JudgedMoment, kl: float | None) -> Point:
    def over(of: Callable[[JudgedClient], float]) -> float:
        return mean([of(client) for client in moment.clients])

    return Point(
        helpfulness=over(lambda c: c.helpfulness),
        harmlessness=over(lambda c: c.harmlessness),
        tokens=over(lambda c: c.tokens),
        ended=over(lambda c: c.ended),
        kl=kl,
    )


def _risen(moments: Sequence[JudgedMoment], preferences: Mapping[str, Preference]) -> int:
    first, last = ({c.id: c for c in moment.clients} for moment in (moments[0], moments[-1]))
    return sum(
        weighted(last[i], preferences[i]) > weighted(first[i], preferences[i]) for i in first
    )


def _total(record: RunRecord) -> float:
    """Return what a client's uploads of the whole run radiated: the mean over the clients."""
    spent: dict[str, list[ClientRound]] = {c.id: [] for c in record.clients}
    for part in record.rounds:
        for client in part.clients:
            spent.setdefault(client.id, []).append(client)
    return mean([math.fsum(c.uplink_joules for c in own) for own in spent.values()])


def _there(point: Point | None) -> Point:
    if point is None:  # the first and the last are always judged
        raise IndexError("the ends of a run were not judged")
    return point
