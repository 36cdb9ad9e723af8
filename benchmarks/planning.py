"""What the planner predicts against what this machine measures: memory and time of training.

    python benchmarks/planning.py                   # both shapes; about 25 minutes on a quiet core
    python benchmarks/planning.py --shapes mini --memory

Each line of cases varies one thing at 12, 24 and 36 LoRA modules (placement `wide`, rank in
proportion to the width). Memory: a fresh process a case, the high-water mark of its resident memory
during two optimiser steps that go on from a state; once with an allocator that gives freed blocks
back at once, which is what the tensors take, and once as it is. Time: user time of a step on one
thread, in one process that goes through all cases several times and beside each step times a
product of fixed size, by which the step's time is divided: a machine whose clock drifts by a tenth
within minutes would else say more of itself than of twelve modules. What counts is the median of
the rounds. Prints Markdown: every total, every increment, and how many are within the bounds of
25 % and 35 %. The weights of the larger shape are random: they cost what trained ones cost.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import logging
import multiprocessing
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from device_profiles.step_memory import RUNTIME_BYTES, in_process, training_memory
from device_profiles.step_model import Pass, StepShape
from device_profiles.step_time import Machine, step_seconds

MMAP_THRESHOLD = -3  # of mallopt, glibc
COUNTS = (12, 24, 36)
TOTAL, INCREMENT = 0.25, 0.35
HOW = {"tight": "freed blocks given back at once", "plain": "glibc as it is, with its holes"}


@dataclass(frozen=True, kw_only=True)
class Case:
    """LoRA modules, examples, tokens of each, precision, and whether blocks go twice."""

    count: int = 24
    batch: int = 2
    tokens: int = 128
    precision: str = "fp32"
    checkpoint: bool = False

    @property
    def pass_(self) -> Pass:
        return Pass(examples=self.batch, tokens=self.tokens, response=self.tokens // 4)

    def __str__(self) -> str:
        again = ", blocks twice" if self.checkpoint else ""
        return f"{self.count} x {self.batch} x {self.tokens} {self.precision}{again}"


CENTRE = Case()
LINES: dict[str, list[Case]] = {
    "batch": [replace(CENTRE, batch=n) for n in (1, 2, 4)],
    "length": [replace(CENTRE, tokens=n) for n in (64, 128, 256)],
    "precision": [replace(CENTRE, precision=p) for p in ("fp32", "int8", "nf4")],
    "checkpoint": [replace(CENTRE, checkpoint=c) for c in (False, True)],
}
PLACES = list(dict.fromkeys(case for line in LINES.values() for case in line))


def cases() -> list[Case]:
    """Return every place at every count of modules."""
    return [replace(place, count=n) for place in PLACES for n in COUNTS]


def increments() -> Iterator[tuple[str, Case, Case]]:
    """Yield what an increment is over, and the cases that it is from and to."""
    for place in PLACES:
        for n, more in pairwise(COUNTS):
            yield "modules", replace(place, count=n), replace(place, count=more)
        fewest, most = replace(place, count=COUNTS[0]), replace(place, count=COUNTS[-1])
        yield "modules, 12 to 36", fewest, most
    for name, line in LINES.items():
        from_fp32 = name == "precision"  # the way from int8 to nf4 is a difference of differences
        for one, other in ((line[0], at) for at in line[1:]) if from_fp32 else pairwise(line):
            for n in COUNTS:
                yield name, replace(one, count=n), replace(other, count=n)


# -- in a process of its own -----------------------------------------------------------------------


def shape_of(base: Any) -> StepShape:
    """Return a base's shape with the modules that are measured."""
    identity = base.identity
    return StepShape(
        base=identity.shape,
        heads=base.weights.heads,
        vocabulary=identity.vocabulary,
        positions=identity.positions,
        adapter_size=10,
        placement="wide",
        lora_rank=identity.shape.width // 8,
    )


def prepare(checkpoint: str, precision: str) -> Any:
    """Return a base on one thread, held by torch alone."""
    import torch

    from quantization.frozen_gpt2 import load_frozen
    from quantization.identity import identify

    torch.set_num_threads(1)
    return load_frozen(identify(checkpoint), precision, backend="torch")


def model_of(base: Any, shape: StepShape, count: int) -> Any:
    """Return a base with so many modules on it."""
    from edge_client.peft.packed_model import PackedModel

    return PackedModel(
        base,
        adapter_size=shape.adapter_size,
        placement=shape.placement,
        lora_count=count,
        lora_rank=shape.lora_rank,
    )


def steps(model: Any, state: Any, case: Case, count: int) -> Any:
    """Take so many optimiser steps of a case."""
    from edge_client.random_base import random_examples
    from edge_client.trainer import train

    return train(
        model,
        state,
        random_examples(case.pass_, model.base.identity.vocabulary),
        steps=count,
        batch_size=case.batch,
        learning_rate=1e-6,
        seed=0,
        words=("benchmark",),
        checkpoint=case.checkpoint,
    )


