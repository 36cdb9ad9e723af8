"""The next token from logits: one function for every runtime, so that they give the same text.

Shape letters: V vocabulary, N tokens that are left to choose from.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import numpy as np
import numpy.typing as npt
from pydantic import Field

from device_profiles.config_files import Config
from device_profiles.errors import InputError

_ROUNDING = 1e-9  # of a sum of probabilities in float64, far above what V of them accumulate


class Sampling(Config):
    """How an answer is drawn.

    Attributes:
        temperature: Logits are divided by it; 0 takes the likeliest token every time.
        top_k: Only so many of the likeliest tokens; 0 for all.
        top_p: Only the likeliest tokens that together reach this probability.
        repetition_penalty: A token that was there before has its logit divided by it if positive,
            multiplied if negative (Keskar et al. 2019); 1 for none.
        max_tokens: An answer's length at most.
        seed: The same seed gives the same answer to the same prompt.
    """

    temperature: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] = 0.7
    top_k: Annotated[int, Field(ge=0)] = 0
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    repetition_penalty: Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)] = 1.1
    max_tokens: Annotated[int, Field(ge=1, le=1_000_000)] = 128
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0


def next_token(
    logits: npt.NDArray[np.float32],
    sampling: Sampling,
    seen: Sequence[int],
    generator: np.random.Generator,
) -> int:
    """Return a token: the likeliest at temperature 0, else one drawn from the ``candidates``.

    Args:
        logits: Shape (V,).
        sampling: How to draw.
        seen: Tokens of prompt and answer so far, for the repetition penalty.
        generator: Not used at temperature 0; one draw otherwise.

    Raises:
        InputError: If a logit is not a finite number.
    """
    if sampling.temperature == 0:
        return int(np.argmax(_penalised(logits, sampling.repetition_penalty, seen)))
    tokens, probabilities = candidates(logits, sampling, seen)
    ends = np.cumsum(probabilities)
    place = np.searchsorted(ends, generator.random() * ends[-1], side="right")
    return int(tokens[min(int(place), len(tokens) - 1)])


def candidates(
    logits: npt.NDArray[np.float32], sampling: Sampling, seen: Sequence[int]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Return the tokens to draw from and their probabilities, likeliest first. Shapes (N,), (N,).

    Penalty, temperature, top-k and top-p are applied in this order; of equal tokens, the one with
    the lower number comes first. The temperature must be above 0.

    Raises:
        InputError: If a logit is not a finite number.
    """
    scores = _penalised(logits, sampling.repetition_penalty, seen) / sampling.temperature
    tokens = np.argsort(-scores, kind="stable")
    if sampling.top_k:
        tokens = tokens[: sampling.top_k]
    weights = np.exp(scores[tokens] - scores[tokens[0]])
    probabilities = weights / weights.sum()
    before = np.cumsum(probabilities) - probabilities  # of all that are likelier
    kept = before < sampling.top_p - _ROUNDING
    kept[0] = True
    left = probabilities[kept]
    return tokens[kept], left / left.sum()


def _penalised(
    logits: npt.NDArray[np.float32], penalty: float, seen: Sequence[int]
) -> npt.NDArray[np.float64]:
    if not np.isfinite(logits).all():
        raise InputError(
            "the model gives a logit that is not a finite number: it is damaged, or its training "
            "diverged; export it again from another run"
        )
    scores = logits.astype(np.float64)
    there = np.unique(np.asarray(seen, dtype=np.int64))
    old = scores[there]
    scores[there] = np.where(old > 0, old / penalty, old * penalty)
    return scores
