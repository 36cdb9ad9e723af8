"""What averaging adapters is worth: PWFF against training alone on each device, several seeds.

    python benchmarks/learning.py --data FILE --model mini --seeds 3 --out runs/learning
    python benchmarks/learning.py --codec int8 int4    # what smaller uploads cost PWFF, instead

Prints a Markdown table: held-out accuracy and loss before and after, the worst client, what was
sent, and the difference within each seed between the two methods, or between each codec and fp32.
A run that is already in --out is not done again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Variant:
    """What differs between the runs of a seed."""

    name: str
    method: str
    codec: str = "fp32"


METHODS = [Variant("pwff", "pwff"), Variant("local-only", "local-only")]


def codecs(names: list[str]) -> list[Variant]:
    """Return a variant of PWFF for each codec, and fp32 as the last: all others are held to it."""
    lossy = [name for name in dict.fromkeys(names) if name != "fp32"]
    return [Variant(f"{name} uploads", "pwff", name) for name in [*lossy, "fp32"]]


def run(variant: Variant, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Do one run, or read it where it is done, and return its record."""
    method, codec = variant.method, variant.codec
    out = arguments.out / "-".join([method, *[codec] * (codec != "fp32"), str(seed)])
    if not (out / "run.json").exists():
        subprocess.run(
            [
                sys.executable, "-m", "pwff", "emulate", "--method", method, "--seed", str(seed),
                "--data", arguments.data, "--model", arguments.model, "--out", str(out),
                "--clients", "10", "--partition", arguments.partition,
                "--rounds", str(arguments.rounds), "--local-steps", str(arguments.local_steps),
                "--codec", codec,
            ],
            check=True,
        )  # fmt: skip
    record: dict[str, Any] = json.loads((out / "run.json").read_text())
    if record["status"] != "done":
        sys.exit(f"{out} is {record['status']}; remove it, or finish it with pwff emulate --resume")
    found = (record["codec"], len(record["rounds"]), record["seed"])
    if found != (codec, arguments.rounds, seed):
        sys.exit(f"{out} holds another run (codec, rounds, seed: {found}); give another --out")
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


def paired(
    variant: Variant, reference: Variant, summaries: list[dict[Variant, dict[str, Any]]]
) -> str:
    """Return a variant's differences from the reference, seed by seed, in a sentence."""

    def away(field: str) -> list[float]:
        return [of[variant][field] - of[reference][field] for of in summaries]

    accuracy = [100 * difference for difference in away("eval_accuracy_after")]
    worst = [100 * difference for difference in away("worst_client_accuracy")]
    loss = away("eval_loss_after")
    return (
        f"After training, `{variant.name}` minus `{reference.name}`: accuracy "
        f"{statistics.mean(accuracy):+.2f} points (each seed: "
        f"{', '.join(f'{d:+.2f}' for d in accuracy)}), of the worst client "
        f"{statistics.mean(worst):+.2f} ({', '.join(f'{d:+.2f}' for d in worst)}), loss "
        f"{statistics.mean(loss):+.4f} nats ({', '.join(f'{d:+.4f}' for d in loss)})"
    )


def main() -> None:
    """Run every variant of every seed and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="kit")
    parser.add_argument("--model", default="mini")
    parser.add_argument("--partition", default="cluster")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--local-steps", type=int, default=20)
    parser.add_argument(
        "--codec", nargs="+", metavar="NAME", choices=("fp32", "fp16", "int8", "int4"),
        help="hold PWFF's uploads in these against fp32, instead of PWFF against local-only",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("runs/learning"))
    arguments = parser.parse_args()
    variants = codecs(arguments.codec) if arguments.codec else METHODS
    lines, summaries = [], []
    for seed in range(arguments.seeds):
        records = {variant: run(variant, seed, arguments) for variant in variants}
        lines += [row(f"{variant.name}, seed {seed}", r) for variant, r in records.items()]
        summaries.append({variant: r["summary"] for variant, r in records.items()})
    print("| run | accuracy before, % | after, % | loss before, nats | after, nats "
          "| worst client, % | clients improved | sent, MB |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|")
    print("\n".join(lines))
    *others, reference = variants
    for variant in others:
        print(f"\n{paired(variant, reference, summaries)}")


if __name__ == "__main__":
    main()
