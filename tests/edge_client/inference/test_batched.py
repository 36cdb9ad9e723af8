"""Batched responses, against full passes without a cache, the library's model, and the softmax."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy import stats

from device_profiles.errors import InputError
from device_profiles.seeds import stream
from edge_client.data.packing import pack
from edge_client.data.prompts import Encoded
from edge_client.inference.batched import Response, choose, generate
from edge_client.peft.packed_model import PackedModel
from edge_client.peft.tuned_model import TunedModel
from quantization.frozen_gpt2 import FrozenBase, load_frozen
from quantization.identity import BaseIdentity
from tests.conftest import POSITIONS, VOCABULARY
from tests.edge_client.conftest import ADAPTER_SIZE, RANK, random_tensors

IntArray = npt.NDArray[np.int64]

NEVER = -1  # an end token that no model gives
MOST = 12
# Of the largest logit; rounding comes to some 1e-5 of it on this base, whose weights are large.
NEAR_TIE = 5e-4


def make(base: FrozenBase, identity: BaseIdentity) -> PackedModel:
    model = PackedModel(
        base, adapter_size=ADAPTER_SIZE, placement="qkv", lora_count=36, lora_rank=RANK
    )
    model.put(random_tensors(identity))
    return model


@pytest.fixture(scope="module")
def model(identity: BaseIdentity) -> PackedModel:
    return make(load_frozen(identity), identity)


def prompts_of(*lengths: int) -> list[IntArray]:
    """Return prompts of random tokens, of which the first four are the same."""
    rng = np.random.default_rng(3)
    prompts = [rng.integers(1, VOCABULARY, length) for length in lengths]
    for prompt in prompts:
        prompt[:4] = [9, 8, 7, 6][: len(prompt)]
    return prompts


PROMPTS = prompts_of(3, 50, 9, 90, 9, 21)


def greedy(model: PackedModel, prompts: list[IntArray], **changes: Any) -> list[Response]:
    how = {"most_tokens": MOST, "temperature": 0.0, "end_token": NEVER, "generator": None}
    return generate(model, prompts, **{**how, **changes})


def sampled(
    model: PackedModel, prompts: list[IntArray], seed: int = 0, **changes: Any
) -> list[Response]:
    return greedy(model, prompts, temperature=0.9, generator=stream(seed, "rollouts"), **changes)


def texts(responses: list[Response]) -> list[list[int]]:
    return [response.tokens.tolist() for response in responses]


def after(model: PackedModel, prompt: IntArray, response: IntArray) -> torch.Tensor:
    """Return the logits that predict each token of a response, in one pass without a cache."""
    tokens = np.concatenate([prompt, response])
    return model.logits(pack([Encoded(tokens=tokens, response_start=len(prompt))]))


def step_by_step(model: PackedModel, prompt: IntArray, most: int) -> list[int]:
    read = prompt
    for _ in range(most):
        logits = after(model, read, np.zeros(1, np.int64))
        read = np.append(read, int(logits[0].argmax()))
    return read[len(prompt) :].tolist()


# -- the likeliest token ---------------------------------------------------------------------------


def test_greedy_text_is_that_of_full_passes_one_token_after_another(model: PackedModel) -> None:
    expected = [step_by_step(model, prompt, MOST) for prompt in PROMPTS]
    assert len({tuple(text) for text in expected}) > 1
    assert texts(greedy(model, PROMPTS)) == expected


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "nf4"])
def test_at_any_precision_each_token_is_the_likeliest_after_those_before_it(
    identity: BaseIdentity, precision: str
) -> None:
    # A pass over the whole text rounds otherwise than one over its last token; where two tokens
    # are as likely as that, either may be taken, and the pass goes on with the one that was.
    held = make(load_frozen(identity, precision), identity)
    for prompt, response in zip(PROMPTS, greedy(held, PROMPTS), strict=True):
        assert len(response.tokens) == MOST
        logits = after(held, prompt, response.tokens)
        taken = logits.gather(1, torch.from_numpy(response.tokens)[:, None])[:, 0]
        assert float((logits.max(1).values - taken).max()) <= NEAR_TIE * float(logits.abs().max())


def test_greedy_text_is_that_of_the_librarys_padded_model(
    model: PackedModel, identity: BaseIdentity, tuned: Callable[..., TunedModel]
) -> None:
    plain = tuned()
    plain.put(random_tensors(identity))
    longest = max(len(prompt) for prompt in PROMPTS)
    tokens = np.zeros((len(PROMPTS), longest), np.int64)
    there = np.zeros_like(tokens)
    for row, seen, prompt in zip(tokens, there, PROMPTS, strict=True):
        row[longest - len(prompt) :], seen[longest - len(prompt) :] = prompt, 1
    written = plain.model.generate(
        input_ids=torch.from_numpy(tokens),
        attention_mask=torch.from_numpy(there),
        max_new_tokens=MOST,
        do_sample=False,
        use_cache=True,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert texts(greedy(model, PROMPTS)) == written[:, longest:].tolist()


# -- how a response ends ---------------------------------------------------------------------------


def test_a_row_ends_at_its_first_end_token_and_the_others_go_on(model: PackedModel) -> None:
    whole = texts(sampled(model, PROMPTS))
    for end in {whole[0][0], whole[1][5], whole[3][MOST - 1]}:
        expected = []
        for text in whole:
            stop = text.index(end) if end in text else MOST
            expected.append((text[:stop], end in text))
        found = sampled(model, PROMPTS, end_token=end)
        assert [(r.tokens.tolist(), r.ended) for r in found] == expected


def test_one_token_may_be_all(model: PackedModel) -> None:
    (first, *_) = whole = texts(greedy(model, PROMPTS))
    assert texts(greedy(model, PROMPTS, most_tokens=1)) == [text[:1] for text in whole]
    (ended,) = greedy(model, PROMPTS[:1], most_tokens=1, end_token=first[0])
    assert ended.ended
    assert ended.tokens.shape == (0,)
    assert ended.tokens.dtype == np.int64


def test_a_prompt_leaves_its_response_the_rest_of_the_positions(model: PackedModel) -> None:
    prompts = prompts_of(POSITIONS - 2, 10, POSITIONS - 1)
    found = greedy(model, prompts, most_tokens=5)
    assert [len(response.tokens) for response in found] == [2, 5, 1]
    assert not any(response.ended for response in found)
    expected = [step_by_step(model, p, n) for p, n in zip(prompts, [2, 5, 1], strict=True)]
    assert texts(found) == expected


def test_no_prompts_have_no_responses(model: PackedModel) -> None:
    assert greedy(model, []) == []


@pytest.mark.parametrize(
    ("prompts", "changes", "words"),
    [
        ([3, POSITIONS], {}, "prompt 1 has 128 tokens and the model reads 128.*at least 1"),
        ([POSITIONS + 4], {}, "shorten it by at least 5"),
        ([3, 0], {}, "prompt 1 has no token"),
        ([3], {"most_tokens": 0}, "most_tokens is 0"),
        ([3], {"temperature": -1.0}, "temperature is -1"),
        ([3], {"temperature": float("nan")}, "temperature is nan"),
        ([3], {"temperature": 1.0}, "without a generator"),
        ([3], {"rows_at_once": 0}, "rows_at_once is 0"),
    ],
)
def test_what_cannot_be_done_is_refused(
    model: PackedModel, prompts: list[int], changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        greedy(model, prompts_of(*prompts), **changes)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("uniforms", [None, np.array([0.5, 0.5])])
def test_a_logit_that_is_no_finite_number_is_refused(
    bad: float, uniforms: npt.NDArray[np.float64] | None
) -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0], [0.0, bad, 1.0]])
    with pytest.raises(InputError, match="not a finite number"):
        choose(logits, 1.0, uniforms)


# -- draws -----------------------------------------------------------------------------------------


def test_a_number_gives_the_token_at_which_the_sum_of_probabilities_passes_it() -> None:
    # probabilities 0.1, 0, 0.2, 0.7, 0 add up to 0.1, 0.1, 0.3, 1, 1
    row = torch.tensor([0.1, 0.0, 0.2, 0.7, 0.0]).log().clamp(min=-1e4)
    numbers = np.array([0.0, 0.0999, 0.1001, 0.2999, 0.3001, 1 - 2**-40])
    assert choose(row.repeat(6, 1), 1.0, numbers).tolist() == [0, 0, 2, 2, 3, 3]
    # at temperature 1/2 they are as 1 to 4 to 49: 1/54 and 5/54 come before the last
    numbers = np.array([0.0184, 0.0186, 0.0925, 0.0927])
    assert choose(row.repeat(4, 1), 0.5, numbers).tolist() == [0, 2, 2, 3]


@pytest.mark.parametrize("temperature", [0.7, 2.0])
def test_first_tokens_are_as_frequent_as_the_softmax_says(
    model: PackedModel, temperature: float
) -> None:
    draws = 4000
    prompt = PROMPTS[0]
    found = generate(
        model,
        [prompt] * draws,
        most_tokens=1,
        temperature=temperature,
        end_token=NEVER,
        generator=stream(5, "frequencies"),
        rows_at_once=1000,
    )
    counts = np.bincount([r.tokens[0] for r in found], minlength=VOCABULARY)
    logits = after(model, prompt, np.zeros(1, np.int64))[0].double()
    expected = draws * torch.softmax(logits / temperature, 0).numpy()
    often = expected >= 5  # the usual bound for the test; all others count as one
    assert often.sum() >= 5
    pooled = [np.append(n[often], n[~often].sum()) for n in (counts, expected)]
    # the seed is fixed, and one in a thousand would fail here
    assert stats.chisquare(*pooled).pvalue > 1e-3


def test_the_same_generator_gives_the_same_text_and_another_gives_another(
    model: PackedModel,
) -> None:
    first = texts(sampled(model, PROMPTS))
    assert texts(sampled(model, PROMPTS)) == first
    assert texts(sampled(model, PROMPTS, seed=1)) != first


def test_a_response_depends_on_its_prompt_and_its_place_alone(model: PackedModel) -> None:
    whole = texts(sampled(model, PROMPTS))
    assert texts(sampled(model, PROMPTS[:2])) == whole[:2]
    others = prompts_of(7, 60, 9, 12, 15, 21)
    for place in (0, 4):
        mixed = [
            p if i == place else other
            for i, (p, other) in enumerate(zip(PROMPTS, others, strict=True))
        ]
        assert texts(sampled(model, mixed))[place] == whole[place]
    assert texts(sampled(model, PROMPTS, rows_at_once=1)) == whole
    assert texts(sampled(model, PROMPTS, rows_at_once=4)) == whole


def test_equal_prompts_get_responses_of_their_own(model: PackedModel) -> None:
    found = texts(sampled(model, [PROMPTS[2]] * 4))
    assert len({tuple(text) for text in found}) == 4
