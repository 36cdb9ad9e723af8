"""Packing without padding: which rows there are, and whose they are."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_client.data.packing import Packed, micro_batches, pack
from edge_client.data.prompts import Encoded


def example(tokens: list[int], response_start: int = 1) -> Encoded:
    return Encoded(tokens=np.array(tokens, np.int64), response_start=response_start)


@st.composite
def encoded(draw: st.DrawFn) -> Encoded:
    """Draw an example of so few different tokens that beginnings agree often."""
    tokens = draw(st.lists(st.integers(0, 2), min_size=2, max_size=9))
    return example(tokens, draw(st.integers(1, len(tokens) - 1)))


def predictions(packed: Packed) -> list[tuple[int, int]]:
    """Return (position, target) of every response token."""
    positions = packed.positions[packed.places].tolist()
    return list(zip(positions, packed.targets.tolist(), strict=True))


def test_two_examples_that_begin_alike_share_the_rows_of_that_beginning() -> None:
    packed = pack([example([7, 8, 9, 1], 2), example([7, 8, 5, 6, 2], 3)])
    assert packed.tokens.tolist() == [7, 8, 9, 5, 6]
    assert packed.positions.tolist() == [0, 1, 2, 2, 3]
    assert [(s.start, s.stop, s.shared.tolist()) for s in packed.spans] == [
        (0, 3, []),
        (3, 5, [0, 1]),
    ]
    assert packed.places.tolist() == [1, 2, 3, 4]  # 8 -> 9, 9 -> 1; 5 -> 6, 6 -> 2
    assert packed.targets.tolist() == [9, 1, 6, 2]
    assert packed.real_tokens == 9


def test_nothing_is_shared_where_it_is_not_wanted() -> None:
    packed = pack([example([7, 8, 9, 1], 2), example([7, 8, 5, 6, 2], 3)], share=False)
    assert packed.tokens.tolist() == [7, 8, 9, 7, 8, 5, 6]
    assert packed.positions.tolist() == [0, 1, 2, 0, 1, 2, 3]
    assert all(not len(span.shared) for span in packed.spans)


def test_an_example_that_comes_twice_has_rows_once_and_counts_twice() -> None:
    packed = pack([example([3, 4, 5], 1), example([3, 4, 5], 1), example([3, 4, 6], 2)])
    assert packed.tokens.tolist() == [3, 4]
    assert len(packed.spans) == 1
    assert packed.places.tolist() == [0, 1, 0, 1, 1]
    assert packed.targets.tolist() == [4, 5, 4, 5, 6]
    assert packed.real_tokens == 9


@given(st.lists(encoded(), min_size=1, max_size=6))
def test_rows_are_the_different_beginnings_of_the_examples_each_once(
    examples: list[Encoded],
) -> None:
    packed = pack(examples)
    beginnings = {
        tuple(e.tokens[:end].tolist()) for e in examples for end in range(1, len(e.tokens))
    }
    assert len(packed.tokens) == len(beginnings)
    seen = set()
    stop = 0
    for span in packed.spans:
        assert span.start == stop < span.stop
        stop = span.stop
        rows = [*span.shared.tolist(), *range(span.start, span.stop)]
        assert packed.positions[rows].tolist() == list(range(len(rows)))
        whole = packed.tokens[rows].tolist()
        seen |= {tuple(whole[:end]) for end in range(1, len(whole) + 1)}
        assert all(row < span.start for row in span.shared)
    assert stop == len(packed.tokens)
    assert seen == beginnings


@given(st.lists(encoded(), min_size=1, max_size=6))
def test_every_response_token_is_predicted_from_its_own_beginning(examples: list[Encoded]) -> None:
    packed = pack(examples)
    beginning_of = {}
    for span in packed.spans:
        rows = [*span.shared.tolist(), *range(span.start, span.stop)]
        for end, row in enumerate(rows, 1):
            beginning_of[row] = packed.tokens[rows[:end]].tolist()
    asked = [
        (e.tokens[:place].tolist(), int(e.tokens[place]))
        for e in examples
        for place in range(e.response_start, len(e.tokens))
    ]
    answered = [
        (beginning_of[row], target)
        for row, target in zip(packed.places.tolist(), packed.targets.tolist(), strict=True)
    ]
    assert answered == asked


@given(st.lists(encoded(), min_size=1, max_size=6))
def test_sharing_changes_no_prediction_and_no_count(examples: list[Encoded]) -> None:
    shared, apart = pack(examples), pack(examples, share=False)
    assert predictions(shared) == predictions(apart)
    assert shared.real_tokens == apart.real_tokens == sum(len(e.tokens) for e in examples)
    assert len(apart.tokens) == shared.real_tokens - len(examples)


@pytest.mark.parametrize(
    ("most", "expected"),
    [
        (None, [[3, 5, 2, 9, 4]]),
        (100, [[3, 5, 2, 9, 4]]),
        (10, [[3, 5, 2], [9], [4]]),
        (8, [[3, 5], [2], [9], [4]]),
        (1, [[3], [5], [2], [9], [4]]),
    ],
)
def test_parts_of_a_batch_hold_at_most_so_many_tokens_in_order(
    most: int | None, expected: list[list[int]]
) -> None:
    examples = [example(list(range(length))) for length in (3, 5, 2, 9, 4)]
    parts = [[len(e.tokens) for e in part] for part in micro_batches(examples, most)]
    assert parts == expected
