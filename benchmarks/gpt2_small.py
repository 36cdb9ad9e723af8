"""Cost on the true GPT-2-small shape: bytes, seconds and memory of one round of two clients.

    python benchmarks/gpt2_small.py

The weights are random: this says what a round costs, nothing of what it learns. Each codec runs in
processes of its own over the embedded broker.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ADAPTERS = 580_968


def main() -> None:
    """Make the checkpoint, run a round in each codec, and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--local-steps", type=int, default=4)
    parser.add_argument("--codecs", nargs="+", default=["fp32", "int8"])
    arguments = parser.parse_args()
    print("| codec | adapter parameters sent a client | bytes a client | of 4 bytes each "
          "| round, s here | peak memory of the process tree, MB |")  # fmt: skip
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "gpt2-small"
        make = (
            "import sys, torch, transformers as t; torch.manual_seed(0); "
            "t.GPT2LMHeadModel(t.GPT2Config()).save_pretrained(sys.argv[1])"
        )
        subprocess.run([sys.executable, "-c", make, str(checkpoint)], check=True)
        for codec in arguments.codecs:
            out = Path(folder) / codec
            subprocess.run(
                [
                    sys.executable, "-m", "pwff", "emulate", "--model", str(checkpoint),
                    "--clients", "2", "--rounds", "1", "--batch-size", "4", "--codec", codec,
                    "--local-steps", str(arguments.local_steps), "--out", str(out),
                ],
                check=True,
                stdout=subprocess.DEVNULL,
            )  # fmt: skip
            record = json.loads((out / "run.json").read_text())
            (round_,) = record["rounds"]
            client = round_["clients"][0]
            print(
                f"| {codec} | {client['upload_parameters']:,} | {client['upload_bytes']:,} "
                f"| {client['upload_bytes'] / (4 * ADAPTERS):.4f} "
                f"| {round_['observed']['wall_seconds']:.0f} "
                f"| {round_['observed']['peak_memory_bytes'] / 1e6:,.0f} |"
            )


if __name__ == "__main__":
    main()
