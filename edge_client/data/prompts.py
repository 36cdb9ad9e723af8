"""The Alpaca prompt template, and examples as tokens with the response marked.

Shape letters: T tokens of one example.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_client.data.instructions import Example

_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


def prompt(instruction: str, context: str = "") -> str:
    """Return the Alpaca prompt, up to where the response begins."""
    if context.strip():
        return _WITH_INPUT.format(instruction=instruction, input=context)
    return _WITHOUT_INPUT.format(instruction=instruction)


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """One example as tokens.

    Attributes:
        tokens: Prompt, response and end token. Shape (T,).
        response_start: Index of the response's first token, 1 <= response_start < T.
    """

    tokens: npt.NDArray[np.int64]
    response_start: int


def encode_example(example: Example, tokenizer: Any, max_length: int) -> Encoded:
    """Return an example of at most ``max_length`` >= 8 tokens.

    Where it is too long, the response keeps what the prompt leaves, and at least half of the
    length; the prompt loses its beginning, never the words that ask for the response.
    """
    asked = tokenizer(prompt(example.instruction, example.input)).input_ids
    answer = [*tokenizer(example.output).input_ids, tokenizer.eos_token_id]
    room = max(max_length - len(asked), max_length // 2)
    answer = answer[:room]
    asked = asked[-(max_length - len(answer)) :]
    return Encoded(tokens=np.array(asked + answer, dtype=np.int64), response_start=len(asked))
