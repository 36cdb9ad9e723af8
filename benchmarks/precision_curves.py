"""What a quantised base costs in learning: held-out loss while one client trains on it.

    python benchmarks/precision_curves.py --data rows.jsonl --model FOLDER

36 adapters and 36 LoRA modules are trained by the trainer of a run on bases of several precisions,
from the same modules, on the same batches, for several seeds; a seed draws modules, training rows
and batches, and the held-out rows are the same for all. Prints Markdown: held-out loss at the end
with its distance to fp32 and whether that is within the bounds (1 % int8, 3 % nf4), and the curve.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
from dataclasses import dataclass
from functools import cache
from typing import Any

#: Distance of the last held-out loss to that of fp32 at most, as a share of it.
BOUNDS = {"bf16": 0.01, "int8": 0.01, "int8-dynamic": 0.01, "nf4": 0.03}
REFERENCE = "fp32"
MODULES, ADAPTER_SIZE, PLACEMENT = 36, 10, "qkv"


@dataclass(frozen=True, kw_only=True)
class Task:
    """One training: a base's precision and a seed, and what all have in common."""

    precision: str
    seed: int
    data: str
    model: str
    rows: int
    held_out: int
    max_length: int
    steps: int
    every: int
    batch_size: int
    learning_rate: float


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Held-out loss (nats a token) and accuracy before the first step and after every k."""

    losses: tuple[float, ...]
    accuracies: tuple[float, ...]
    backend: str


@cache
def rows_of(data: str, model: str, max_length: int) -> tuple[list[Any], Any]:
    """Return the rows of a file in a drawn order, and what encodes one."""
    from device_profiles.seeds import stream
    from edge_client.data.instructions import load_instructions
    from edge_client.data.prompts import encode_example
    from quantization.base_model import load_tokenizer
    from quantization.identity import identify

    tokenizer = load_tokenizer(identify(model))
    tokenizer.model_max_length = sys.maxsize  # examples are cut where they are encoded
    examples = load_instructions(data).examples
    order = stream(0, "precision curves", "held out").permutation(len(examples))
    return [examples[i] for i in order], lambda row: encode_example(row, tokenizer, max_length)


def examples_of(task: Task) -> tuple[list[Any], list[Any]]:
    """Return a seed's training examples and everybody's held-out ones, encoded."""
    from device_profiles.seeds import stream

    rows, encode = rows_of(task.data, task.model, task.max_length)
    held_out, others = rows[: task.held_out], rows[task.held_out :]
    if len(others) < task.rows:
        sys.exit(f"{task.data} has {len(rows)} rows; give fewer than {task.rows} to --rows")
    mine = stream(task.seed, "precision curves", "rows").permutation(len(others))[: task.rows]
    return [encode(others[i]) for i in mine], [encode(row) for row in held_out]


def curve(task: Task) -> Curve:
    """Train on a base of one precision, and measure every k steps."""
    import torch

    from device_profiles.modules import initial_adapters, initial_lora, lora_rank, lora_sites
    from edge_client.peft.packed_model import PackedModel
    from edge_client.state import ClientState
    from edge_client.trainer import evaluate, train
    from quantization.frozen_gpt2 import load_frozen
    from quantization.identity import identify
    from quantization.precision import choose

    torch.set_num_threads(1)
    identity = identify(task.model)
    shape, (rank, _) = identity.shape, lora_rank(identity.shape, None)
    model = PackedModel(
        load_frozen(identity, task.precision),
        adapter_size=ADAPTER_SIZE,
        placement=PLACEMENT,
        lora_count=MODULES,
        lora_rank=rank,
    )
    sites = lora_sites(shape, PLACEMENT)[:MODULES]
    model.put(initial_adapters(shape, ADAPTER_SIZE, task.seed))
    model.put(initial_lora(sites, rank, task.seed))
    train_on, held_out = examples_of(task)
    found = [evaluate(model, held_out)]
    state = ClientState(round=0, personal={})
    for part in range(task.steps // task.every):
        done = train(
            model,
            state,
            train_on,
            steps=task.every,
            batch_size=task.batch_size,
            learning_rate=task.learning_rate,
            seed=task.seed,
            words=("precision curves", part),
        )
        state = ClientState(
            round=part + 1,
            personal={},
            first_moments=done.first_moments,
            second_moments=done.second_moments,
            steps=done.steps,
        )
        found.append(evaluate(model, held_out))
    name = f"{task.precision}, seed {task.seed}"
    print(f"{name}: {found[0].loss:.4f} to {found[-1].loss:.4f} nats", file=sys.stderr, flush=True)
    return Curve(
        losses=tuple(each.loss for each in found),
        accuracies=tuple(each.accuracy for each in found),
        backend=choose(task.precision).name,
    )


def distance(loss: float, reference: float) -> float:
    """Return how far a loss is from the reference's, as a share of that; below 0 if it is lower."""
    return loss / reference - 1


