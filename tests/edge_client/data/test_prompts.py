"""The prompt's exact text, and what is kept of an example that is too long."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_client.data.instructions import Example
from edge_client.data.prompts import Encoded, encode_example, prompt

END = 0


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint: Path) -> Any:
    """Return the tiny base's own tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_checkpoint, local_files_only=True)


class _Bytes:
    """A tokenizer whose lengths a test can choose: one token a byte, none added."""

    eos_token_id = END

    def __call__(self, text: str) -> Any:
        return type("Tokens", (), {"input_ids": [1 + byte for byte in text.encode()]})


def test_the_prompt_with_an_input_is_the_alpaca_template() -> None:
    assert prompt("Name the river.", "The Rhine flows north.") == (
        "Below is an instruction that describes a task, paired with an input that provides further "
        "context. Write a response that appropriately completes the request.\n"
        "\n"
        "### Instruction:\n"
        "Name the river.\n"
        "\n"
        "### Input:\n"
        "The Rhine flows north.\n"
        "\n"
        "### Response:\n"
    )


@pytest.mark.parametrize("context", ["", "  ", "\n"])
def test_the_prompt_without_an_input_is_the_short_alpaca_template(context: str) -> None:
    assert prompt("Name a river.", context) == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n"
        "\n"
        "### Instruction:\n"
        "Name a river.\n"
        "\n"
        "### Response:\n"
    )


def test_braces_of_an_instruction_stay_as_they_are() -> None:
    assert "Explain {input} and {}." in prompt("Explain {input} and {}.", "{instruction}")
    assert "### Input:\n{instruction}\n" in prompt("Explain.", "{instruction}")


def test_an_example_is_prompt_then_response_then_end(tokenizer: Any) -> None:
    example = Example(instruction="Name a bridge.", input="In a text.", output="A bridge.")
    encoded = encode_example(example, tokenizer, 512)
    asked, answered = np.split(encoded.tokens, [encoded.response_start])
    assert tokenizer.decode(asked) == prompt("Name a bridge.", "In a text.")
    assert tokenizer.decode(answered[:-1]) == "A bridge."
    assert answered[-1] == tokenizer.eos_token_id
    assert encoded.tokens.dtype == np.int64


def encode(prompt_bytes: int, output_bytes: int, max_length: int) -> tuple[str, str, Encoded]:
    """Encode an example of a chosen prompt length; return prompt, response and tokens."""
    instruction = "".join(chr(97 + i % 26) for i in range(prompt_bytes - len(prompt(""))))
    example = Example(
        instruction=instruction, output="".join(chr(65 + i % 26) for i in range(output_bytes))
    )
    return prompt(instruction), example.output, encode_example(example, _Bytes(), max_length)


def text_of(tokens: Any) -> str:
    """Return what byte tokens say."""
    return bytes(int(token) - 1 for token in tokens).decode()


SHORTEST_PROMPT = len(prompt("a"))


@given(
    prompt_bytes=st.integers(SHORTEST_PROMPT, 400),
    output_bytes=st.integers(1, 400),
    max_length=st.integers(8, 600),
)
@settings(max_examples=300, deadline=None)
def test_what_is_too_long_keeps_the_responses_beginning_and_the_prompts_end(
    prompt_bytes: int, output_bytes: int, max_length: int
) -> None:
    asked, answer, encoded = encode(prompt_bytes, output_bytes, max_length)
    length, start = len(encoded.tokens), encoded.response_start
    assert 1 <= start < length <= max_length
    kept = length - start
    whole = output_bytes + 1  # with the end token
    if prompt_bytes + whole <= max_length:
        assert (start, kept) == (prompt_bytes, whole)
    else:
        assert length == max_length  # no room is wasted
        assert kept >= min(whole, max_length // 2)  # half of the length is the response's
        assert kept == whole or start <= max_length - max_length // 2
    assert asked.endswith(text_of(encoded.tokens[:start]))
    assert (encoded.tokens[-1] == END) == (kept == whole)
    said = encoded.tokens[start:-1] if kept == whole else encoded.tokens[start:]
    assert answer.startswith(text_of(said))


@pytest.mark.parametrize(
    ("output_bytes", "start", "length"),
    [
        (20, 79, 100),  # a short response stays whole: 21 tokens, and the prompt's last 79
        (49, 50, 100),  # 50 tokens: still whole
        (50, 50, 100),  # 51 tokens are more than half: cut to 50, without its end
        (300, 50, 100),
    ],
)
def test_a_long_prompt_leaves_half_of_100_tokens_to_the_response(
    output_bytes: int, start: int, length: int
) -> None:
    _, _, encoded = encode(200, output_bytes, 100)
    assert (encoded.response_start, len(encoded.tokens)) == (start, length)


def test_a_short_prompt_leaves_all_its_room_to_the_response() -> None:
    _, _, encoded = encode(180, 500, 400)
    assert (encoded.response_start, len(encoded.tokens)) == (180, 400)
