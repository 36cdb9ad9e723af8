"""Responses that the policy gave, with what reward models and critics need of them.

A response is actions: its tokens and, where it ended by itself, the end token, whose probability
counts like any other's. A response that was cut off has no such action; for scoring alone an end
token stands behind it.
Shape letters: B responses, A actions of one, N actions of all, F features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from device_profiles.errors import InputError
from edge_client.alignment.advantages import Stream
from edge_client.data.prompts import Encoded

Tokens = npt.NDArray[np.int64]


class Answer(Protocol):
    """What generation gives: tokens without the end token, and whether it came."""

    @property
    def tokens(self) -> Tokens:
        """Shape (T,)."""

    @property
    def ended(self) -> bool:
        """Whether the response ended by itself."""


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """One response.

    Attributes:
        example: Prompt and actions.
        ended: Whether the last action is the end token.
        scores: Of each objective's reward model, re-centred, without penalties.
        features: Of the state before each action, for each objective's critic: what its reward
            model reads, the same tensor for all where these share a bare trunk. Shape (A, F) each.
    """

    example: Encoded
    ended: bool
    scores: Mapping[str, float]
    features: Mapping[str, Tensor]

    @property
    def actions(self) -> int:
        """How many actions it has."""
        return len(self.example.tokens) - self.example.response_start

    @property
    def tokens(self) -> int:
        """How many tokens the response has, without the end token."""
        return self.actions - self.ended


def judged(
    prompts: Sequence[Tokens],
    answers: Sequence[Answer],
    *,
    end_token: int,
    token_features: Callable[[Sequence[Encoded]], tuple[Mapping[str, Tensor], list[int]]],
    scores: Mapping[str, Callable[[Tensor], Tensor]],
    encoded: Callable[[Sequence[Encoded]], Mapping[str, Tensor] | None] = lambda _: None,
) -> list[Rollout]:
    """Return responses with their scores; each trunk goes through each of them once.

    Args:
        prompts: Of the answers, one each.
        answers: At least 1.
        end_token: Of the policy's base.
        token_features: By objective, features at every place of some examples that end with an end
            token, one after the other, (P, F); and how many belong to each.
        scores: For each objective, re-centred scores from features at the last places.
            Shape (B, F) -> (B,).
        encoded: By objective, what is scored of each example instead of its last place, if anything
            is. Shape (B, F).

    Raises:
        InputError: If an answer is empty and did not end by itself.
    """
    closed = [_joined(p, a.tokens, end_token) for p, a in zip(prompts, answers, strict=True)]
    features, lengths = token_features(closed)
    parts = {name: torch.split(features[name], lengths) for name in scores}
    last = encoded(closed) or {
        name: torch.stack([part[-1] for part in own]) for name, own in parts.items()
    }  # (B, F) each
    found = {name: score(last[name]).tolist() for name, score in scores.items()}
    return [
        Rollout(
            example=closed[i] if answer.ended else _joined(prompts[i], answer.tokens),
            ended=answer.ended,
            scores={name: values[i] for name, values in found.items()},
            features={name: own[i] if answer.ended else own[i][:-1] for name, own in parts.items()},
        )
        for i, answer in enumerate(answers)
    ]


def paid(rollouts: Sequence[Rollout], objective: str, no_end_penalty: float) -> Stream:
    """Return each response's reward. Shape (B,).

    That is its score, and the penalty where it was cut off. Published runs pay a cut-off response
    the penalty alone, in rewards with mean 0 over the policy's own responses. Scores here are
    centred on the public reference set, the same for every device, so that a policy's may lie far
    above 0; and a device's responses are short, so that most are cut off: with one reward for all
    of these, policies learned little but to end (docs/results.md).
    """
    return np.array([r.scores[objective] + (0 if r.ended else no_end_penalty) for r in rollouts])


def mean_scores(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Return the mean score of each objective, without penalties."""
    names = rollouts[0].scores
    return {name: float(np.mean([r.scores[name] for r in rollouts])) for name in names}


def _joined(prompt: Tokens, answer: Tokens, *end: int) -> Encoded:
    if not len(answer) and not end:
        raise InputError(
            "a response of no tokens that did not end by itself; set max_new_tokens to 1 or more"
        )
    tokens = np.concatenate([prompt, answer, np.array(end, np.int64)])
    return Encoded(tokens=tokens, response_start=len(prompt))