def ends(curves: dict[tuple[str, int], Curve]) -> list[str]:
    """Return the table of the last held-out losses, a line each."""
    lines = [
        "| precision | kernels of | seed | loss before, nats | after, nats | from fp32 "
        "| bound | holds | accuracy after |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (precision, seed), found in curves.items():
        away, bound = distance(found.losses[-1], curves[REFERENCE, seed].losses[-1]), "-"
        holds = "-"
        if precision in BOUNDS:
            bound = f"{BOUNDS[precision]:.0%}"
            holds = "yes" if abs(away) <= BOUNDS[precision] else "no"
        lines.append(
            f"| {precision} | {found.backend} | {seed} | {found.losses[0]:.4f} "
            f"| {found.losses[-1]:.4f} | {100 * away:+.3f} % | {bound} | {holds} "
            f"| {100 * found.accuracies[-1]:.2f} % |"
        )
    return lines


def course(curves: dict[tuple[str, int], Curve], every: int) -> list[str]:
    """Return the table of the loss over the steps: means over the seeds, a line each."""
    precisions = list(dict.fromkeys(precision for precision, _ in curves))
    lines = [f"| steps | {' | '.join(precisions)} |", "|---" * (len(precisions) + 1) + "|"]
    for place in range(len(next(iter(curves.values())).losses)):
        means = [
            statistics.mean(c.losses[place] for (name, _), c in curves.items() if name == precision)
            for precision in precisions
        ]
        lines.append(f"| {every * place} | {' | '.join(f'{mean:.4f}' for mean in means)} |")
    return lines


def main() -> None:
    """Train every precision with every seed, and print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="kit", metavar="FILE", help="Alpaca rows (the kit)")
    parser.add_argument("--model", default="mini", metavar="FOLDER", help="the base (mini)")
    parser.add_argument("--precisions", nargs="+", default=["int8", "int8-dynamic", "nf4"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=400, help="the client's, to train on")
    parser.add_argument("--held-out", type=int, default=100, help="rows")
    parser.add_argument("--max-length", type=int, default=256, help="tokens of a row at most")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--every", type=int, default=25, help="steps between two measurements")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--workers", type=int, default=1, help="processes, one thread each")
    arguments = parser.parse_args()
    if arguments.every < 1 or arguments.steps < 1 or arguments.steps % arguments.every:
        parser.error("--steps must be a multiple of --every, and both 1 or more")
    common = {
        name: value
        for name, value in vars(arguments).items()
        if name not in {"precisions", "seeds", "workers"}
    }
    precisions = dict.fromkeys([REFERENCE, *arguments.precisions])
    keys = [(p, seed) for p in precisions for seed in range(arguments.seeds)]
    tasks = [Task(precision=p, seed=seed, **common) for p, seed in keys]
    if arguments.workers == 1:
        found = [curve(task) for task in tasks]
    else:
        with multiprocessing.get_context("spawn").Pool(arguments.workers) as pool:
            found = pool.map(curve, tasks, chunksize=1)
    curves = dict(zip(keys, found, strict=True))
    print(
        f"{arguments.steps} steps of batch {arguments.batch_size}, learning rate "
        f"{arguments.learning_rate:g}; {arguments.rows} rows to train on, {arguments.held_out} "
        f"held out, at most {arguments.max_length} tokens each.\n"
    )
    print("\n".join(ends(curves)))
    print("\nHeld-out loss in nats, mean over the seeds:\n")
    print("\n".join(course(curves, arguments.every)))


if __name__ == "__main__":
    main()
