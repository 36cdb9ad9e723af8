"""What averaging adapters is worth: PWFF against training alone on each device, several seeds.

    python benchmarks/learning.py --data FILE --model mini --seeds 3 --out runs/learning

Prints a Markdown table: held-out accuracy and loss before and after, the worst client, and the
paired difference between the two methods. A run that is already in --out is not done again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

METHODS = ("pwff", "local-only")


def run(method: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Do one run, or read it where it is done, and return its record."""
    out = arguments.out / f"{method}-{seed}"
    if not (out / "run.json").exists():
        subprocess.run(
            [
                sys.executable, "-m", "pwff", "emulate", "--method", method, "--seed", str(seed),
                "--data", arguments.data, "--model", arguments.model, "--out", str(out),
                "--clients", "10", "--partition", arguments.partition,
                "--rounds", str(arguments.rounds), "--local-steps", str(arguments.local_steps),
            ],
            check=True,
        )  # fmt: skip
    record: dict[str, Any] = json.loads((out / "run.json").read_text())
    if record["status"] != "done":
        sys.exit(f"{out} is {record['status']}; remove it, or finish it with pwff emulate --resume")
    return record


def row(name: str, record: dict[str, Any]) -> str:
    """Return one line of the table."""
    s = record["summary"]
    return (
        f"| {name} | {100 * s['eval_accuracy_before']:.2f} | {100 * s['eval_accuracy_after']:.2f} "
        f"| {s['eval_loss_before']:.4f} | {s['eval_loss_after']:.4f} "
        f"| {100 * s['worst_client_accuracy']:.2f} | {s['clients_improved']} of "
        f"{len(record['clients'])} | {s['upload_bytes_total'] / 1e6:.1f} |"
    )


def main() -> None:
    """Run every pair and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="kit")
    parser.add_argument("--model", default="mini")
    parser.add_argument("--partition", default="cluster")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--local-steps", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("runs/learning"))
    arguments = parser.parse_args()
    lines, differences, losses = [], [], []
    for seed in range(arguments.seeds):
        pair = {method: run(method, seed, arguments) for method in METHODS}
        lines += [row(f"{method}, seed {seed}", pair[method]) for method in METHODS]
        ours, alone = (pair[method]["summary"] for method in METHODS)
        differences.append(100 * (ours["eval_accuracy_after"] - alone["eval_accuracy_after"]))
        losses.append(ours["eval_loss_after"] - alone["eval_loss_after"])
    print("| run | accuracy before, % | after, % | loss before, nats | after, nats "
          "| worst client, % | clients improved | sent, MB |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|")
    print("\n".join(lines))
    points = ", ".join(f"{d:+.2f}" for d in differences)
    nats = ", ".join(f"{d:+.4f}" for d in losses)
    print(
        "\nAfter training, `pwff` minus `local-only`: accuracy "
        f"{statistics.mean(differences):+.2f} points (each seed: {points}), "
        f"loss {statistics.mean(losses):+.4f} nats (each seed: {nats})"
    )


if __name__ == "__main__":
    main()
