"""An exported model held against the trained one: logits of responses, read as in generation.

Shape letters: N response tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from device_profiles.errors import InputError
from edge_client.data.batches import make_batch
from edge_client.data.instructions import KIT, Example, load_instructions
from edge_client.data.partition import partition
from edge_client.data.prompts import Encoded, encode_example
from edge_client.export.personal import Personal
from edge_client.inference.generation import LanguageModel
from edge_client.peft.tuned_model import TunedModel
from quantization.base_model import load_base
from quantization.errors import HubUnavailableError, MissingExtraError

#: An fp32 export's largest difference of a logit, over the largest logit (at least 1).
TOLERANCE = 1e-4
_EXAMPLES, _MOST_TOKENS = 8, 160

Logits = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Text:
    """What an export is checked on.

    Attributes:
        words: What it is, for a person.
        examples: At least 1.
    """

    words: str
    examples: list[Encoded]


@dataclass(frozen=True, kw_only=True)
class Check:
    """How an exported model compares with the trained one.

    Attributes:
        text: What both read.
        tokens: Response tokens N.
        largest_difference: Of a logit.
        largest_logit: Of the trained model.
        agreement: Share of the tokens for which both find the same next token likeliest.
    """

    text: str
    examples: int
    tokens: int
    largest_difference: float
    largest_logit: float
    agreement: float

    @property
    def same(self) -> bool:
        """Whether they are equal but for rounding in fp32."""
        return self.largest_difference <= TOLERANCE * max(1.0, self.largest_logit)


def held_out_text(personal: Personal, tokenizer: Any) -> Text:
    """Return the beginning of the client's held-out examples; of the kit's, if they are not here.

    A run's folder does not hold the client's text: the run's data is divided again, and the part is
    taken whose sizes and groups are those that the client reported, if there is just one.
    """
    examples, words = _of_client(personal), "the client's held-out text"
    if not examples:
        kit = load_instructions(KIT).examples
        examples, words = [e for e in kit if e.split == "held_out"], "the kit's held-out text"
    length = min(_MOST_TOKENS, personal.identity.positions)
    chosen = [encode_example(e, tokenizer, length) for e in examples[:_EXAMPLES]]
    return Text(words=words, examples=chosen)


def _of_client(personal: Personal) -> list[Example]:
    keys = ("clients", "alpha", "skew", "held_out_share", "seed")
    settings, record = personal.settings, personal.record
    if not record or any(key not in settings for key in (*keys, "data", "partition")):
        return []
    try:
        data = load_instructions(str(settings["data"]))
        kind = str(settings["partition"])
        parts = partition(data.examples, kind=kind, **{key: settings[key] for key in keys})
    except (InputError, HubUnavailableError, MissingExtraError):  # the data is elsewhere by now
        return []
    wanted = (record.get("examples"), record.get("held_out_examples"), record.get("categories"))
    same = [p for p in parts if (len(p.train), len(p.held_out), p.groups) == wanted]
    if len(same) != 1 or data.sha256 != personal.data_sha256:
        return []
    return [data.examples[i] for i in same[0].held_out]


def trained_logits(personal: Personal, examples: Sequence[Encoded]) -> list[Logits]:
    """Return the trained model's logits of every response, base in fp32. Shape (N, V) each."""
    base = load_base(personal.identity)
    model = TunedModel(
        base,
        adapter_size=personal.adapter_size,
        placement=personal.placement,
        lora_count=personal.lora_count,
        lora_rank=personal.lora_rank,
    )
    model.put(personal.tensors)
    found = []
    with torch.inference_mode():
        for example in examples:
            batch = make_batch([example], base.end_token)
            found.append(model.logits_at(batch.tokens, batch.places).numpy())
    return found


def compare(model: LanguageModel, text: Text, trained: Sequence[Logits]) -> Check:
    """Return how a model's logits compare; it reads a prompt at once, then token by token."""
    difference = largest = 0.0
    agreed = count = 0
    for example, expected in zip(text.examples, trained, strict=True):
        found = _read(model, example)
        difference = max(difference, float(np.abs(found - expected).max()))
        largest = max(largest, float(np.abs(expected).max()))
        agreed += int((found.argmax(-1) == expected.argmax(-1)).sum())
        count += len(expected)
    return Check(
        text=text.words,
        examples=len(text.examples),
        tokens=count,
        largest_difference=difference,
        largest_logit=largest,
        agreement=agreed / count,
    )


def _read(model: LanguageModel, example: Encoded) -> Logits:
    tokens = example.tokens.tolist()
    model.reset()
    rows = [model.feed(tokens[: example.response_start])]
    rows += [model.feed([token]) for token in tokens[example.response_start : -1]]
    return np.stack(rows)
