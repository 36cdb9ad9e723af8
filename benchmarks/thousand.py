"""What a thousand emulated clients cost on one machine, against ten: memory, and time a turn.

    python benchmarks/thousand.py
    python benchmarks/thousand.py --clients 10 100 1000 --transports mqtt --cohort 100
    python benchmarks/thousand.py --interrupt --clients 1000

A turn is one client's part of one round: a local step where it is asked, and an evaluation. Every
fleet does the same work a turn (same model, batch, rows a client, one kind of device), and the
small ones do more rounds, so that each line has about as many turns. Time a turn is that of the
rounds, start-up apart: on the wall, and of the processors, which another load of the machine moves
less. Memory is the largest sum of proportional set sizes of the process tree
(aggregator, broker, workers), sampled. Every sample is a process of its own.

With ``--interrupt`` each fleet does two rounds twice: undisturbed, and stopped in the middle of the
second one's updates, then resumed by another process; the global states are compared bit by bit.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
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
    parser.add_argument("--interrupt", action="store_true", help="and resume; compare the bits")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        experiment, out = arguments.child
        child(json.loads(experiment), Path(out))
        return
    print(f"{cpu()}, {os.cpu_count()} cores; {ours()}.\n")
    if arguments.interrupt:
        for transport in arguments.transports:
            for clients in arguments.clients:
                interrupt(transport, clients, arguments)
        return
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


def interrupt(transport: str, clients: int, arguments: argparse.Namespace) -> None:
    """Run a fleet undisturbed, and stopped and resumed; compare what it came to."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        experiment = experiment_of(folder, transport, clients, 2, arguments)
        half = clients + clients // 2
        run(folder / "whole", experiment)
        run(folder / "broken", experiment | {"stop_after_updates": half})
        broken = json.loads((folder / "broken" / "run.json").read_text())
        assert (broken["status"], len(broken["rounds"])) == ("stopped", 1), "it was not broken off"
        run(folder / "broken", experiment | {"resume": True})
        states = [
            hashlib.sha256((folder / run / "global/2/shared.safetensors").read_bytes()).hexdigest()
            for run in ("whole", "broken")
        ]
        assert states[0] == states[1], f"{clients} clients over {transport}: other bits"
        print(
            f"{clients} clients over {transport}: stopped after {half} of {2 * clients} updates "
            f"and resumed, the same bits: {states[0][:16]}",
            flush=True,
        )


def measure(transport: str, clients: int, arguments: argparse.Namespace) -> dict[str, float]:
    """Run one fleet; return seconds and bytes."""
    rounds = max(1, round(arguments.turns / clients))
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        experiment = experiment_of(folder, transport, clients, rounds, arguments)
        began = time.time()
        peak = run(folder / "run", experiment)
        times, seconds = json.loads((folder / "run" / "times.json").read_text())
        turns = clients * (len(times) - 1)
        return {
            "rounds": rounds,
            "start": times[0] - began,
            "turn": (times[-1] - times[0]) / turns,
            "cpu": (seconds[-1] - seconds[0]) / turns,
            "bytes": peak,
        }


def experiment_of(
    folder: Path, transport: str, clients: int, rounds: int, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Return a fleet's experiment; its data and devices are written to ``folder``."""
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
    return experiment


def run(out: Path, experiment: dict[str, Any]) -> int:
    """Run a fleet in a process of its own; return the bytes it took at most."""
    command = [sys.executable, __file__, "--child", json.dumps(experiment), str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        peak = watch(process)
        if process.returncode:
            log.seek(0)
            raise SystemExit(f"{out.name} failed:\n{log.read().decode()[-3000:]}")
    return peak


def one_kind(folder: Path) -> str:
    """Write a fleet of one kind of device, so that every client trains as many modules."""
    path = folder / "fleet.toml"
    member = '[[member]]\nprofile = "jetson-orin-nano-8gb"\nshare = 1.0\n'
    path.write_text(f'title = "Alike"\n\n{member}')
    return str(path)


def child(experiment: dict[str, Any], out: Path) -> None:
    """Run one fleet in this process, and leave when its rounds ended in ``out``.

    ``stop_after_updates`` and ``resume`` among the keys are for the run, not of the experiment.
    """
    from cloud_aggregator.emulation.emulate import emulate
    from cloud_aggregator.experiment import Experiment
    from cloud_aggregator.server import Aggregator

    times: list[float] = []
    seconds: list[float] = []
    servers: list[Aggregator] = []
    most, resume = experiment.pop("stop_after_updates", None), experiment.pop("resume", False)
    updates = itertools.count(1)

    def notify(event: str, **_fields: Any) -> None:
        if event == "update" and next(updates) == most:
            servers[0].stop()
        if event in {"before", "round"}:
            times.append(time.time())
            tree = [psutil.Process(), *psutil.Process().children(recursive=True)]
            seconds.append(sum(sum(one.cpu_times()[:2]) for one in tree))

    emulate(Experiment(**experiment), out, resume=resume, notify=notify, on_start=servers.append)
    (out / "times.json").write_text(json.dumps([times, seconds]))
    if most is None:
        shutil.rmtree(out / "clients")


if __name__ == "__main__":
    main()
