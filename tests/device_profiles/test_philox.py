"""Keys and first words against numpy's own Philox and the streams of a run."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from device_profiles.errors import InputError
from device_profiles.philox import (
    KeyedGenerator,
    first_words,
    named_keys,
    numbered_keys,
    uniforms,
)
from device_profiles.seeds import stream

Word = st.integers(0, 2**64 - 1)


@given(keys=st.lists(st.tuples(Word, Word), min_size=1, max_size=5))
def test_first_words_are_those_of_numpys_philox(keys: list[tuple[int, int]]) -> None:
    got = first_words(np.array(keys, dtype=np.uint64))
    for (low, high), words in zip(keys, got, strict=True):
        assert words.tolist() == np.random.Philox(key=low + (high << 64)).random_raw(4).tolist()


def test_first_words_of_more_keys_than_are_done_at_once() -> None:
    keys = numbered_keys(3, "many", count=20_000)
    whole = first_words(keys)
    for place in (0, 8_191, 8_192, 19_999):
        assert whole[place].tolist() == first_words(keys[place : place + 1])[0].tolist()


@pytest.mark.parametrize("words", [(), ("channel",), ("channel", 3), ("it's", 'a "name"')])
def test_named_keys_are_the_keys_of_the_runs_streams(words: tuple[str | int, ...]) -> None:
    names: list[str | int] = ["pi5-02", 4, np.int64(5), "o'brien", "ü", ""]  # type: ignore[list-item]
    keys = named_keys(7, *words, names=names)
    for name, key in zip(names, keys, strict=True):
        own = stream(7, *words, name).bit_generator.state["state"]["key"]  # type: ignore[index]
        assert key.tolist() == own.tolist()


def test_a_numbered_key_does_not_depend_on_how_many_are_asked_for() -> None:
    whole = numbered_keys(1, "round", 4, count=100)
    assert whole.shape == (100, 2)
    assert len(np.unique(whole)) == 200
    for first, count in ((0, 7), (1, 7), (50, 50), (99, 1)):
        part = numbered_keys(1, "round", 4, count=count, first=first)
        assert part.tolist() == whole[first : first + count].tolist()
    other = numbered_keys(1, "round", 5, count=100)
    assert not np.isin(other, whole).any()


def test_no_keys_are_an_empty_array() -> None:
    assert numbered_keys(1, count=0).shape == named_keys(1, names=[]).shape == (0, 2)
    assert first_words(numbered_keys(1, count=0)).shape == (0, 4)


def test_a_keyed_generator_draws_each_keys_stream_from_its_beginning() -> None:
    streams = KeyedGenerator()
    names = ["a", "b"]
    keys = named_keys(2, "x", names=names)
    for place in (0, 1, 0):
        generator = streams.at(keys[place])
        own = stream(2, "x", names[place])
        # 32-bit draws leave half a word behind, which the next stream must not see.
        assert generator.integers(0, 100, 3, dtype=np.int32).tolist() == (
            own.integers(0, 100, 3, dtype=np.int32).tolist()
        )
        assert generator.standard_exponential(5).tolist() == own.standard_exponential(5).tolist()


def test_uniforms_are_the_top_53_bits() -> None:
    words = np.array([0, 2**63, 2**64 - 1, 2**11 - 1], dtype=np.uint64)
    assert uniforms(words).tolist() == [0.0, 0.5, 1 - 2.0**-53, 0.0]


@pytest.mark.parametrize(("count", "first"), [(-1, 0), (1, -1)])
def test_a_negative_number_of_keys_is_refused(count: int, first: int) -> None:
    with pytest.raises(InputError, match=f"count = {count}, first = {first}; give 0 or more"):
        numbered_keys(1, count=count, first=first)
