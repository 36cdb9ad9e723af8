"""Memory of training: the published figures, and each cause of it apart.

That the sums are those of the real model's tensors is held in tests/edge_client/
test_step_predictions.py.
"""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from device_profiles.errors import InputError
from device_profiles.modules import BaseShape
from device_profiles.step_memory import (
    HOLES_SHARE,
    RUNTIME_BYTES,
    StepMemory,
    base_bytes,
    evaluation_memory,
    in_process,
    training_memory,
)
from device_profiles.step_model import Pass, StepShape, base_parameters

SHAPE = StepShape(
    base=BaseShape(layers=12, width=768, inner=3072),
    heads=12,
    vocabulary=50_257,
    positions=1024,
    adapter_size=10,
    placement="qkv",
    lora_rank=96,
)
PASS = Pass(examples=4, tokens=128, response=64)


def test_gpt2_small_has_its_published_size() -> None:
    assert base_parameters(SHAPE) == 124_439_808
    assert base_bytes(SHAPE, "fp32") == 497_759_232  # 498 MB


def test_precisions_hold_matrices_in_their_codes_and_the_rest_in_fp32() -> None:
    matrices = 50_257 * 768 + 12 * 12 * 768**2
    rest = 4 * (124_439_808 - matrices)
    rows = 50_257 + 12 * (3 * 768 + 768 + 3072 + 768)
    assert base_bytes(SHAPE, "bf16") == 2 * matrices + rest
    assert base_bytes(SHAPE, "int8") == matrices + 4 * rows + rest
    assert base_bytes(SHAPE, "nf4") == matrices // 2 + 4 * matrices // 64 + rest
    with pytest.raises(InputError, match="unknown precision 'int7'"):
        base_bytes(SHAPE, "int7")


def test_nf4_pads_rows_to_whole_blocks() -> None:
    narrow = replace(
        SHAPE, base=BaseShape(layers=1, width=80, inner=64), vocabulary=10, positions=1
    )
    # rows of 80 take 128 codes; the one matrix with 64 inputs takes 64
    rows_of_80, rows_of_64 = 10 + 240 + 80 + 64, 80
    vectors = 9 * 80 + 64 + 80 + 2 * 80
    codes = rows_of_80 * 128 + rows_of_64 * 64
    assert base_bytes(narrow, "nf4") == codes // 2 + 4 * codes // 64 + 4 * vectors


@pytest.mark.parametrize(("count", "lora"), [(12, 1_769_472), (36, 5_308_416)])
def test_a_trained_number_is_held_seven_times(count: int, lora: int) -> None:
    memory = training_memory(SHAPE, count, PASS)
    assert memory.state == 16 * (580_968 + lora)  # value, gradient, two moments
    assert memory.before == 12 * (580_968 + lora)  # value and moments before the round


def test_a_block_keeps_eight_widths_and_a_slope_of_every_row() -> None:
    one, more = (
        training_memory(replace(SHAPE, base=BaseShape(layers=n, width=768, inner=3072)), 0, PASS)
        for n in (5, 6)
    )
    rows = 4 * 127
    # inputs, query, key, value, three of adapters, one of the second norm; narrow rows, means
    numbers = rows * (8 * 768 + 3072 + 6 * 10 + 4) + 4 * 12 * 127**2
    assert more.kept - one.kept == 4 * numbers


def test_the_process_adds_its_runtime_and_holes() -> None:
    memory = training_memory(SHAPE, 24, PASS)
    held = in_process(memory)
    assert held.runtime == RUNTIME_BYTES
    assert held.holes == int(HOLES_SHARE * (memory.kept + memory.working))
    assert held.total == memory.total + held.runtime + held.holes
    assert held.total == sum(getattr(held, field.name) for field in fields(StepMemory))


def test_held_out_results_keep_nothing_and_grow_with_length_alone() -> None:
    memory = evaluation_memory(SHAPE, 24, PASS)
    assert memory.kept == 0
    assert memory == evaluation_memory(SHAPE, 24, replace(PASS, examples=1))
    longer = evaluation_memory(SHAPE, 24, replace(PASS, tokens=256))
    assert longer.working > memory.working
    assert longer.state == memory.state


PASSES = st.builds(
    lambda examples, tokens: Pass(examples=examples, tokens=tokens, response=(tokens + 1) // 2),
    st.integers(1, 8),
    st.integers(2, 300),
)


@given(
    st.sampled_from(["fp32", "int8", "nf4"]),
    st.sampled_from(["qkv", "wide"]),
    st.integers(0, 35),
    PASSES,
    st.booleans(),
)
def test_more_work_never_needs_less_memory(
    precision: str, placement: str, count: int, pass_: Pass, checkpoint: bool
) -> None:
    shape = replace(SHAPE, placement=placement)

    def need(count: int, pass_: Pass) -> tuple[int, int]:
        training = training_memory(shape, count, pass_, precision=precision, checkpoint=checkpoint)
        held_out = evaluation_memory(shape, count, pass_, precision=precision)
        return training.total, held_out.total

    now = need(count, pass_)
    for more in (
        need(count + 1, pass_),
        need(count, replace(pass_, examples=pass_.examples + 1)),
        need(count, replace(pass_, tokens=pass_.tokens + 1)),
    ):
        assert more[0] > now[0]
        assert more[1] >= now[1]


def test_computing_blocks_twice_saves_what_they_keep() -> None:
    kept, twice = (training_memory(SHAPE, 24, PASS, checkpoint=c) for c in (False, True))
    assert twice.kept < 0.3 * kept.kept
    assert twice.total < kept.total