def child_memory(checkpoint: str, cases: list[Case]) -> list[dict[str, Any]]:
    """Return what every case takes, each twice in a process that is forked for it."""
    import torch

    import edge_client.service  # what a device imports

    torch.set_num_threads(1)
    assert edge_client.service.take_part
    fork = multiprocessing.get_context("fork")
    found = []
    for case in cases:
        row: dict[str, Any] = {}
        for name, holes in (("tight", False), ("plain", True)):
            with fork.Pool(1) as pool:
                row |= {name: pool.apply(memory_of, (checkpoint, case, holes))}
        found.append(row)
        words = ", ".join(f"{name} {each['bytes'] / 1e6:.1f} MB" for name, each in row.items())
        print(f"{case}: {words}", file=sys.stderr, flush=True)
    return found


def memory_of(checkpoint: str, case: Case, holes: bool) -> dict[str, Any]:
    """Return the high-water mark of two steps, and the memory before anything was loaded.

    Without ``holes`` the allocator gives every large block back at once.
    """
    from edge_client.state import ClientState

    logging.disable(logging.WARNING)  # the kit's tokenizer is used: it is not looked at
    if not holes:
        assert ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, 65_536)
    runtime = status("VmRSS")
    base = prepare(checkpoint, case.precision)
    model = model_of(base, shape_of(base), case.count)
    before = [{name: values + 1e-8 for name, values in model.take().items()} for _ in range(3)]
    state = ClientState(
        round=1, personal=before[0], first_moments=before[1], second_moments=before[2], steps=1
    )
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    steps(model, state, case, 2)
    return {"bytes": status("VmHWM"), "runtime": runtime, "shape": asdict(shape_of(base))}


def child_time(checkpoint: str, cases: list[Case], repeats: int) -> dict[str, Any]:
    """Return the user seconds of a step, case by case, in each round; and the yardstick's."""
    from edge_client.state import ClientState

    models = {}
    for precision in dict.fromkeys(case.precision for case in cases):
        base = prepare(checkpoint, precision)
        models[precision] = model_of(base, shape_of(base), max(COUNTS))
    state, yard = ClientState(round=0, personal={}), yardstick()
    rounds: list[list[tuple[float, float]]] = []
    for number in range(repeats + 1):
        rounds.append([])
        for case in cases:
            model = models[case.precision]
            model.activate(case.count)
            before, began = yard(), user_seconds()
            steps(model, state, case, 1)
            rounds[-1].append((user_seconds() - began, (before + yard()) / 2))
        took = sum(seconds for seconds, _ in rounds[-1])
        print(f"round {number} of {repeats}: {took:.1f} s", file=sys.stderr, flush=True)
    return {"rounds": rounds[1:], "shape": asdict(shape_of(base))}  # the first warms up


def yardstick() -> Callable[[], float]:
    """Return what tells the user seconds of a product of fixed size, about 0.1 s."""
    import torch

    a, b = torch.ones(1024, 768), torch.ones(768, 2304)
    out = torch.empty(1024, 2304)

    def measure() -> float:
        began = user_seconds()
        for _ in range(3):
            torch.mm(a, b, out=out)
        return user_seconds() - began

    return measure


def child_machine() -> dict[str, Any]:
    """Return this machine's rates, by user time on one thread."""
    import torch

    from edge_client.measure import copy_bandwidth, gemm_flops

    torch.set_num_threads(1)
    return {
        "flops": gemm_flops("cpu", 3.0, clock=user_seconds),
        "bandwidth": copy_bandwidth("cpu", 1.0, clock=user_seconds),
    }


def user_seconds() -> float:
    """Return the user time of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_utime


def status(key: str) -> int:
    """Return a figure of this process's status, bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return 1024 * int(line.split()[1])
    raise KeyError(key)


# -- the table -------------------------------------------------------------------------------------


