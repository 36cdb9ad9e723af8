"""An answer to a prompt, token by token, on any runtime.

Shape letters: T tokens, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from device_profiles.errors import InputError
from device_profiles.seeds import stream
from edge_client.inference.sampling import Sampling, next_token
from edge_client.inference.text_stream import TextStream

Stopped = Literal["end", "length", "context", "interrupted"]


class LanguageModel(Protocol):
    """A runtime with a model in it; it reads tokens one after the other.

    Attributes:
        name: Of the runtime.
        positions: How many tokens it can read.
    """

    name: str
    positions: int

    def reset(self) -> None:
        """Forget every token that was read."""

    def feed(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """Read more tokens and return the logits of the next one. Shape (T,) -> (V,)."""
        ...


@dataclass(frozen=True, kw_only=True)
class Speaker:
    """A model with its tokenizer.

    Attributes:
        tokenizer: A ``tokenizers.Tokenizer``.
        end_tokens: Tokens that end an answer.
        title: What it is, for a person.
    """

    model: LanguageModel
    tokenizer: Any
    end_tokens: frozenset[int]
    title: str


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a model said.

    Attributes:
        tokens: How many it took, the end token not counted.
        stopped: By the end token, at ``max_tokens``, at the model's last position, or by the user.
        seconds: From the prompt's first token to the answer's last.
    """

    text: str
    tokens: int
    stopped: Stopped
    seconds: float


def answer(
    speaker: Speaker,
    prompt: str,
    sampling: Sampling,
    *,
    words: tuple[str | int, ...] = (),
    show: Callable[[str], None] = lambda _piece: None,
) -> Answer:
    """Return the answer to a prompt; Ctrl-C ends it early.

    Args:
        speaker: Who answers.
        prompt: As training formats it, up to where the response begins.
        sampling: How it is drawn.
        words: With the seed, what the draws are a function of.
        show: Given each piece of text as soon as its characters are whole.

    Raises:
        InputError: If the prompt leaves no room for an answer, or the model is damaged.
    """
    began = time.perf_counter()
    asked: list[int] = speaker.tokenizer.encode(prompt).ids
    room = speaker.model.positions - len(asked)
    if room < 1:
        raise InputError(
            f"the prompt has {len(asked)} tokens and the model reads {speaker.model.positions}; "
            f"shorten it by at least {1 - room}"
        )
    text = TextStream(speaker.tokenizer.decode)
    pieces: list[str] = []
    count = 0
    stopped: Stopped = "length" if sampling.max_tokens <= room else "context"

    def give(piece: str) -> None:
        pieces.append(piece)
        if piece:
            show(piece)

    try:
        drawn = draw_tokens(speaker.model, asked, sampling, words)
        for token in islice(drawn, min(room, sampling.max_tokens)):
            if token in speaker.end_tokens:
                stopped = "end"
                break
            count += 1
            give(text.push(token))
    except KeyboardInterrupt:
        stopped = "interrupted"
    give(text.finish())
    return Answer(
        text="".join(pieces), tokens=count, stopped=stopped, seconds=time.perf_counter() - began
    )


def draw_tokens(
    model: LanguageModel, asked: Sequence[int], sampling: Sampling, words: tuple[str | int, ...]
) -> Iterator[int]:
    """Yield tokens after those that were asked, without end; take no more than the model reads."""
    generator = stream(sampling.seed, "answer", *words)
    seen = list(asked)
    model.reset()
    logits = model.feed(seen)
    while True:
        token = next_token(logits, sampling, seen, generator)
        yield token
        seen.append(token)
        logits = model.feed([token])
