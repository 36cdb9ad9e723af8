"""Speed and memory of a local training step, against the library's own on padded batches.

    python benchmarks/training.py
    python benchmarks/training.py --model mini --repeats 9
    python benchmarks/training.py --data alpaca_instructions.jsonl --precisions fp32 int8

The plain steps are transformers with peft's LoRA and hooked adapters: (a) padded to the length that
examples are cut to, with logits everywhere; (b) padded to the longest of the batch, with logits at
responses only. All steps go over the same batches, by turns; a step is forward, backward, clipping
and AdamW. Each peak of memory is of a process of its own that takes the same steps. GPT-2 small has
random weights here and the kit's tokenizer: this says what a step costs, nothing of what it learns.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BATCH, MAX_LENGTH, ADAPTER_SIZE = 4, 256, 10
LEARNING_RATE = 1e-5
SMALL = "gpt2-small"
FULL, PADDED = "plain (a)", "plain (b)"
REFERENCE_GEMM = (2048, 768, 2304)


@dataclass(frozen=True)
class Variant:
    """One way of taking a step; ``kind`` is (a), (b) or a precision of the packed form."""

    kind: str
    lora_count: int

    @property
    def words(self) -> str:
        return self.kind if self.kind in (FULL, PADDED) else f"packed, {self.kind}"


def main() -> None:
    """Take the steps by turns, and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=SMALL, help="gpt2-small, mini or a folder")
    parser.add_argument("--data", default="kit", help="kit or a file of instructions")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batches", type=int, default=2, help="a repeat goes over so many")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--lora", type=int, nargs="+", default=[12, 24, 36])
    parser.add_argument("--precisions", nargs="+", default=["fp32", "int8", "nf4"])
    parser.add_argument("--no-memory", action="store_true", help="leave the memory out")
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        kind, count = arguments.memory_of
        print(json.dumps(measure_memory(arguments, Variant(kind, int(count)))))
        return
    with tempfile.TemporaryDirectory() as folder:
        if arguments.model == SMALL:
            arguments.model = str(Path(folder) / SMALL)
            make = (
                "import sys, torch, transformers as t; torch.manual_seed(0); "
                "t.GPT2LMHeadModel(t.GPT2Config()).save_pretrained(sys.argv[1])"
            )
            subprocess.run([sys.executable, "-c", make, arguments.model], check=True)
        compare(arguments)


def compare(arguments: argparse.Namespace) -> None:
    """Measure every variant and print the table."""
    kinds = [FULL, PADDED, *usable(arguments.precisions)]
    variants = [Variant(kind, count) for count in arguments.lora for kind in kinds]
    bench = Bench(arguments)
    seconds: dict[Variant, list[float]] = {variant: [] for variant in variants}
    rates = []
    for variant in variants:
        bench.pass_over(variant)  # to warm up
    losses = {variant: bench.losses[variant] for variant in variants}
    for _ in range(arguments.repeats):
        rates.append(gemm_rate())
        for variant in variants:
            started = time.perf_counter()
            bench.pass_over(variant)
            seconds[variant].append((time.perf_counter() - started) / len(bench.batches))
    peaks = {v: 0 if arguments.no_memory else peak_elsewhere(arguments, v) for v in variants}
    rate = statistics.median(rates)
    tokens = bench.tokens / len(bench.batches)
    print(
        f"\n{Path(arguments.model).name}, {arguments.data}: batches of {BATCH} with {tokens:.0f} "
        f"tokens ({bench.rows / len(bench.batches):.0f} rows packed, "
        f"{bench.longest / len(bench.batches):.0f} padded as (b), {BATCH * MAX_LENGTH} as (a)), "
        f"{bench.responses / len(bench.batches):.0f} of responses; rank {bench.rank}, adapters of "
        f"{ADAPTER_SIZE}; {arguments.threads} threads; median of {arguments.repeats}.\n"
        f"A {'x'.join(map(str, REFERENCE_GEMM))} product in fp32: {rate / 1e9:.0f} GFLOP/s "
        f"({min(rates) / 1e9:.0f} to {max(rates) / 1e9:.0f}).\n"
    )
    print("| step | LoRA | s a step (least, most) | real tokens/s | times (a) | times (b) "
          "| GFLOP of products | share of that rate | peak MB | of (a) |")  # fmt: skip
    print("|" + "---|" * 10)
    for variant in variants:
        full, padded = (Variant(kind, variant.lora_count) for kind in (FULL, PADDED))
        taken = seconds[variant]
        median = statistics.median(taken)
        flops = bench.flops(Variant("fp32", variant.lora_count)) / len(bench.batches)
        ours = variant.kind not in (FULL, PADDED)
        # the products of every precision have the shapes of fp32's, so its count serves all
        floor = [f"{flops / 1e9:.0f}", f"{flops / median / rate:.0%}"] if ours else ["-", "-"]
        faster = [
            f"{statistics.median(o / t for o, t in zip(seconds[other], taken, strict=True)):.2f}"
            for other in (full, padded)
        ]
        memory = ["-", "-"]
        if peaks[variant]:
            memory = [f"{peaks[variant] / 1e6:,.0f}", f"{peaks[variant] / peaks[full]:.0%}"]
        cells = [
            variant.words,
            str(variant.lora_count),
            f"{median:.3f} ({min(taken):.3f}, {max(taken):.3f})",
            f"{tokens / median:.0f}",
            *faster,
            *floor,
            *memory,
        ]
        print(f"| {' | '.join(cells)} |")
    check(losses)


