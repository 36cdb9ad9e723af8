"""Where an emulated round's time goes: training, generation, evaluation, and everything else.

    python benchmarks/round_profile.py
    python benchmarks/round_profile.py --workers 2 --stages instruction,reward,alignment

Devices time their own work, the aggregator its own (``observed.spent_seconds`` in ``run.json``).
What is left of the workers' time is transport and waiting: for the others of a round, for the
aggregator, for messages. Shares are of workers times wall seconds, summed over the rounds.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path

from cloud_aggregator import Experiment, RunRecord, emulate

sys.path.insert(0, str(Path(__file__).resolve().parent))

from fleets.machine import cpu, ours

#: What a round is for; of the rest there should be little.
WORK = ("training", "generation", "evaluation")
REST = ("codec", "disk", "intake", "aggregation")
LEFT = "transport and waiting"


def main() -> None:
    """Run each transport, and print a Markdown table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="mini")
    parser.add_argument("--stages", default="instruction,reward,alignment")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", default="12,40,1", help="a client and round, one a stage")
    parser.add_argument("--held-out-prompts", type=int, default=8)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--transports", nargs="+", default=["memory", "mqtt"])
    arguments = parser.parse_args()
    load = ", ".join(f"{one:.1f}" for one in os.getloadavg())
    print(f"{cpu()}, {os.cpu_count()} cores; {ours()}; load average {load}.\n")
    names = (*WORK, *REST, LEFT, "beside the work")
    print(f"| transport | stage | wall, s | {' | '.join(f'{n}, %' for n in names)} |")
    print("|" + "---|" * (3 + len(names)))
    for transport in arguments.transports:
        experiment = Experiment(
            model=arguments.model,
            stages=arguments.stages,
            clients=arguments.clients,
            rounds=arguments.rounds,
            local_steps=arguments.steps,
            held_out_prompts=arguments.held_out_prompts,
            workers=1 if transport == "memory" else arguments.workers,
            transport=transport,
        )
        with tempfile.TemporaryDirectory() as place:
            record = emulate(experiment, Path(place) / "run")
        for stage in record.stages:
            print(line(record, stage), flush=True)


def line(record: RunRecord, stage: str) -> str:
    """Return a stage's line of the table."""
    rounds = [done.observed for done in record.rounds if done.stage == stage]
    wall = sum(one.wall_seconds for one in rounds)
    spent: Counter[str] = Counter()
    for one in rounds:
        for name, seconds in one.spent_seconds.items():
            spent[name] += seconds  # type: ignore[assignment]
    whole = record.workers * wall
    # the aggregator's own time is beside the workers', not a part of it
    spent[LEFT] = whole - sum(spent[name] for name in (*WORK, "codec", "disk"))  # type: ignore[assignment]
    beside = 1 - sum(spent[name] for name in WORK) / whole
    cells = [f"{100 * spent[name] / whole:.1f}" for name in (*WORK, *REST, LEFT)]
    return (
        f"| {record.transport} | {stage} | {wall:.1f} | {' | '.join(cells)} | {100 * beside:.1f} |"
    )


if __name__ == "__main__":
    main()
