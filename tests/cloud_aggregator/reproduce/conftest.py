"""Comparisons whose figures a test can work out by hand: as figures, and as records on disk."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from cloud_aggregator.records import RunRecord
from cloud_aggregator.reproduce.fig4 import EXPERIMENTS, FIGURE, PlannedRun, Settings, plan
from cloud_aggregator.reproduce.folder import Comparison, folder_of, keep
from cloud_aggregator.reproduce.gather import Gathered, RoundFigures, RunFigures
from tests.cloud_aggregator.reports.conftest import make_run

#: Joules of one upload at rank 8 and at rank 96, by hand: parameters of 32 bits each over the
#: ergodic rate of 1.715974 Mbit/s at 1 W; 36 adapters hold 580,968 parameters, 36 LoRA modules of
#: 768 x 768 hold 442,368 (rank 8) or 5,308,416 (rank 96).
JOULES = {
    8: {"pwff": 10.83, "vanilla-fl": 19.08, "fedada": 10.83, "fedlora": 8.25, "local-only": 0.0},
    96: {"pwff": 10.83, "vanilla-fl": 109.83, "fedada": 10.83, "fedlora": 98.99, "local-only": 0.0},
}
WIDTH = 128


@pytest.fixture(autouse=True)
def _same_logging() -> Iterator[None]:
    """Put the root logger back as it was: a command sets it."""
    handlers, level = logging.root.handlers[:], logging.root.level
    yield
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)


def run_figures(
    method: str, seed: int, accuracy: Sequence[float | None], joules: float = 1.0, **changes: Any
) -> RunFigures:
    """Return a run: accuracy in percent before the first round and after each."""
    shares = [None if value is None else value / 100 for value in accuracy]
    rounds = [
        RoundFigures(
            **{
                "accuracy": share,
                "loss": 4.0,
                "worst": None if share is None else share - 0.05,
                "uplink_bits": 2e6 * joules,
                "uplink_seconds": joules,
                "uplink_joules": joules,
                "compute_joules": 3.0,
                **changes,
            }
        )
        for share in shares[1:]
    ]
    return RunFigures(method=method, seed=seed, before=(shares[0], 4.5), rounds=tuple(rounds))


def runs_of(
    finals: Mapping[str, Sequence[float]], *, rank: int = 8
) -> dict[str, dict[int, RunFigures]]:
    """Return runs of two rounds: each method's final accuracy, percent, at seeds 0, 1, ..."""
    return {
        method: {
            seed: run_figures(method, seed, [20.0, 25.0, final], JOULES[rank].get(method, 5.0))
            for seed, final in enumerate(by_seed)
        }
        for method, by_seed in finals.items()
    }


def curves_of(curves: Mapping[str, Sequence[Sequence[float]]]) -> dict[str, dict[int, RunFigures]]:
    """Return runs by their accuracy, percent, before the first round and after each."""
    return {
        method: {seed: run_figures(method, seed, curve) for seed, curve in enumerate(by_seed)}
        for method, by_seed in curves.items()
    }


def gathered_of(
    runs: Mapping[str, Mapping[int, RunFigures]], *, name: str = EXPERIMENTS[0], rank: int = 96
) -> Gathered:
    """Return an experiment of these runs."""
    return Gathered(
        name=name,
        rank=rank,
        learning="learning: mini, rank 16",
        priced=f"priced: GPT-2-small shape, rank {rank}, modelled",
        runs=runs,
    )


def settings_of(**changes: Any) -> Settings:
    """Return the figure's methods at two seeds for two rounds."""
    return Settings(**{"seeds": (0, 1), "rounds": 2, "methods": FIGURE, **changes})


def write_run(
    out: Path, run: PlannedRun, *, rounds: int | None = None, **changes: Any
) -> RunRecord:
    """Write the record of a planned run: two clients of equal weight, +1 point a round.

    A client sends as many bits as ``JOULES`` has at rank 8, at 1.7 Mbit/s and 1 W.
    """
    done = run.experiment.total_rounds if rounds is None else rounds
    points = [0.20 + 0.01 * number for number in range(done + 1)]
    record = make_run(
        {"a": points, "b": [value - 0.02 for value in points]},
        method=run.experiment.method,
        seed=run.experiment.seed,
        run=run.name,
        **changes,
    )
    joules = JOULES[8].get(run.experiment.method, 5.0)
    for number, part in enumerate(record.rounds):
        sent = {"uplink_bits": 1.7e6 * joules, "uplink_seconds": joules, "uplink_joules": joules}
        clients = [client.model_copy(update=sent) for client in part.clients]
        record.rounds[number] = part.model_copy(update={"clients": clients})
    folder = folder_of(out, run)
    folder.write_record(record)
    config = {"machine": {"cpu": "a processor", "system": "Linux", "python": "3.10"}}
    (folder.path / "config.toml").write_text(
        tomli_w.dumps({**config, "packages": {"torch": "2.4"}})
    )
    return record


def write_comparison(out: Path, settings: Settings) -> tuple[Comparison, list[PlannedRun]]:
    """Write a comparison and every run of it, on a base of width 128."""
    comparison = Comparison(width=WIDTH, settings=settings)
    runs = plan(settings, WIDTH)
    keep(out, comparison)
    for run in runs:
        write_run(out, run)
    return comparison, runs
