"""The figures of a comparison, out of the records of its runs.

Accuracy and loss are example-weighted means over the clients; bits, seconds and joules are plain
means over the clients that sent (or computed) something in a round. SI units; loss in nats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cloud_aggregator.records import ClientRound, RoundRecord, RunRecord
from cloud_aggregator.reproduce.fig4 import PlannedRun, Settings, learning_rank, priced_rank
from cloud_aggregator.reproduce.folder import record_of, rounds_left
from cloud_aggregator.reproduce.words import learning_label, priced_label
from cloud_aggregator.summary import weighted_mean
from device_profiles.errors import InputError


@dataclass(frozen=True, kw_only=True)
class RoundFigures:
    """One round of one run.

    Attributes:
        accuracy: Share of the held-out responses' tokens.
        worst: The lowest accuracy of a client.
        uplink_bits: Of one client's upload, as priced.
        missed: Updates that were late, lost or rejected.
    """

    accuracy: float | None
    loss: float | None
    worst: float | None
    uplink_bits: float
    uplink_seconds: float
    uplink_joules: float
    compute_joules: float
    missed: int = 0


@dataclass(frozen=True, kw_only=True)
class RunFigures:
    """One run; ``before`` (accuracy, loss) is from before the first round."""

    method: str
    seed: int
    before: tuple[float | None, float | None]
    rounds: tuple[RoundFigures, ...]

    @property
    def final(self) -> float | None:
        """Accuracy after the last round."""
        return self.rounds[-1].accuracy

    @property
    def curve(self) -> tuple[float | None, ...]:
        """Accuracy before the first round and after each."""
        return (self.before[0], *(r.accuracy for r in self.rounds))

    def mean(self, of: Callable[[RoundFigures], float]) -> float:
        """Return the mean over the rounds."""
        return math.fsum(map(of, self.rounds)) / len(self.rounds)

    def reaches(self, accuracy: float) -> int | None:
        """Return the first round (0 before all) with at least this accuracy, or None."""
        there = (n for n, value in enumerate(self.curve) if value is not None and value >= accuracy)
        return next(there, None)


#: By method, then by seed.
Runs = Mapping[str, Mapping[int, RunFigures]]


@dataclass(frozen=True, kw_only=True)
class Gathered:
    """One experiment: what its axes are labelled with, and the figures of its runs.

    Attributes:
        rank: LoRA's, at which delay and energy are computed.
        runs: Those that are there, in the order of the settings.
        missing: A sentence for each run that is not.
    """

    name: str
    rank: int
    learning: str
    priced: str
    runs: Runs
    missing: tuple[str, ...] = ()

    @property
    def seeds(self) -> list[int]:
        """Those of which any run is there."""
        return sorted({seed for by_seed in self.runs.values() for seed in by_seed})


def read_records(runs: Sequence[PlannedRun], out: Path) -> dict[str, RunRecord]:
    """Return the records that are there, finished or not, by the runs' names.

    Raises:
        InputError: If one is damaged, or they are not of one base and one data set.
    """
    found = {run.name: record_of(out, run) for run in runs}
    records = {name: record for name, record in found.items() if record is not None}
    _check_alike(records)
    return records


def gather(
    settings: Settings, width: int, runs: Sequence[PlannedRun], records: Mapping[str, RunRecord]
) -> list[Gathered]:
    """Return the figures of every experiment, each run cut to the rounds that are compared."""
    base = next((r.model.name for r in records.values()), Path(settings.model).name)
    order = sorted(runs, key=lambda run: settings.methods.index(run.experiment.method))
    return [
        _experiment(name, base, width, [run for run in order if name in run.serves], records)
        for name in settings.experiments
    ]


def figures(record: RunRecord, rounds: int) -> RunFigures:
    """Return the figures of a run's first ``rounds`` rounds."""
    weights = {c.id: c.held_out_examples for c in record.clients}
    return RunFigures(
        method=record.method,
        seed=record.seed,
        before=(
            weighted_mean([(c.eval_accuracy, weights.get(c.id, 0)) for c in record.before]),
            weighted_mean([(c.eval_loss, weights.get(c.id, 0)) for c in record.before]),
        ),
        rounds=tuple(_round(r) for r in record.rounds[:rounds]),
    )


def _experiment(
    name: str,
    base: str,
    width: int,
    runs: Sequence[PlannedRun],
    records: Mapping[str, RunRecord],
) -> Gathered:
    found: dict[str, dict[int, RunFigures]] = {run.experiment.method: {} for run in runs}
    missing = []
    for run in runs:
        record, wanted = records.get(run.name), run.experiment.total_rounds
        left = rounds_left(run, record)
        if record is not None and not left:
            found[run.experiment.method][run.experiment.seed] = figures(record, wanted)
        else:
            done = f"broken off after {wanted - left} of {wanted} rounds" if record else "not run"
            missing.append(f"{run.experiment.method}, seed {run.experiment.seed}: {done}")
    rank = priced_rank(name)
    return Gathered(
        name=name,
        rank=rank,
        learning=learning_label(base, learning_rank(rank, width)),
        priced=priced_label(runs[0].experiment.priced_at, rank),
        runs={method: by_seed for method, by_seed in found.items() if by_seed},
        missing=tuple(missing),
    )


def _round(record: RoundRecord) -> RoundFigures:
    sent = [c for c in record.clients if c.uplink_bits]
    computed = [c for c in record.clients if c.compute_seconds]
    measured = [c.eval_accuracy for c in record.clients if c.eval_accuracy is not None]
    return RoundFigures(
        accuracy=record.global_.eval_accuracy,
        loss=record.global_.eval_loss,
        worst=min(measured, default=None),
        uplink_bits=_mean(sent, lambda c: c.uplink_bits),
        uplink_seconds=_mean(sent, lambda c: c.uplink_seconds),
        uplink_joules=_mean(sent, lambda c: c.uplink_joules),
        compute_joules=_mean(computed, lambda c: c.compute_joules),
        missed=sum(c.status in {"late", "lost", "rejected"} for c in record.clients),
    )


def _mean(clients: Sequence[ClientRound], of: Callable[[ClientRound], float]) -> float:
    return math.fsum(map(of, clients)) / len(clients) if clients else 0.0


def _check_alike(records: Mapping[str, RunRecord]) -> None:
    first: tuple[str, RunRecord] | None = None
    for name, record in records.items():
        first = first or (name, record)
        for what, then, now in (
            ("base", first[1].model.sha256, record.model.sha256),
            ("tokenizer", first[1].model.tokenizer_sha256, record.model.tokenizer_sha256),
            ("data", first[1].data.sha256, record.data.sha256),
            *_pairs_of_both(first[1], record),
        ):
            if then != now:
                raise InputError(
                    f"runs {first[0]} and {name} are of unlike content of the {what} (its hash "
                    "differs), so they cannot be compared; remove one of their folders, or start "
                    "in another --out"
                )


def _pairs_of_both(first: RunRecord, other: RunRecord) -> list[tuple[str, str, str]]:
    """Return the hashes of what both learn rewards from: a method may use one objective alone."""
    then, now = first.data.preferences, other.data.preferences
    return [(f"{name} pairs", then[name], now[name]) for name in then if name in now]
