"""A judge apart from a run: reward models that learn from prompts which the run never sees.

Preference pairs are divided by prompt, over all objectives together, into a half for the run and a
half for the judge. The judge's heads read the same kind of trunk as the run's, are learned in one
place and from another seed, and are worth what their own held-out pairs say.
Shape letters: N pairs, F features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from device_profiles.errors import InputError
from device_profiles.methods import OBJECTIVES, Objective
from device_profiles.reward_heads import HIDDEN, initial_heads
from device_profiles.seeds import stream
from edge_client.alignment.rollouts import judged, mean_scores
from edge_client.data.instructions import Example
from edge_client.data.preferences import Pair, partition_pairs
from edge_client.data.prompt_files import Prompt
from edge_client.data.prompts import encode_example, prompt
from edge_client.inference.batched import generate
from edge_client.peft.packed_model import PackedModel
from edge_client.reward.evaluation import PairEvaluation, evaluate_pairs
from edge_client.reward.head import Head, of_objective, scores
from edge_client.reward.judging import Heads, Judging
from edge_client.reward.training import PairSteps, train_head
from messaging.layout import Tensors

#: Of the judge: no run's own, as runs are numbered from 0.
SEED = 2**31 - 1
STEPS = 400
BATCH_SIZE = 32
MAX_LENGTH = 256  # tokens of prompt and response
_HELD_OUT_SHARE = 0.2

PairSets = Mapping[Objective, Sequence[Pair]]


@dataclass(frozen=True, kw_only=True)
class Halves:
    """Pairs by objective: what the run may learn from, and what the judge does."""

    run: dict[Objective, list[Pair]]
    judge: dict[Objective, list[Pair]]


@dataclass(frozen=True, kw_only=True)
class Taught:
    """A judge.

    Attributes:
        tensors: Of its heads, by name.
        figures: What each is worth on the judge's held-out pairs.
        pairs: That each learned from.
    """

    tensors: Tensors
    figures: dict[Objective, PairEvaluation]
    pairs: dict[Objective, int]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the judge says of a model's greedy responses.

    Attributes:
        responses: How many.
        scores: Mean of each objective's scores, in deviations from the reference set's mean.
        tokens: Mean length, without the end token.
        ended: Share of responses that ended by themselves.
    """

    responses: int
    scores: dict[Objective, float]
    tokens: float
    ended: float


def halve(sets: PairSets, seed: int = SEED) -> Halves:
    """Return the two halves; all pairs of a prompt, of whichever objective, are in one of them.

    Prompts that are in the same objectives, on the same sides of a split, are dealt by turns in a
    random order, so that each half has as many of them as the other, or one more or less.

    Args:
        sets: Pairs by objective.
        seed: Of the order.
    """
    kinds: dict[str, set[tuple[str, str]]] = {}
    for name, pairs in sets.items():
        for pair in pairs:
            kinds.setdefault(pair.prompt, set()).add((name, pair.split or ""))
    alike: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for key, kind in kinds.items():
        alike.setdefault(tuple(sorted(kind)), []).append(key)
    for_run: set[str] = set()
    rng = stream(seed, "judge", "halves")
    for group in alike.values():
        for_run.update(group[i] for i in rng.permutation(len(group))[::2])
    sides: list[dict[Objective, list[Pair]]] = [
        {name: [p for p in pairs if (p.prompt in for_run) is ours] for name, pairs in sets.items()}
        for ours in (True, False)
    ]
    return Halves(run=sides[0], judge=sides[1])


