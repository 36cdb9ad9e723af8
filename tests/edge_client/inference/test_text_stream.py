"""Text that is given out as its characters become whole."""

from __future__ import annotations

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from edge_client.inference.text_stream import TextStream


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Return a byte-level BPE without a merge: every token is one byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return made


def pieces(tokenizer: Tokenizer, tokens: list[int]) -> list[str]:
    stream = TextStream(tokenizer.decode)
    return [*(stream.push(token) for token in tokens), stream.finish()]


def test_a_character_of_several_tokens_comes_with_its_last(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("a\u00e4\u20ac\U0001f600b").ids  # of 1, 2, 3, 4 and 1 bytes
    assert pieces(tokenizer, tokens) == [
        "a", "", "\u00e4", "", "", "\u20ac", "", "", "", "\U0001f600", "b", "",
    ]  # fmt: skip


def test_a_character_that_is_cut_off_is_told_at_the_end(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("a\u20ac").ids[:-1]
    assert pieces(tokenizer, tokens) == ["a", "", "", "\ufffd"]


def test_a_part_that_nothing_completes_does_not_hold_up_the_text(tokenizer: Tokenizer) -> None:
    first_byte = tokenizer.encode("\u20ac").ids[0]
    tokens = [first_byte, *tokenizer.encode("no").ids]
    assert pieces(tokenizer, tokens) == ["", "\ufffdn", "o", ""]


def test_the_pieces_are_together_the_decoded_text(tokenizer: Tokenizer) -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):  # most of these bytes are no text at all
        tokens = rng.integers(0, 256, 40).tolist()
        assert "".join(pieces(tokenizer, tokens)) == tokenizer.decode(tokens)


def test_a_space_that_joins_words_is_kept() -> None:
    # a tokenizer of whole words, whose decoder puts spaces between them
    words = ["one", "two", "three"]
    stream = TextStream(lambda tokens: " ".join(words[token] for token in tokens))
    assert [stream.push(token) for token in (0, 1, 2)] == ["one", " two", " three"]
