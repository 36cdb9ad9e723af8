"""Random streams for many uploads at once: keys instead of generator objects.

A stream is its 128-bit Philox4x64-10 key, two unsigned 64-bit words, low word first; what it draws
depends on the key alone. Keys are by name, the very streams of ``device_profiles.seeds``, or by
number, which is faster. Source: Salmon, Moraes, Dror and Shaw, Parallel Random Numbers: As Easy as
1, 2, 3, 2011.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from device_profiles.errors import InputError
from device_profiles.seeds import stream

Words = npt.NDArray[np.uint64]

_MULTIPLIERS = (np.uint64(0xD2E7470EE14C6C93), np.uint64(0xCA5A826395121157))
_WEYL = np.array([0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B], dtype=np.uint64)
_ROUNDS = 10
_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)
_KEYS_AT_ONCE = 2**13  # what the rounds touch stays in a core's cache


def named_keys(seed: int, *words: str | int, names: Iterable[str | int]) -> Words:
    """Return the keys of ``seeds.stream(seed, *words, name)`` for each name. Shape (n, 2)."""
    place = tuple(word if isinstance(word, str) else int(word) for word in (seed, *words))
    start = repr(place)[: -len(")") if len(place) > 1 else -len(",)")]
    begun = hashlib.sha256(start.encode())
    digests = []
    for name in names:
        one = begun.copy()
        one.update(f", {name if isinstance(name, str) else int(name)!r})".encode())
        digests.append(one.digest()[:16])
    words_ = np.frombuffer(b"".join(digests), dtype=">u8").reshape(-1, 2)
    return np.ascontiguousarray(words_[:, ::-1], dtype=np.uint64)


def numbered_keys(seed: int, *words: str | int, count: int, first: int = 0) -> Words:
    """Return the keys of streams ``first`` to ``first + count - 1`` of a place. Shape (count, 2).

    Key i is words 2i and 2i + 1 of ``seeds.stream(seed, *words)``, whatever else is asked for.

    Raises:
        InputError: If ``count`` or ``first`` is negative.
    """
    if count < 0 or first < 0:
        raise InputError(f"count = {count}, first = {first}; give 0 or more of both")
    source = stream(seed, *words).bit_generator
    assert isinstance(source, np.random.Philox)  # noqa: S101 - what ``stream`` says it is
    source.advance(first // 2)  # a step is four words, two keys
    skipped = first % 2
    raw = source.random_raw(2 * (count + skipped))
    return np.asarray(raw, dtype=np.uint64).reshape(-1, 2)[skipped:]


class KeyedGenerator:
    """One generator that goes to the beginning of any key's stream, in under a microsecond."""

    def __init__(self) -> None:
        self._philox = np.random.Philox(0)
        self._state = self._philox.state
        self._generator = np.random.Generator(self._philox)

    def at(self, key: Words) -> np.random.Generator:
        """Return the generator, about to draw the first number of ``key``'s stream.

        It is the same object each time: what was returned before moves with it.
        """
        self._state["state"]["key"] = key
        self._philox.state = self._state
        return self._generator


def first_words(keys: Words) -> Words:
    """Return the first four raw words of each key's stream. Shape (n, 2) -> (n, 4)."""
    out = np.empty((len(keys), 4), dtype=np.uint64)
    for start in range(0, len(keys), _KEYS_AT_ONCE):
        part = slice(start, start + _KEYS_AT_ONCE)
        out[part] = _block(keys[part])
    return out


def uniforms(words: Words) -> npt.NDArray[np.float64]:
    """Return raw words as numbers in [0, 1), multiples of 2**-53. Same shape."""
    return np.asarray((words >> np.uint64(11)) * 2.0**-53, dtype=np.float64)


def _block(keys: Words) -> Words:
    """Return Philox of the counter 1, numpy's first. Shape (n, 2) -> (n, 4)."""
    one, zero = np.ones(len(keys), dtype=np.uint64), np.zeros(len(keys), dtype=np.uint64)
    counter = [one, zero, zero, zero]
    key0, key1 = keys[:, 0], keys[:, 1]
    for turn in range(_ROUNDS):
        if turn:
            key0, key1 = key0 + _WEYL[0], key1 + _WEYL[1]
        high0, low0 = _product(_MULTIPLIERS[0], counter[0])
        high1, low1 = _product(_MULTIPLIERS[1], counter[2])
        counter = [high1 ^ counter[1] ^ key0, low1, high0 ^ counter[3] ^ key1, low0]
    return np.stack(counter, axis=1)


def _product(a: np.uint64, b: Words) -> tuple[Words, Words]:
    """Return the high and low word of the 128-bit product."""
    a_high, a_low = a >> _HALF, a & _LOW
    b_high, b_low = b >> _HALF, b & _LOW
    cross = a_low * b_high
    middle = (a_low * b_low >> _HALF) + (cross & _LOW) + a_high * b_low
    return a_high * b_high + (cross >> _HALF) + (middle >> _HALF), a * b