def child(work: str, **arguments: Any) -> Any:
    """Return what a process of its own finds."""
    done = subprocess.run(
        [sys.executable, __file__, "--child", json.dumps({"work": work, **arguments})],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def make_gpt2_small(folder: Path) -> str:
    """Write a GPT-2 small with random weights; return its folder."""
    make = (
        "import sys, torch, transformers as t; torch.manual_seed(0); "
        "t.GPT2LMHeadModel(t.GPT2Config()).save_pretrained(sys.argv[1])"
    )
    subprocess.run([sys.executable, "-c", make, str(folder)], check=True)
    return str(folder)


def as_shape(values: dict[str, Any]) -> StepShape:
    """Return a shape that another process sent."""
    from device_profiles.modules import BaseShape

    return StepShape(**{**values, "base": BaseShape(**values["base"])})


def compare(
    what: str, unit: float, measured: dict[Case, float], predicted: dict[Case, float]
) -> None:
    """Print totals and increments, each with predicted over measured."""
    print(f"\n### {what}: totals\n\n| case | measured | predicted | ratio |\n|---|---|---|---|")
    ratios = []
    for case, found in measured.items():
        ratios.append(predicted[case] / found)
        print(f"| {case} | {found / unit:.3f} | {predicted[case] / unit:.3f} | {ratios[-1]:.2f} |")
    within(f"{what}, totals", ratios, TOTAL)
    print(f"\n### {what}: increments\n\n| over | from | to | measured | predicted | ratio |")
    print("|---|---|---|---|---|---|")
    by_line: dict[str, list[float]] = {}
    for name, one, other in increments():
        real = measured[other] - measured[one]
        said = predicted[other] - predicted[one]
        by_line.setdefault(name, []).append(said / real if real else float("inf"))
        print(
            f"| {name} | {one} | {other} | {real / unit:.3f} | {said / unit:.3f} "
            f"| {by_line[name][-1]:.2f} |"
        )
    for name, ratios in by_line.items():
        within(f"{what}, increments over {name}", ratios, INCREMENT)


def within(what: str, ratios: list[float], bound: float) -> None:
    """Print how many ratios are within a bound."""
    good = sum(abs(ratio - 1) <= bound for ratio in ratios)
    print(
        f"\n{what}: {good} of {len(ratios)} within {bound:.0%} "
        f"({min(ratios):.2f} to {max(ratios):.2f})."
    )


def measure_memory(name: str, checkpoint: str) -> None:
    """Print the memory of every case, predicted and measured."""
    wanted = cases()
    rows = child("memory", checkpoint=checkpoint, cases=[asdict(case) for case in wanted])
    runtimes = [row[how]["runtime"] / 1e6 for row in rows for how in ("tight", "plain")]
    print(
        f"\nInterpreter and libraries alone: {min(runtimes):.0f} to {max(runtimes):.0f} MB; "
        f"predicted with {RUNTIME_BYTES / 1e6:.0f} MB."
    )
    predicted = {}
    for case, row in zip(wanted, rows, strict=True):
        memory = training_memory(
            as_shape(row["plain"]["shape"]),
            case.count,
            case.pass_,
            precision=case.precision,
            checkpoint=case.checkpoint,
        )
        predicted[case] = in_process(memory)
    for how, words in HOW.items():
        measured = {case: row[how]["bytes"] for case, row in zip(wanted, rows, strict=True)}
        said = {
            case: float(memory.total - (memory.holes if how == "tight" else 0))
            for case, memory in predicted.items()
        }
        compare(f"{name}, memory (MB), {words}", 1e6, measured, said)


def measure_time(name: str, checkpoint: str, machine: Machine, repeats: int) -> None:
    """Print the time of every case, predicted and measured."""
    wanted = cases()
    found = child(
        "time", checkpoint=checkpoint, cases=[asdict(case) for case in wanted], repeats=repeats
    )
    usual = median(yard for row in found["rounds"] for _, yard in row)
    measured = {
        case: median(row[i][0] * usual / row[i][1] for row in found["rounds"])
        for i, case in enumerate(wanted)
    }
    predicted = {
        case: step_seconds(
            as_shape(found["shape"]),
            case.count,
            case.pass_,
            machine,
            precision=case.precision,
            checkpoint=case.checkpoint,
        ).total
        for case in wanted
    }
    compare(f"{name}, time (s)", 1.0, measured, predicted)


def main() -> None:
    """Measure every case, and print predicted against measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=["gpt2-small", "mini"])
    parser.add_argument("--memory", action="store_true", help="memory alone")
    parser.add_argument("--time", action="store_true", help="time alone")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        given = json.loads(arguments.child)
        work = {"memory": child_memory, "time": child_time, "machine": child_machine}
        function: Any = work[given.pop("work")]
        if "cases" in given:
            given["cases"] = [Case(**case) for case in given["cases"]]
        print(json.dumps(function(**given)))
        return
    both = arguments.memory == arguments.time
    with tempfile.TemporaryDirectory() as folder:
        machine = None
        if both or arguments.time:
            machine = Machine(**child("machine"))
            print(
                f"Large products {machine.flops / 1e9:.0f} GFLOP/s, copy "
                f"{machine.bandwidth / 1e9:.1f} GB/s, on one thread."
            )
        for name in arguments.shapes:
            checkpoint = make_gpt2_small(Path(folder) / name) if name == "gpt2-small" else name
            if both or arguments.memory:
                measure_memory(name, checkpoint)
            if machine is not None:
                measure_time(name, checkpoint, machine, arguments.repeats)


if __name__ == "__main__":
    main()
