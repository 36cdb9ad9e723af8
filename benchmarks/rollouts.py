"""Tokens a second of batched responses, against the library's own generation.

    python benchmarks/rollouts.py
    python benchmarks/rollouts.py --model gpt2-small --batch 8 --tokens 32 --threads 2
    python benchmarks/rollouts.py --precisions fp32 int8 nf4

Both draw from the whole softmax at temperature 1, for the same prompts, with adapters and LoRA on,
and no response ends early. The library's is ``generate`` of transformers on the model with peft's
LoRA and hooked adapters, padded on the left, with its cache. They take turns. Before that, both
take the likeliest tokens once, and these are compared. GPT-2 small has random weights here and the
kit's tokenizer: this says how fast the text comes, nothing of how good it is.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers

from device_profiles.modules import lora_rank
from device_profiles.seeds import stream
from edge_client.data.instructions import load_instructions
from edge_client.data.prompts import prompt
from edge_client.inference import batched
from edge_client.inference.batched import generate
from edge_client.peft.decoding import Decoder
from edge_client.peft.packed_model import PackedModel
from edge_client.peft.tuned_model import TunedModel
from edge_client.quiet import import_quietly
from quantization.base_model import load_base, load_tokenizer
from quantization.frozen_gpt2 import load_frozen
from quantization.identity import identify

SMALL = "gpt2-small"
LIBRARY = "transformers"
NEVER = -1  # an end token that no model gives
PARTS = ("reading", "decoding", "drawing")


class Bench:
    """The prompts, and every way of answering them, with the same modules on."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        identity = identify(arguments.model)
        tokenizer = load_tokenizer(identity)
        rows = load_instructions("kit").examples[: arguments.batch]
        self.prompts = [
            np.array(tokenizer(prompt(row.instruction, row.input)).input_ids) for row in rows
        ]
        self._tokens = arguments.tokens
        sizes = {
            "adapter_size": 10,
            "placement": "qkv",
            "lora_count": arguments.lora,
            "lora_rank": lora_rank(identity.shape, None)[0],
        }
        self._plain = TunedModel(load_base(identity), **sizes)
        self._packed = {
            name: PackedModel(load_frozen(identity, name), **sizes) for name in arguments.precisions
        }
        draw = stream(0, "rollouts")
        tensors = {  # small, so that what is written stays a text
            name: (0.02 * draw.standard_normal(values.shape)).astype(np.float32)
            for name, values in self._plain.take().items()
        }
        for model in (self._plain, *self._packed.values()):
            model.put(tensors)
        self.ways = (LIBRARY, *(f"packed, {name}" for name in self._packed))
        longest = max(len(asked) for asked in self.prompts)
        self._padded = torch.zeros(len(self.prompts), longest, dtype=torch.long)
        self._there = torch.zeros_like(self._padded)
        for i, asked in enumerate(self.prompts):
            self._padded[i, longest - len(asked) :] = torch.from_numpy(asked)
            self._there[i, longest - len(asked) :] = 1

    def write(self, way: str, temperature: float, seed: int) -> list[list[int]]:
        """Return the responses."""
        if way != LIBRARY:
            found = generate(
                self._packed[way.removeprefix("packed, ")],
                self.prompts,
                most_tokens=self._tokens,
                temperature=temperature,
                end_token=NEVER,
                generator=stream(seed, "benchmark"),
            )
            return [response.tokens.tolist() for response in found]
        torch.manual_seed(seed)
        drawn = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        with torch.inference_mode():
            written = self._plain.model.generate(
                input_ids=self._padded,
                attention_mask=self._there,
                max_new_tokens=self._tokens,
                use_cache=True,
                eos_token_id=None,
                pad_token_id=0,
                **(drawn if temperature else {"do_sample": False}),
            )
        texts: list[list[int]] = written[:, self._padded.shape[1] :].tolist()
        return texts


def timed(spent: dict[str, float]) -> Callable[[], None]:
    """Have ``generate`` count what its parts take; return what undoes it."""

    def counted(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            found = function(*args, **kwargs)
            spent[part] += time.perf_counter() - began
            return found

        return call

    class Counted(Decoder):
        __init__ = counted(PARTS[0], Decoder.__init__)
        step = counted(PARTS[1], Decoder.step)

    before = batched.Decoder, batched.choose
    batched.Decoder, batched.choose = Counted, counted(PARTS[2], batched.choose)  # type: ignore

    def undo() -> None:
        batched.Decoder, batched.choose = before  # type: ignore

    return undo


def compare(arguments: argparse.Namespace) -> None:
    """Let every way write by turns, and print a Markdown table."""
    torch.set_num_threads(arguments.threads)
    bench = Bench(arguments)
    likeliest = {way: bench.write(way, 0.0, 0) for way in bench.ways}  # to warm up as well
    seconds: dict[str, list[float]] = {way: [] for way in bench.ways}
    shares: dict[str, dict[str, float]] = {way: defaultdict(float) for way in bench.ways}
    for repeat in range(arguments.repeats):
        for way in bench.ways:
            undo = timed(shares[way])
            began = time.perf_counter()
            texts = bench.write(way, 1.0, repeat)
            seconds[way].append(time.perf_counter() - began)
            undo()
            assert all(len(text) == arguments.tokens for text in texts)
    lengths = [len(asked) for asked in bench.prompts]
    print(
        f"\n{Path(arguments.model).name}: {arguments.batch} prompts of {min(lengths)} to "
        f"{max(lengths)} tokens, {arguments.tokens} tokens each, {arguments.lora} LoRA modules and "
        f"36 adapters of 10; {arguments.threads} threads; median of {arguments.repeats}.\n"
        f"{machine()}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"peft {peft.__version__}.\n"
    )
    print("| way | s (least, most) | tokens/s | times transformers | reading prompts | decoding "
          "| drawing | the library's likeliest tokens |")  # fmt: skip
    print("|" + "---|" * 8)
    for way in bench.ways:
        taken = seconds[way]
        median = statistics.median(taken)
        ratio = statistics.median(t / s for t, s in zip(seconds[LIBRARY], taken, strict=True))
        parts = [f"{shares[way][part] / sum(taken):.0%}" for part in PARTS]
        pairs = [
            a == b
            for one, other in zip(likeliest[LIBRARY], likeliest[way], strict=True)
            for a, b in zip(one, other, strict=True)
        ]
        cells = [
            way,
            f"{median:.3f} ({min(taken):.3f}, {max(taken):.3f})",
            f"{arguments.batch * arguments.tokens / median:.0f}",
            f"{ratio:.2f}",
            *(["-", "-", "-", "-"] if way == LIBRARY else [*parts, f"{np.mean(pairs):.0%}"]),
        ]
        print(f"| {' | '.join(cells)} |")


def machine() -> str:
    """Return the processor's name."""
    place = Path("/proc/cpuinfo")
    lines = place.read_text().splitlines() if place.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main() -> None:
    """Read the command line, and make a checkpoint of GPT-2 small's shape if it is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="mini", help="gpt2-small, mini or a folder")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--lora", type=int, default=36)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--precisions", nargs="+", default=["fp32"])
    arguments = parser.parse_args()
    import_quietly()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.model == SMALL:
            arguments.model = str(Path(folder) / SMALL)
            make = (
                "import sys, torch, transformers as t; torch.manual_seed(0); "
                "t.GPT2LMHeadModel(t.GPT2Config()).save_pretrained(sys.argv[1])"
            )
            subprocess.run([sys.executable, "-c", make, arguments.model], check=True)
        compare(arguments)


if __name__ == "__main__":
    main()