def teach(judging: Judging, sets: PairSets, *, seed: int = SEED, steps: int = STEPS) -> Taught:
    """Return a judge that learned from pairs, less a share of their prompts that is held out.

    Args:
        judging: The trunk.
        sets: The judge's half, by objective; a split that pairs carry is obeyed.
        seed: Of its heads, batches and split.
        steps: On each head.

    Raises:
        InputError: If an objective has fewer than two prompts, or training diverges.
    """
    tensors: Tensors = {}
    figures: dict[Objective, PairEvaluation] = {}
    counts: dict[Objective, int] = {}
    initial = initial_heads(sets, judging.trunk.width, HIDDEN, seed)
    for name, pairs in sets.items():
        (part,) = partition_pairs(
            pairs, clients=1, held_out_share=_HELD_OUT_SHARE, seed=seed, objective=name
        )
        learned = _read(judging, [pairs[i] for i in part.train])
        apart = _read(judging, [pairs[i] for i in part.held_out])
        done = train_head(
            of_objective(initial, name),
            learned.chosen,
            learned.rejected,
            PairSteps(steps=steps, batch_size=BATCH_SIZE, seed=seed, words=("judge", name)),
        )
        head = Head(done.tensors).to(apart.chosen.device)
        figures[name] = evaluate_pairs(
            scores(head, apart.chosen),
            scores(head, apart.rejected),
            apart.chosen_tokens,
            apart.rejected_tokens,
        )
        tensors |= done.tensors
        counts[name] = len(part.train)
    return Taught(tensors=tensors, figures=figures, pairs=counts)


def assess(
    heads: Heads,
    model: PackedModel,
    prompts: Sequence[Prompt],
    *,
    most_tokens: int,
    max_length: int = MAX_LENGTH,
) -> Verdict:
    """Return what the judge says of a model that answers prompts greedily.

    Args:
        heads: The judge's, of both objectives.
        model: With the modules that are judged.
        prompts: At least 1; of one that is too long, the end is answered.
        most_tokens: Of a response, the end token included.
        max_length: Of prompt and response, tokens.

    Raises:
        InputError: If there is no prompt, or the response leaves no room for one.
    """
    if not prompts:
        raise InputError("no prompt to judge a client by; give more preference pairs")
    base = model.base
    room = min(max_length, base.identity.positions) - most_tokens - 1
    if room < 1:
        raise InputError(
            f"max_new_tokens = {most_tokens} leaves no room for a prompt in {max_length} tokens; "
            "give fewer"
        )
    texts = [prompt(p.instruction, p.input) for p in prompts]
    asked = [np.array(base.tokenizer(text).input_ids[-room:], np.int64) for text in texts]
    answers = generate(
        model,
        asked,
        most_tokens=most_tokens,
        temperature=0.0,
        end_token=base.end_token,
        generator=None,
    )
    found = judged(
        asked,
        answers,
        end_token=base.end_token,
        token_features=heads.token_features,
        scores={name: heads.score(name) for name in OBJECTIVES},
    )
    means = mean_scores(found)
    return Verdict(
        responses=len(found),
        scores={name: means[name] for name in OBJECTIVES},
        tokens=float(np.mean([r.tokens for r in found])),
        ended=float(np.mean([r.ended for r in found])),
    )


@dataclass(frozen=True, kw_only=True)
class _Read:
    """Pairs as the trunk reads them: features (N, F) and tokens of each side's responses."""

    chosen: Tensor
    rejected: Tensor
    chosen_tokens: list[int]
    rejected_tokens: list[int]


def _read(judging: Judging, pairs: Sequence[Pair]) -> _Read:
    most = min(MAX_LENGTH, judging.base.identity.positions)
    sides = [
        [
            encode_example(
                Example(instruction=p.instruction, input=p.input, output=text),
                judging.base.tokenizer,
                most,
            )
            for p, text in side
        ]
        for side in ([(p, p.chosen) for p in pairs], [(p, p.rejected) for p in pairs])
    ]
    features = judging.trunk.response_features([*sides[0], *sides[1]])
    lengths = [[len(e.tokens) - e.response_start for e in side] for side in sides]
    return _Read(
        chosen=features[: len(pairs)],
        rejected=features[len(pairs) :],
        chosen_tokens=lengths[0],
        rejected_tokens=lengths[1],
    )