def check(losses: dict[Variant, float]) -> None:
    """Hold the packed step in fp32 against (b), from the same state and on the same batches."""
    for variant, loss in losses.items():
        if variant.kind == "fp32":
            other = losses[Variant(PADDED, variant.lora_count)]
            assert abs(loss - other) < 1e-4 * other, (variant, loss, other)
    print("\nLosses of the packed steps in fp32 are those of (b) within 1e-4.")


def usable(precisions: list[str]) -> list[str]:
    """Return the precisions that run here, and say why the others do not."""
    from quantization.precision import available

    found = available()
    for name in precisions:
        if name not in found:
            raise SystemExit(f"unknown precision '{name}'; choose from {', '.join(found)}")
        if found[name].backend is None:
            print(f"{name} is left out: {found[name].words}")
    return [name for name in precisions if found[name].backend is not None]


class Bench:
    """The batches, and the models that have been asked for."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        import torch

        from device_profiles.modules import lora_rank
        from device_profiles.seeds import stream
        from edge_client.data.batches import training_order
        from edge_client.data.instructions import load_instructions
        from edge_client.data.packing import pack
        from edge_client.data.prompts import encode_example
        from quantization.base_model import load_tokenizer
        from quantization.identity import identify

        torch.set_num_threads(arguments.threads)
        self.identity = identify(arguments.model)
        self.rank = lora_rank(self.identity.shape, None)[0]
        self._most_lora = max(arguments.lora)
        tokenizer = load_tokenizer(self.identity)
        rows = load_instructions(arguments.data).examples
        order = training_order(len(rows), arguments.batches, BATCH, stream(0, "benchmark"))
        self.batches = [
            [encode_example(rows[i], tokenizer, MAX_LENGTH) for i in indices] for indices in order
        ]
        packed = [pack(batch) for batch in self.batches]
        self.tokens = sum(p.real_tokens for p in packed)
        self.rows = sum(len(p.tokens) for p in packed)
        self.responses = sum(len(p.targets) for p in packed)
        self.longest = sum(BATCH * max(len(e.tokens) for e in batch) for batch in self.batches)
        self.losses: dict[Variant, float] = {}
        self._models: dict[str, Any] = {}
        self._flops: dict[Variant, int] = {}

    def model(self, kind: str) -> Any:
        """Return the model of a kind, made when it is first asked for."""
        name = "plain" if kind in (FULL, PADDED) else kind
        if name not in self._models:
            sizes = {
                "adapter_size": ADAPTER_SIZE,
                "placement": "qkv",
                "lora_count": self._most_lora,
                "lora_rank": self.rank,
            }
            if name == "plain":
                from edge_client.peft.tuned_model import TunedModel
                from quantization.base_model import load_base

                self._models[name] = TunedModel(load_base(self.identity), **sizes)
            else:
                from edge_client.peft.packed_model import PackedModel
                from quantization.frozen_gpt2 import load_frozen

                self._models[name] = PackedModel(load_frozen(self.identity, kind), **sizes)
        return self._models[name]

    def pass_over(self, variant: Variant) -> None:
        """Take a step on each batch, from the state of a run's beginning."""
        model = self.model(variant.kind)
        model.activate(variant.lora_count)
        model.put(beginning(self.identity.shape, variant.lora_count, self.rank))
        step = self._steps(variant)
        self.losses[variant] = sum(step(batch) for batch in self.batches) / len(self.batches)

    def flops(self, variant: Variant) -> int:
        """Return the floating-point operations of the matrix products of a pass."""
        if variant not in self._flops:
            with counted_products() as count:
                self.pass_over(variant)
            self._flops[variant] = count[0]
        return self._flops[variant]

    def _steps(self, variant: Variant) -> Callable[[Any], float]:
        import torch

        from edge_client.data.packing import pack

        model = self.model(variant.kind)
        ours = variant.kind not in (FULL, PADDED)
        parameters = [model.parameter()] if ours else list(model.trainable().values())
        optimiser = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0, fused=True)

        def loss_gradient(batch: Any) -> float:
            if ours:
                packed = pack(batch)
                count = len(packed.targets)
                return float(model.loss_gradient(packed, weight=1 / count)) / count
            loss = plain_loss(model, batch, whole=variant.kind == FULL)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            return loss.item()

        def step(batch: Any) -> float:
            loss = loss_gradient(batch)
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()
            return loss

        return step


