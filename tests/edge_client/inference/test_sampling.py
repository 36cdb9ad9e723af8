"""The next token from logits, by hand."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from device_profiles.config_files import check
from device_profiles.errors import InputError
from device_profiles.seeds import stream
from edge_client.inference.sampling import Sampling, candidates, next_token

PLAIN = {"temperature": 1.0, "top_p": 1.0, "repetition_penalty": 1.0}


def sampling(**values: Any) -> Sampling:
    """Return settings that change nothing but what is named."""
    return Sampling(**{**PLAIN, **values})


def logits_of(*probabilities: float) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.log(np.array(probabilities, dtype=np.float32))


def test_without_settings_the_probabilities_are_those_of_the_logits() -> None:
    tokens, found = candidates(logits_of(0.25, 0.5, 0.125, 0.125), sampling(), [])
    assert tokens.tolist() == [1, 0, 2, 3]  # of equal ones the lower number first
    np.testing.assert_allclose(found, [0.5, 0.25, 0.125, 0.125], rtol=1e-6)  # logits in fp32


def test_top_k_keeps_the_likeliest_and_shares_out_the_rest() -> None:
    tokens, found = candidates(logits_of(0.1, 0.6, 0.3), sampling(top_k=2), [])
    assert tokens.tolist() == [1, 2]
    np.testing.assert_allclose(found, [2 / 3, 1 / 3], rtol=1e-6)


def test_a_top_k_above_the_vocabulary_keeps_all() -> None:
    assert len(candidates(logits_of(0.5, 0.5), sampling(top_k=9), [])[0]) == 2


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [
        (0.1, [2]),
        (0.5, [2]),
        (0.51, [2, 0]),
        (0.75, [2, 0]),
        (0.76, [2, 0, 1]),
        (1.0, [2, 0, 1, 3]),
    ],
)
def test_top_p_keeps_the_fewest_that_reach_it(top_p: float, kept: list[int]) -> None:
    # likeliest first: 0.5, 0.25, 0.125, 0.125; sums 0.5, 0.75, 0.875, 1
    tokens, found = candidates(logits_of(0.25, 0.125, 0.5, 0.125), sampling(top_p=top_p), [])
    assert tokens.tolist() == kept
    assert found.sum() == pytest.approx(1, abs=1e-12)


def test_top_p_counts_what_top_k_and_temperature_left() -> None:
    # top-k leaves 0.4 and 0.4 of 1, so 0.5 and 0.5; the first reaches 0.5
    kept, _ = candidates(logits_of(0.4, 0.4, 0.2), sampling(top_k=2, top_p=0.5), [])
    assert kept.tolist() == [0]
    # at temperature 1/2 the weights are 0.16, 0.16, 0.04: 4/9, 4/9, 1/9
    kept, found = candidates(logits_of(0.4, 0.4, 0.2), sampling(temperature=0.5, top_p=0.8), [])
    assert kept.tolist() == [0, 1]
    np.testing.assert_allclose(found, [0.5, 0.5], rtol=1e-6)


def test_temperature_sharpens_or_flattens() -> None:
    # 0.8 and 0.2: squared 0.64 and 0.04; the roots are as 2 to 1
    _, sharp = candidates(logits_of(0.8, 0.2), sampling(temperature=0.5), [])
    _, flat = candidates(logits_of(0.8, 0.2), sampling(temperature=2.0), [])
    np.testing.assert_allclose(sharp, [16 / 17, 1 / 17], rtol=1e-6)
    np.testing.assert_allclose(flat, [2 / 3, 1 / 3], rtol=1e-6)


def test_the_penalty_makes_what_was_there_unlikelier_once() -> None:
    logits = np.array([2.0, -1.0, 1.5], dtype=np.float32)
    tokens, found = candidates(logits, sampling(repetition_penalty=2.0), [0, 1, 0])
    weights = np.exp([1.0, -2.0, 1.5])  # 2/2, -1*2, untouched
    assert tokens.tolist() == [2, 0, 1]
    np.testing.assert_allclose(found, weights[[2, 0, 1]] / weights.sum(), rtol=1e-6)


def test_at_temperature_zero_the_likeliest_is_taken_and_nothing_drawn() -> None:
    draw = stream(0, "test")
    greedy = sampling(temperature=0)
    assert next_token(logits_of(0.3, 0.4, 0.3), greedy, [], draw) == 1
    assert next_token(logits_of(0.4, 0.2, 0.4), greedy, [], draw) == 0  # of equal ones the first
    assert draw.random() == stream(0, "test").random()


def test_the_penalty_counts_at_temperature_zero() -> None:
    greedy = sampling(temperature=0, repetition_penalty=2.0)
    logits = np.array([3.0, 2.0], dtype=np.float32)
    assert next_token(logits, greedy, [0], stream(0, "test")) == 1


def test_tokens_come_as_often_as_they_are_likely() -> None:
    draw, count = stream(7, "test"), 4000
    logits = logits_of(0.5, 0.3, 0.2)
    seen = Counter(next_token(logits, sampling(), [], draw) for _ in range(count))
    for token, probability in enumerate((0.5, 0.3, 0.2)):
        # five standard deviations of a binomial share
        bound = 5 * (probability * (1 - probability) / count) ** 0.5
        assert seen[token] / count == pytest.approx(probability, abs=bound)


def test_the_same_seed_draws_the_same_tokens() -> None:
    def drawn(seed: int) -> list[int]:
        draw = stream(seed, "test")
        return [next_token(logits_of(*[0.1] * 10), sampling(), [], draw) for _ in range(20)]

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


def test_logits_that_are_no_numbers_are_told() -> None:
    for temperature in (0.0, 1.0):
        with pytest.raises(InputError, match="finite"):
            next_token(
                np.array([0.0, np.nan], dtype=np.float32),
                sampling(temperature=temperature),
                [],
                stream(0, "test"),
            )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("repetition_penalty", 0.0),
        ("max_tokens", 0),
        ("seed", -1),
    ],
)
def test_a_value_out_of_range_is_told_with_its_field(field: str, value: float) -> None:
    with pytest.raises(InputError, match=f"options: {field} = "):
        check(Sampling, {field: value}, "options")
