"""What the tests of talking share: a model that says what it is told to."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from edge_client.inference.generation import Speaker

END = "<end>"


class Parrot:
    """A model that answers every prompt with the same tokens, whatever it reads.

    Attributes:
        fed: What it was given since it was reset, piece by piece.
        heard: The prompts so far.
    """

    name = "parrot"

    def __init__(
        self, says: list[int], vocabulary: int, positions: int, sure: float = 1000.0
    ) -> None:
        self.positions = positions
        self.fed: list[list[int]] = []
        self.heard: list[list[int]] = []
        self._says = says
        self._vocabulary = vocabulary
        self._sure = sure

    def reset(self) -> None:
        """Begin anew."""
        self.fed = []

    def feed(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """Return logits of zero but for the token that it says next."""
        self.fed.append(list(tokens))
        if len(self.fed) == 1:
            self.heard.append(list(tokens))
        if sum(len(piece) for piece in self.fed) > self.positions:
            raise IndexError("more tokens than positions")
        logits = np.zeros(self._vocabulary, np.float32)
        logits[self._says[len(self.fed) - 1]] = self._sure
        return logits


def byte_tokenizer() -> Tokenizer:
    """Return a tokenizer of which every token is one byte, but for the end token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {c: i for i, c in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END])
    return tokenizer


def a_speaker(says: str, positions: int = 4096, *, ends: bool = True) -> Speaker:
    """Return a speaker that says the same to everything, and then that it has ended."""
    tokenizer = byte_tokenizer()
    end = tokenizer.token_to_id(END)
    tokens = tokenizer.encode(says).ids + ([end] if ends else [])
    return Speaker(
        model=Parrot(tokens, tokenizer.get_vocab_size(), positions),
        tokenizer=tokenizer,
        end_tokens=frozenset([end]),
        title="a parrot",
    )


@pytest.fixture
def parrot() -> Speaker:
    """Return a speaker that says ``yes``."""
    return a_speaker("yes")