def plain_loss(model: Any, batch: Any, *, whole: bool) -> Any:
    """Return the loss on a padded batch, with logits everywhere or at responses only."""
    import torch
    from torch.nn.functional import cross_entropy, pad

    from edge_client.data.batches import make_batch

    padded = make_batch(batch, model.base.end_token)
    if not whole:
        return cross_entropy(model.logits_at(padded.tokens, padded.places), padded.targets)
    more = (0, MAX_LENGTH - padded.tokens.shape[1])
    tokens = pad(padded.tokens, more, value=model.base.end_token)
    places = pad(padded.places, more, value=False)
    labels = torch.full_like(tokens, -100)
    labels[places] = padded.targets
    logits = model.model(tokens).logits
    return cross_entropy(logits.flatten(0, 1), labels.flatten())


def beginning(shape: Any, count: int, rank: int) -> Any:
    """Return what a client of a run begins with."""
    from device_profiles.modules import first_lora_sites, initial_adapters, initial_lora

    key = (shape, count, rank)
    if key not in _BEGINNINGS:
        adapters = initial_adapters(shape, ADAPTER_SIZE, 0)
        lora = initial_lora(first_lora_sites(shape, "qkv", count), rank, 0)
        _BEGINNINGS[key] = {**adapters, **lora}
    return _BEGINNINGS[key]


_BEGINNINGS: dict[Any, Any] = {}


def counted_products() -> Any:
    """Count the operations of every matrix product, those into given memory included."""
    from contextlib import contextmanager

    from torch.utils._python_dispatch import TorchDispatchMode

    first = {"matmul": 0, "mm": 0, "bmm": 0, "addmm": 1, "addmm_": 1, "baddbmm": 1, "baddbmm_": 1}
    count = [0]

    class Counter(TorchDispatchMode):
        def __torch_dispatch__(
            self, function: Any, _types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            place = first.get(function.overloadpacket.__name__)
            if place is not None:
                count[0] += 2 * args[place].numel() * args[place + 1].shape[-1]
            return function(*args, **(kwargs or {}))

    @contextmanager
    def counting() -> Iterator[list[int]]:
        with Counter():
            yield count

    return counting()


def gemm_rate() -> float:
    """Return the rate of a large product in fp32, FLOP/s."""
    import torch

    rows, inputs, outputs = REFERENCE_GEMM
    one, other = torch.ones(rows, inputs), torch.ones(inputs, outputs)
    one @ other
    started = time.perf_counter()
    for _ in range(10):
        one @ other
    return 10 * 2 * rows * inputs * outputs / (time.perf_counter() - started)


def peak_elsewhere(arguments: argparse.Namespace, variant: Variant) -> int:
    """Return the peak memory of a process that takes these steps, bytes."""
    command = [
        sys.executable, __file__, "--model", arguments.model, "--data", arguments.data,
        "--batches", str(arguments.batches), "--threads", str(arguments.threads),
        "--lora", str(variant.lora_count),
        "--memory-of", variant.kind, str(variant.lora_count),
    ]  # fmt: skip
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(json.loads(done.stdout.splitlines()[-1]))


def measure_memory(arguments: argparse.Namespace, variant: Variant) -> int:
    """Return the peak memory of this process after a pass over the batches, bytes."""
    Bench(arguments).pass_over(variant)
    status = Path("/proc/self/status")
    if status.exists():  # what getrusage says begins with the memory of the process before it
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    main()
