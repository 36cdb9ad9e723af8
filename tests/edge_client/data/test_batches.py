"""Padding and order of batches."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from device_profiles.seeds import stream
from edge_client.data.batches import make_batch, training_order
from edge_client.data.prompts import Encoded


def encoded(tokens: list[int], response_start: int) -> Encoded:
    """Return an example."""
    return Encoded(tokens=np.array(tokens, dtype=np.int64), response_start=response_start)


def test_rows_are_padded_on_the_right_and_responses_are_predicted_from_one_place_before() -> None:
    batch = make_batch([encoded([5, 6, 7, 8, 0], 3), encoded([9, 4, 0], 1)], pad=0)
    assert batch.tokens.tolist() == [[5, 6, 7, 8, 0], [9, 4, 0, 0, 0]]
    # 8 is predicted where 7 stands, the end where 8 stands; nothing where the padding is
    assert batch.places.int().tolist() == [[0, 0, 1, 1, 0], [1, 1, 0, 0, 0]]
    assert batch.targets.tolist() == [8, 0, 4, 0]


def test_targets_stand_in_the_order_of_the_places() -> None:
    examples = [encoded(list(range(10 * i, 10 * i + i + 2)), 1) for i in range(1, 5)]
    batch = make_batch(examples, pad=99)
    shifted = batch.tokens.roll(-1, dims=1)
    assert shifted[batch.places].tolist() == batch.targets.tolist()


@given(
    examples=st.integers(1, 12),
    steps=st.integers(1, 20),
    share=st.floats(0, 1),
    seed=st.integers(0, 2**31),
)
def test_each_example_comes_once_before_any_comes_again(
    examples: int, steps: int, share: float, seed: int
) -> None:
    batch_size = max(1, round(share * examples))
    batches = list(training_order(examples, steps, batch_size, stream(seed, "order")))
    assert [len(batch) for batch in batches] == [batch_size] * steps
    line = [index for batch in batches for index in batch]
    for start in range(0, len(line), examples):
        epoch = line[start : start + examples]
        assert len(set(epoch)) == len(epoch)
        assert set(epoch) <= set(range(examples))


def test_every_epoch_has_an_order_of_its_own_and_the_seed_fixes_them() -> None:
    def line(seed: int) -> list[int]:
        return [i for batch in training_order(20, 10, 4, stream(seed, "order")) for i in batch]

    assert line(0) == line(0)
    assert line(0) != line(1)
    assert line(0)[:20] != line(0)[20:]
    assert line(0)[:20] != list(range(20))


def test_the_first_steps_do_not_depend_on_how_many_follow() -> None:
    few = list(training_order(7, 3, 2, stream(1, "order")))
    many = list(training_order(7, 9, 2, stream(1, "order")))
    assert many[:3] == few


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_batch_may_run_over_the_end_of_an_epoch(batch_size: int) -> None:
    batches = list(training_order(2, 6, batch_size, stream(0, "order")))
    counts = np.bincount([i for batch in batches for i in batch], minlength=2)
    assert counts.tolist() == [3 * batch_size, 3 * batch_size]
