"""What a step of PPO costs on a device: seconds by part, and memory against instruction tuning.

    python benchmarks/alignment.py                      # GPT-2-small shape, random weights
    python benchmarks/alignment.py --model mini --rollouts 16 --tokens 48

Seconds are of drawing the responses, of reading them (trunk, scores, old and reference policy) and
of the update (epochs of minibatches, critics included); medians over steps. Each peak of memory is
of a process of its own: a step of instruction tuning on a batch of four examples cut at 256 tokens,
and a step of PPO with the trunk at the same precision as the policy, and at int8 beside fp32. GPT-2
small has random weights and the kit's tokenizer here: this says what a step costs, nothing of what
it learns.
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
from pathlib import Path
from typing import Any

import numpy as np
import torch

from device_profiles.methods import OBJECTIVES
from device_profiles.modules import lora_rank
from device_profiles.reward_heads import HIDDEN, initial_heads
from device_profiles.seeds import stream
from edge_client.alignment.critic import Critic
from edge_client.alignment.descent import policy_descent
from edge_client.alignment.ppo import ppo_step
from edge_client.alignment.rollouts import judged
from edge_client.alignment.settings import PpoSettings
from edge_client.data.instructions import load_instructions
from edge_client.data.prompts import encode_example, prompt
from edge_client.inference.batched import generate
from edge_client.peft.packed_model import PackedModel
from edge_client.quiet import import_quietly
from edge_client.reward.judging import Judging
from edge_client.state import ClientState
from edge_client.trainer import train
from quantization.frozen_gpt2 import load_frozen
from quantization.identity import identify

SMALL = "gpt2-small"
BATCH, MAX_LENGTH = 4, 256


def a_policy(arguments: argparse.Namespace, folder: str) -> PackedModel:
    """Return a base with 36 adapters and 36 LoRA modules on it."""
    identity = identify(folder)
    return PackedModel(
        load_frozen(identity, "fp32"),
        adapter_size=10,
        placement="qkv",
        lora_count=arguments.lora,
        lora_rank=lora_rank(identity.shape, None)[0],
    )


def tuned(arguments: argparse.Namespace, folder: str) -> dict[str, float]:
    """Take two steps of instruction tuning."""
    model = a_policy(arguments, folder)
    rows = load_instructions("kit").examples[:BATCH]
    examples = [encode_example(row, model.base.tokenizer, MAX_LENGTH) for row in rows]
    began = time.perf_counter()
    train(
        model,
        ClientState(round=0, personal={}),
        examples,
        steps=2,
        batch_size=BATCH,
        learning_rate=1e-4,
        seed=0,
        words=("bench",),
    )
    return {"step": (time.perf_counter() - began) / 2}


def aligned(arguments: argparse.Namespace, folder: str) -> dict[str, float]:
    """Take steps of PPO; return the median seconds of each part."""
    model = a_policy(arguments, folder)
    base = model.base
    trunk = base if arguments.trunk == "fp32" else load_frozen(base.identity, arguments.trunk)
    judging = Judging(trunk)
    heads = judging.heads(
        initial_heads(OBJECTIVES, base.identity.shape.width, HIDDEN, 0), OBJECTIVES
    )
    settings = PpoSettings(rollouts=arguments.rollouts, max_new_tokens=arguments.tokens)
    critics = {
        name: Critic(heads.build, heads.tensors(name), learning_rate=1e-3) for name in OBJECTIVES
    }
    descent = policy_descent(model, learning_rate=1e-5, clip_norm=1.0)
    reference = model.take_flat()
    rows = load_instructions("kit").examples[: arguments.rollouts]
    asked = [np.array(base.tokenizer(prompt(row.instruction, row.input)).input_ids) for row in rows]
    seconds: dict[str, list[float]] = {"drawing": [], "scoring": [], "update": [], "actions": []}
    for step in range(arguments.steps):
        began = time.perf_counter()
        answers = generate(
            model,
            asked,
            most_tokens=arguments.tokens,
            temperature=settings.temperature,
            end_token=base.end_token,
            generator=stream(0, "bench", step),
        )
        drawn = time.perf_counter()
        rollouts = judged(
            asked,
            answers,
            end_token=base.end_token,
            token_features=heads.token_features,
            scores={name: heads.score(name) for name in OBJECTIVES},
        )
        read = time.perf_counter()
        ppo_step(
            model,
            descent,
            critics,
            rollouts,
            reference=reference,
            weights={"helpfulness": 0.5, "harmlessness": 0.5},
            kl_coefficient=settings.kl_coefficient,
            settings=settings,
            seed=0,
            words=("bench", step),
        )
        done = time.perf_counter()
        seconds["drawing"].append(drawn - began)
        seconds["scoring"].append(read - drawn)
        seconds["update"].append(done - read)
        seconds["actions"].append(sum(r.actions for r in rollouts))
    return {name: statistics.median(values) for name, values in seconds.items()}


def child(arguments: argparse.Namespace, work: str, trunk: str, folder: str) -> dict[str, Any]:
    """Do a piece of work in a process of its own; return its seconds and its peak, bytes."""
    command = [
        sys.executable, __file__, "--child", work, "--trunk", trunk, "--folder", folder,
        "--rollouts", str(arguments.rollouts), "--tokens", str(arguments.tokens),
        "--steps", str(arguments.steps), "--threads", str(arguments.threads),
        "--lora", str(arguments.lora),
    ]  # fmt: skip
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Measure and print Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=SMALL, help="gpt2-small, mini or a folder")
    parser.add_argument("--rollouts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=32, help="of a response at most")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--lora", type=int, default=36)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--child", choices=["tuned", "aligned"], help=argparse.SUPPRESS)
    parser.add_argument("--trunk", default="fp32", help=argparse.SUPPRESS)
    parser.add_argument("--folder", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    import_quietly()
    if arguments.child:
        work = {"tuned": tuned, "aligned": aligned}[arguments.child]
        found = work(arguments, arguments.folder)
        peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        sys.stdout.write(json.dumps({**found, "peak": peak}) + "\n")
        return
    with tempfile.TemporaryDirectory() as place:
        folder = _checkpoint(Path(place)) if arguments.model == SMALL else arguments.model
        stage_1 = child(arguments, "tuned", "fp32", folder)
        rows = [(trunk, child(arguments, "aligned", trunk, folder)) for trunk in ("fp32", "int8")]
    out = sys.stdout.write
    out(
        f"{arguments.model}: {arguments.rollouts} responses of at most {arguments.tokens} tokens, "
        f"{arguments.lora} LoRA modules, {arguments.threads} threads, median of {arguments.steps} "
        f"steps.\nInstruction tuning: {stage_1['step']:.2f} s a step of {BATCH} examples, peak "
        f"{stage_1['peak'] / 1e6:,.0f} MB.\n\n"
        "| trunk | actions | drawing, s | scoring, s | update, s | peak MB | of stage 1 |\n"
        "|---|---|---|---|---|---|---|\n"
    )
    for trunk, found in rows:
        out(
            f"| {trunk} | {found['actions']:.0f} | {found['drawing']:.2f} | "
            f"{found['scoring']:.2f} | {found['update']:.2f} | {found['peak'] / 1e6:,.0f} | "
            f"{found['peak'] / stage_1['peak']:.0%} |\n"
        )


def _checkpoint(place: Path) -> str:
    """Write a GPT-2 small of random weights by a process of its own; return its folder."""
    make = (
        "import sys, torch, transformers as t; torch.manual_seed(0); "
        "t.GPT2LMHeadModel(t.GPT2Config()).save_pretrained(sys.argv[1])"
    )
    subprocess.run([sys.executable, "-c", make, str(place / SMALL)], check=True)
    return str(place / SMALL)


if __name__ == "__main__":
    main()
