"""Streams that belong to a place, not to an order of drawing."""

from __future__ import annotations

import hashlib

import numpy as np

from device_profiles.seeds import number, stream


def test_stream_is_philox_keyed_by_the_hash_of_seed_and_words() -> None:
    digest = hashlib.sha256(b"(7, 'channel', 3, 'pi5-02')").digest()
    own = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "big")))
    assert stream(7, "channel", 3, "pi5-02").random(5).tolist() == own.random(5).tolist()


def test_stream_has_not_changed_since_the_first_release() -> None:
    # Philox's raw words are the same on every version of numpy; a change here breaks old runs.
    raw = stream(0, "fleet").bit_generator.random_raw(2)
    assert raw.tolist() == [15386613757589277694, 3238811288860394831]


def test_number_is_the_first_63_bit_draw_of_its_stream() -> None:
    digest = hashlib.sha256(b"(3, 'ppo', 1)").digest()
    own = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "big")))
    assert number(3, "ppo", 1) == own.integers(0, 2**63 - 1)
    assert 0 <= number(3, "ppo", 1) < 2**63


def test_streams_do_not_depend_on_the_order_in_which_they_are_drawn() -> None:
    first, second = stream(1, "a"), stream(1, "b")
    a, b = first.random(100), second.random(100)
    second, first = stream(1, "b"), stream(1, "a")
    interleaved = [(second.random(), first.random()) for _ in range(100)]
    assert interleaved == list(zip(b.tolist(), a.tolist(), strict=True))


def test_every_part_of_the_place_makes_another_stream() -> None:
    places = [
        (0, "a"), (1, "a"), (0, "b"), (0, "a", 0), (0, "a", 1), (0, "a", "1"), (0, 1, "a"),
        (0, "ab", "c"), (0, "a", "bc"), (0, "a', 'b"), (0, "a", "b"),
    ]  # fmt: skip
    assert len({number(*place) for place in places}) == len(places)


def test_numpy_integer_names_the_same_place_as_the_integer() -> None:
    assert number(np.uint8(4), "channel", np.int64(2)) == number(4, "channel", 2)


def test_neighbouring_streams_are_not_correlated() -> None:
    n = 20_000
    draws = np.stack([stream(0, "client", k).standard_normal(n) for k in range(6)])
    correlation = np.corrcoef(draws) - np.eye(6)
    # Under independence each of the 15 entries has standard deviation 1/sqrt(n).
    assert np.abs(correlation).max() < 5 / np.sqrt(n)
