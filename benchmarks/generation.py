"""Tokens a second of a personal GPT-2 small: torch against ONNX Runtime, fp32 and int8.

    python benchmarks/generation.py

64 tokens are read and 64 generated, greedily, one sequence, two threads; 36 adapters on, and LoRA
merged, which costs nothing. The weights are random: this says how fast the text comes, nothing of
how good it is; after the first token that differs, the rest may differ as well. The runtimes take
turns, and the median of the ratios counts. Where other work runs beside it, threads wait for each
other: ``--clock processor --threads 1`` counts this process's own time instead.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import torch

from edge_client.inference.generation import LanguageModel, draw_tokens
from edge_client.inference.sampling import Sampling
from edge_client.inference.torch_model import TorchModel
from edge_client.quiet import import_quietly
from quantization.onnx_export import PRECISIONS, export_onnx
from quantization.onnx_runtime import FILE, OnnxModel

ASKED = list(range(100, 164))
GREEDY = Sampling(temperature=0, repetition_penalty=1)


def a_model() -> torch.nn.Module:
    """Return a GPT-2 small with 36 adapters of size 10, none of them the identity."""
    from quantization.hf.modeling_pwff import PwffGPT2Config, PwffGPT2LMHeadModel

    torch.manual_seed(0)
    return PwffGPT2LMHeadModel(PwffGPT2Config(adapter_size=10)).eval()


def generate(model: LanguageModel, tokens: int) -> list[int]:
    return list(islice(draw_tokens(model, ASKED, GREEDY, ()), tokens))


def main() -> None:
    """Export the model twice, let the three take turns, and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=("wall", "processor"), default="wall")
    arguments = parser.parse_args()
    clock: Callable[[], float] = (
        time.perf_counter if arguments.clock == "wall" else time.process_time
    )
    import_quietly()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as place:
        runtimes: dict[str, LanguageModel] = {"torch fp32": TorchModel(a_model())}
        sizes = {"torch fp32": 0.0}
        for precision in PRECISIONS:
            folder, model = Path(place) / precision, a_model()
            folder.mkdir()
            model.config.save_pretrained(folder)
            export_onnx(model, folder / FILE, precision)
            name = f"ONNX Runtime {precision}"
            sizes[name] = (folder / FILE).stat().st_size / 1e6
            runtimes[name] = OnnxModel(folder, arguments.threads)
        texts = {name: generate(model, arguments.tokens) for name, model in runtimes.items()}
        seconds: dict[str, list[float]] = {name: [] for name in runtimes}
        for _ in range(arguments.repeats):
            for name, model in runtimes.items():
                began = clock()
                generate(model, arguments.tokens)
                seconds[name].append(clock() - began)
    print(f"| runtime | tokens/s ({arguments.clock}) | times torch | file, MB | same tokens |")
    print("|---|---|---|---|---|")
    (first, text), *_ = texts.items()
    for name, taken in seconds.items():
        ratio = statistics.median(t / s for t, s in zip(seconds[first], taken, strict=True))
        same = sum(a == b for a, b in zip(text, texts[name], strict=True)) / len(text)
        print(
            f"| {name} | {arguments.tokens / statistics.median(taken):.1f} | {ratio:.2f} "
            f"| {f'{sizes[name]:.1f}' if sizes[name] else '-'} | {same:.0%} |"
        )


if __name__ == "__main__":
    main()
