"""Judged runs whose figures a test can work out by hand: as figures, and as files on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w

from cloud_aggregator.records import GlobalRound, RoundRecord, RunRecord
from cloud_aggregator.reproduce.fig4 import PlannedRun
from cloud_aggregator.reproduce.fig5.gather import Point, RewardRun
from cloud_aggregator.reproduce.folder import folder_of
from cloud_aggregator.reproduce.judge_records import (
    HeadWorth,
    JudgedClient,
    JudgedMoment,
    JudgedRun,
    JudgeRecord,
    write_judge,
    write_judged,
)
from tests.cloud_aggregator.reports.conftest import make_run

#: Joules of one upload at rank 8, as ``conftest.JOULES`` derives them.
JOULES = {"pwff": 10.83, "sfl": 10.83, "pfl": 19.08, "shepherd": 8.25, "shepherd-aligned": 8.25}
HEADS = b"heads"


def point(reward: float, kl: float | None = None) -> Point:
    """Return a point with that reward: three quarters of it helpfulness."""
    return Point(
        helpfulness=0.75 * reward, harmlessness=0.25 * reward, tokens=20.0, ended=0.5, kl=kl
    )


def reward_run_of(
    method: str, seed: int, rewards: Sequence[float | None], joules: float = 1.0, **changes: Any
) -> RewardRun:
    """Return a run by its rewards before alignment and after each of its rounds."""
    fields: dict[str, Any] = {
        "method": method,
        "seed": seed,
        "points": tuple(None if reward is None else point(reward) for reward in rewards),
        "uplink_joules": joules,
        "reward_joules": 0.5,
        "total_joules": 10 * joules,
        "own_before": 0.0,
        "own_after": 1.0,
        "risen": 8,
        "clients": 10,
    }
    return RewardRun(**{**fields, **changes})


def reward_runs_of(
    finals: Mapping[str, Sequence[float]], joules: Mapping[str, float] = JOULES
) -> dict[str, dict[int, RewardRun]]:
    """Return runs of one round of alignment: each method's final reward at seeds 0, 1, ..."""
    return {
        method: {
            seed: reward_run_of(method, seed, [0.1, final], joules[method])
            for seed, final in enumerate(by_seed)
        }
        for method, by_seed in finals.items()
    }


def a_judge(out: Path) -> JudgeRecord:
    """Write a judge that nobody asks: its record, and bytes in place of its heads."""
    head = HeadWorth(
        learned_pairs=80, pairs=20, accuracy=0.8, longer_wins=0.3, calibration_error=0.1
    )
    record = JudgeRecord(
        sha256=hashlib.sha256(HEADS).hexdigest(),
        base="a" * 64,
        pairs="d" * 64,
        run_pairs={"helpfulness": 100, "harmlessness": 100},
        heads={"helpfulness": head, "harmlessness": head},
    )
    write_judge(out, record, HEADS)
    return record


def three_stages(run: PlannedRun, **changes: Any) -> RunRecord:
    """Return the record of a planned run: clients a and b, ``JOULES`` for each model upload.

    An upload of reward models takes 0.5 J. KL is 2 nats after each round of alignment. Weights of
    helpfulness are 0.75, as ``make_run`` has them.
    """
    stages = [s for s in run.experiment.stage_names for _ in range(run.experiment.rounds_of(s))]
    curve = [0.2] * (len(stages) + 1)
    record = make_run(
        {"a": curve, "b": curve},
        method=run.experiment.method,
        seed=run.experiment.seed,
        run=run.name,
        stages=run.experiment.stage_names,
    )
    rounds: list[RoundRecord] = []
    for stage, part in zip(stages, record.rounds, strict=True):
        joules = 0.5 if stage == "reward" else JOULES[run.experiment.method]
        clients = [
            c.model_copy(update={"uplink_bits": 1.7e6 * joules, "uplink_joules": joules})
            for c in part.clients
        ]
        figures = GlobalRound(kl=2.0) if stage == "alignment" else part.global_
        rounds.append(
            part.model_copy(update={"stage": stage, "clients": clients, "global_": figures})
        )
    return record.model_copy(update={"rounds": rounds, **changes})


def said_of(record: RunRecord, rewards: Sequence[tuple[float, float]], judge: str) -> JudgedRun:
    """Return what a judge said: for each moment (helpfulness, harmlessness) of client a.

    Client b has 0.2 more of the one and 0.2 less of the other.
    """
    first = sum(r.stage == "instruction" for r in record.rounds)
    return JudgedRun(
        judge=judge,
        rounds=len(record.rounds),
        moments=[
            JudgedMoment(
                aligned=number,
                round=first + number,
                clients=[
                    JudgedClient(
                        id=name, responses=4, helpfulness=helpful + shift,
                        harmlessness=harmless - shift, tokens=10.0 + number, ended=0.25,
                    )
                    for name, shift in (("a", 0.0), ("b", 0.2))
                ],
            )
            for number, (helpful, harmless) in enumerate(rewards)
        ],
    )  # fmt: skip


def write_reward_run(
    out: Path, run: PlannedRun, rewards: Sequence[tuple[float, float]], judge: str, **changes: Any
) -> RunRecord:
    """Write a run's record, configuration and what a judge said of it."""
    record = three_stages(run, **changes)
    folder = folder_of(out, run)
    folder.write_record(record)
    machine = {"cpu": "a processor", "system": "Linux", "python": "3.10"}
    config = tomli_w.dumps({"machine": machine, "packages": {"torch": "2.4"}})
    (folder.path / "config.toml").write_text(config)
    write_judged(out, run, said_of(record, rewards, judge))
    return record
