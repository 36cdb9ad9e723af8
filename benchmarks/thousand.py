"""What a thousand emulated clients cost on one machine, against ten: memory, and time a turn.

    python benchmarks/thousand.py
    python benchmarks/thousand.py --clients 10 100 1000 --transports mqtt --cohort 100

A turn is one client's part of one round: a local step where it is asked, and an evaluation. Every
fleet does the same work a turn (same model, batch, rows a client, one kind of device), and the
small ones do more rounds, so that each line has about as many turns. Time a turn is that of the
rounds, start-up apart: on the wall, and of the processors, which another load of the machine moves
less. Memory is the largest sum of proportional set sizes of the process tree
(aggregator, broker, workers), sampled. Every sample is a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent))

from fleets.machine import cpu, ours, watch
from fleets.rows import write_rows

ROWS = 5  # a client: four to learn from, one held out


def main() -> None:
    """Run each fleet in a process of its own, and print a Markdown table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--clients", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--transports", nargs="+", default=["mqtt", "memory"])
    parser.add_argument("--turns", type=int, default=1000, help="of each line, about")
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--cohort", type=int, help="train in a round (all)")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        experiment, out = arguments.child
        child(json.loads(experiment), Path(out))
        return
    print(f"{cpu()}, {os.cpu_count()} cores; {ours()}.\n")
    print("| transport | clients | rounds | start-up, s | a turn, ms | of the first | "
          "a turn, CPU ms | of the first | MB | of the first |")  # fmt: skip
    print("|" + "---|" * 10)
    for transport in arguments.transports:
        first: dict[str, float] | None = None
        for clients in arguments.clients:
            found = measure(transport, clients, arguments)
            first = first or found
            print(
                f"| {transport} | {clients} | {found['rounds']:.0f} | {found['start']:.1f} | "
                f"{1000 * found['turn']:.1f} | {found['turn'] / first['turn']:.2f} | "
                f"{1000 * found['cpu']:.1f} | {found['cpu'] / first['cpu']:.2f} | "
                f"{found['bytes'] / 1e6:,.0f} | {found['bytes'] / first['bytes']:.2f} |",
                flush=True,
            )


def measure(transport: str, clients: int, arguments: argparse.Namespace) -> dict[str, float]:
    """Run one fleet; return seconds and bytes."""
    rounds = max(1, round(arguments.turns / clients))
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        experiment = {
            "clients": clients,
            "rounds": rounds,
            "local_steps": arguments.steps,
            "batch_size": 2,
            "max_length": 64,
            "fleet": one_kind(folder),
            "data": write_rows(folder, ROWS * clients),
            "partition": "iid",
            "transport": transport,
        }
        if arguments.cohort and arguments.cohort < clients:
            experiment["cohort"] = arguments.cohort
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__, "--child", json.dumps(experiment), str(folder / "run")]
        began = time.time()
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=environment
            )
            peak = watch(process)
        if process.returncode:
            raise SystemExit(f"{clients} clients failed:\n{(folder / 'log').read_text()[-3000:]}")
        times, seconds = json.loads((folder / "run" / "times.json").read_text())
        turns = clients * (len(times) - 1)
        return {
            "rounds": rounds,
            "start": times[0] - began,
            "turn": (times[-1] - times[0]) / turns,
            "cpu": (seconds[-1] - seconds[0]) / turns,
            "bytes": peak,
        }


def one_kind(folder: Path) -> str:
    """Write a fleet of one kind of device, so that every client trains as many modules."""
    path = folder / "fleet.toml"
    member = '[[member]]\nprofile = "jetson-orin-nano-8gb"\nshare = 1.0\n'
    path.write_text(f'title = "Alike"\n\n{member}')
    return str(path)


def child(experiment: dict[str, Any], out: Path) -> None:
    """Run one fleet in this process, and leave when its rounds ended in ``out``."""
    from cloud_aggregator.emulation.emulate import emulate
    from cloud_aggregator.experiment import Experiment

    times: list[float] = []
    seconds: list[float] = []

    def notify(event: str, **_fields: Any) -> None:
        if event in {"before", "round"}:
            times.append(time.time())
            tree = [psutil.Process(), *psutil.Process().children(recursive=True)]
            seconds.append(sum(sum(one.cpu_times()[:2]) for one in tree))

    emulate(Experiment(**experiment), out, notify=notify)
    (out / "times.json").write_text(json.dumps([times, seconds]))
    shutil.rmtree(out / "clients")


if __name__ == "__main__":
    main()
