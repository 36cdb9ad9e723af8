"""A round of ten clients: this project's engine, Flower's simulation, and a plain loop.

    python -m venv flower
    flower/bin/pip install torch==2.13.0 "flwr[simulation]" -e ".[edge,broker]"
    python benchmarks/fleet.py --flower flower/bin/python
    python benchmarks/fleet.py --flower flower/bin/python --models gpt2-small --rounds 2

Every engine trains the same modules on the same batches, and after each round has every client
measure the average on its held-out examples: the adapters after the first round agree within 1e-4,
and the mean losses, or the run fails. `emulate` is this project as a user runs it (a broker and two
workers; it measures before the first round as well). Flower runs twice: as its
quickstart has it, with a padded step on transformers and peft and the model made in each call, and
with this project's step and a model that stays in Ray's workers, so that the engine is measured
apart from the step. The loop is transformers and peft on two threads. Every sample is a process of
its own, by turns; a first round counts from the process's start; memory is the largest sum of
proportional set sizes of the process tree, sampled.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))

from fleets.job import Job
from fleets.machine import cpu, ours, watch
from fleets.rows import write_rows

ENGINES = ("emulate", "flower, padded step", "flower, this project's step", "loop, padded step")
ROWS = 1_000  # of all clients; one in fifty is held out
TOLERANCE = 1e-4


def main() -> None:
    """Run the engines by turns, and print a Markdown table a model."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["mini", "gpt2-small"])
    parser.add_argument("--flower", default=sys.executable, help="interpreter that has flwr")
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        engine, job, out = arguments.child
        child(engine, Job(**json.loads(job)), Path(out))
        return
    compared = ours()
    if has_flower(arguments.flower):
        compared = versions(arguments.flower)
    else:
        print(f"{arguments.flower} has no flwr: Flower is left out.", file=sys.stderr)
        arguments.engines = [e for e in arguments.engines if not e.startswith("flower")]
    print(f"{cpu()}, {os.cpu_count()} cores; {compared}.")
    with tempfile.TemporaryDirectory() as folder:
        for model in arguments.models:
            place = model
            if model == "gpt2-small":
                place = str(Path(folder) / model)
                make = (
                    "import sys, torch, transformers as t; torch.manual_seed(0); "
                    "t.GPT2LMHeadModel(t.GPT2Config()).save_pretrained(sys.argv[1])"
                )
                subprocess.run([sys.executable, "-c", make, place], check=True)
            job = Job(
                place,
                arguments.clients,
                arguments.rounds,
                arguments.steps,
                arguments.batch,
                write_rows(Path(folder), ROWS),
            )
            compare(model, job, arguments)


def has_flower(python: str) -> bool:
    """Return whether an interpreter has Flower."""
    look = "import importlib.util as i, sys; sys.exit(i.find_spec('flwr') is None)"
    return subprocess.run([python, "-c", look], check=False).returncode == 0


def compare(model: str, job: Job, arguments: argparse.Namespace) -> None:
    """Measure one model and print its table."""
    found: dict[str, list[Sample]] = {engine: [] for engine in arguments.engines}
    for repeat in range(arguments.repeats):
        for engine in arguments.engines:
            sample = measure(engine, job, arguments.flower)
            found[engine].append(sample)
            reference = found[arguments.engines[0]][0].adapters
            worst = max(float(np.abs(sample.adapters[n] - t).max()) for n, t in reference.items())
            print(f"{model}, repeat {repeat + 1}, {engine}: first round {sample.first:.1f} s, "
                  f"steady {sample.steady:.2f} s, {sample.memory / 1e6:,.0f} MB, "
                  f"adapters differ by at most {worst:.1e}", file=sys.stderr)  # fmt: skip
            apart = abs(sample.loss - found[arguments.engines[0]][0].loss)
            if not (worst < TOLERANCE and apart < TOLERANCE):
                raise SystemExit(
                    f"{engine} did other work: its adapters differ by {worst:.1e}, its loss by "
                    f"{apart:.1e}"
                )
    print(
        f"\n{model}: {job.clients} clients, {job.steps} steps of batch {job.batch} a round, 36 LoRA"
        f" modules and 36 adapters each; median of {arguments.repeats} processes (least, most); "
        "'times' is of the first line.\n"
    )
    print("| engine | first round, s | times | steady round, s | times | MB | times |")
    print("|" + "---|" * 7)
    base = found[arguments.engines[0]]
    for engine, samples in found.items():
        cells = [engine]
        for name in ("first", "steady", "memory"):
            values = [getattr(s, name) for s in samples]
            ours = [getattr(s, name) for s in base]
            ratio = statistics.median(v / o for v, o in zip(values, ours, strict=True))
            scale, digits = (1e6, ",.0f") if name == "memory" else (1, ".2f")
            low, middle, high = (
                format(f(values) / scale, digits) for f in (min, statistics.median, max)
            )
            cells += [f"{middle} ({low}, {high})", f"{ratio:.2f}"]
        print(f"| {' | '.join(cells)} |")


class Sample:
    """What one process gave: seconds, bytes, and adapters and mean loss after its first round."""

    def __init__(
        self, began: float, times: list[float], *, adapters: Any, loss: float, memory: int
    ) -> None:
        self.first = times[0] - began
        later = [b - a for a, b in itertools.pairwise(times)]
        self.steady = statistics.median(later)
        self.adapters, self.loss = adapters, loss
        self.memory = memory


def measure(engine: str, job: Job, flower: str) -> Sample:
    """Run an engine in a process of its own."""
    from safetensors.numpy import load_file

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found"
        python = flower if engine.startswith("flower") else sys.executable
        paths = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
        if engine.startswith("loop"):
            environment["OMP_NUM_THREADS"] = "2"
        command = [python, __file__, "--child", engine, json.dumps(asdict(job)), str(out)]
        log = Path(folder) / "log"
        began = time.time()
        with log.open("wb") as file:
            process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, env=environment
            )
            peak = watch(process)
        if process.returncode:
            raise SystemExit(f"{engine} failed:\n{log.read_text()[-3000:]}")
        told = json.loads((out / "told.json").read_text())
        adapters = load_file(out / "adapters.safetensors")
        return Sample(began, told["times"], adapters=adapters, loss=told["loss"], memory=peak)


def child(engine: str, job: Job, out: Path) -> None:
    """Run an engine in this process and leave what it gave in ``out``."""
    from safetensors.numpy import save_file

    if engine == "emulate":
        from cloud_aggregator.emulation.nursery import prepare

        prepare([])  # as the command does before it imports anything else
        from fleets.loops import run_emulation

        times, adapters, loss = run_emulation(job)
    elif engine.startswith("flower"):
        from fleets import flower

        times, adapters, loss = flower.run("padded" if "padded" in engine else "own", job)
    else:
        from fleets.loops import run_loop

        times, adapters, loss = run_loop("padded", job)
    out.mkdir()
    save_file(
        {n: np.ascontiguousarray(t) for n, t in adapters.items()}, out / "adapters.safetensors"
    )
    (out / "told.json").write_text(json.dumps({"times": times, "loss": loss}))


def versions(flower: str) -> str:
    """Return the versions that are compared."""
    ask = (
        "from importlib.metadata import version as v; "
        "print(', '.join(f'{n} {v(n)}' for n in ('flwr', 'ray', 'torch', 'transformers', 'peft')))"
    )
    done = subprocess.run([flower, "-c", ask], check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(
            f"{flower} has no flwr[simulation]; make it one as this file's beginning says"
        )
    return f"Flower's environment: {done.stdout.strip()}; ours: {ours()}"


if __name__ == "__main__":
    main()
