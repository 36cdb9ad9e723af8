"""What holds overfitting back: few rows a client, many passes over them, one restraint at a time.

    python benchmarks/restraint.py
    python benchmarks/restraint.py --out folder

Every ninth row of the kit is divided among three clients, half of it held out: some twenty rows
each to learn from, gone through once a round. Each restraint is run for several seeds (they draw
clients, split, modules and batches) beside a run without any, and is compared seed by seed.
Prints Markdown; the records stay in the folder, and a run that is there is gone on with.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

#: Name to the settings that it adds.
RESTRAINTS: dict[str, dict[str, float]] = {
    "none": {},
    "proximal 0.1": {"proximal": 0.1},
    "LoRA dropout 0.3": {"lora_dropout": 0.3},
    "weight decay 1": {"weight_decay": 1.0},
    "early stopping": {"stopping_patience": 1, "validation_every": 4},
}

COMMON: dict[str, Any] = {
    "clients": 3,
    "local_steps": 10,
    "batch_size": 2,
    "learning_rate": 3e-3,
    "held_out_share": 0.5,
    "others_sample": 20,
    "max_length": 128,
    "partition": "category",
    "precision": "fp32",
    "transport": "memory",
}

#: Column to the figure of a record that it has, and how it is scaled.
COLUMNS = (
    "train loss",
    "own loss",
    "others' loss",
    "own, %",
    "others', %",
    "gap, points",
    "worst, %",
)


def rows_of_kit(folder: Path) -> Path:
    """Write every ninth row of the kit, without its own split; return the file."""
    from edge_client.data.instructions import load_instructions

    chosen = load_instructions("kit").examples[::9]
    path = folder / "rows.jsonl"
    keys = ("instruction", "input", "output", "category")
    rows = [json.dumps({key: getattr(row, key) for key in keys}) for row in chosen]
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


def figures(folder: Path, settings: dict[str, Any], rounds: int) -> list[float]:
    """Return a run's figures after a round; rounds that are not there yet are done first."""
    from cloud_aggregator import Experiment, emulate
    from cloud_aggregator.run_folder import RunFolder, read_record

    begun = RunFolder(folder).record_path.exists()
    if begun and len(read_record(folder).rounds) >= rounds:
        record = read_record(folder)
    else:
        record = emulate(Experiment(**settings, rounds=rounds), folder, resume=begun)
    last = record.rounds[rounds - 1]
    means = last.global_
    train = statistics.fmean(c.train_loss for c in last.clients if c.train_loss is not None)
    own, others = means.eval_accuracy or 0.0, means.others_accuracy or 0.0
    worst = min(c.eval_accuracy for c in last.clients if c.eval_accuracy is not None)
    losses = [train, means.eval_loss or 0.0, means.others_loss or 0.0]
    return losses + [100 * share for share in (own, others, own - others, worst)]


def table(found: dict[str, list[list[float]]]) -> list[str]:
    """Return means over the seeds, and below each its paired difference from no restraint."""
    lines = [f"| restraint | {' | '.join(COLUMNS)} |", f"|---|{'---:|' * len(COLUMNS)}"]
    plain = found["none"]
    for name, runs in found.items():
        means = [statistics.fmean(column) for column in zip(*runs, strict=True)]
        cells = [f"{mean:.3f}" if i < 3 else f"{mean:.1f}" for i, mean in enumerate(means)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
        if name == "none":
            continue
        pairs = [zip(run, free, strict=True) for run, free in zip(runs, plain, strict=True)]
        away = [[one - other for one, other in pair] for pair in pairs]
        spans = []
        for i, column in enumerate(zip(*away, strict=True)):
            digits = 3 if i < 3 else 1
            spans.append(f"{min(column):+.{digits}f} to {max(column):+.{digits}f}")
        lines.append(f"| its difference, least and most of the seeds | {' | '.join(spans)} |")
    return lines


def main() -> int:
    """Run what is not there yet and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs") / "restraint")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    data = str(rows_of_kit(chosen.out))
    found: dict[str, list[list[float]]] = {name: [] for name in RESTRAINTS}
    for seed in range(chosen.seeds):
        for name, settings in RESTRAINTS.items():
            folder = chosen.out / f"{name.replace(' ', '-')}-{seed}"
            given = {**COMMON, **settings, "data": data, "seed": seed}
            run = figures(folder, given, chosen.rounds)
            found[name].append(run)
            sys.stderr.write(f"seed {seed}, {name}: {run}\n")
    print("\n".join(table(found)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
