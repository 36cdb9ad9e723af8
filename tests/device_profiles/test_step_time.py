"""Seconds of a step are work over rate, part by part; only what takes longer makes it longer."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from device_profiles.errors import InputError
from device_profiles.modules import BaseShape
from device_profiles.step_model import Pass, StepShape, trainable_parameters
from device_profiles.step_products import pass_flops, products
from device_profiles.step_time import (
    OTHER_MOVES,
    PRODUCT_MOVES,
    UNPACKED_BYTES,
    Machine,
    step_seconds,
)

SHAPE = StepShape(
    base=BaseShape(layers=12, width=768, inner=3072),
    heads=12,
    vocabulary=50_257,
    positions=1024,
    adapter_size=10,
    placement="wide",
    lora_rank=96,
)
PASS = Pass(examples=4, tokens=129, response=128)  # 512 rows, all of which predict
ENDLESS = 1e30


def test_products_are_those_of_the_published_formula() -> None:
    # 4 N + 6 (A + L) + 12 layers T D a token, of which N leaves the positions' table out; the
    # first block's query, key and value pass no gradient down.
    weights = 12 * 12 * 768**2 + 50_257 * 768
    trained = trainable_parameters(SHAPE, 24) - 12 * 3 * (10 + 768)  # biases are no products
    a_token = 4 * weights + 6 * trained + 12 * 12 * 128 * 768 - 2 * 3 * 768**2 - 2 * 768 * 96
    assert pass_flops(SHAPE, 24, PASS) == 512 * a_token


@pytest.mark.parametrize(("count", "mflop"), [(12, 533), (24, 560), (36, 587)])
def test_products_are_what_is_published_for_gpt2_small(count: int, mflop: int) -> None:
    # The published figure counts a token's whole share of the base, positions included.
    assert pass_flops(SHAPE, count, PASS) / 512 / 1e6 == pytest.approx(mflop, rel=0.015)


def test_at_endless_bandwidth_a_step_takes_its_products() -> None:
    machine = Machine(flops=1e11, bandwidth=ENDLESS, overhead_seconds=0.0)
    found = step_seconds(SHAPE, 24, PASS, machine)
    assert found.total == pytest.approx(pass_flops(SHAPE, 24, PASS) / 1e11)


def test_at_an_endless_rate_a_step_takes_what_moves() -> None:
    machine = Machine(flops=ENDLESS, bandwidth=1e10, overhead_seconds=0.0)
    found = step_seconds(SHAPE, 24, PASS, machine)
    moved = sum(product.bytes for product in products(SHAPE, 24, PASS))
    assert found.products == pytest.approx(PRODUCT_MOVES * moved / 1e10)
    assert found.overhead == 0.0
    assert found.total == pytest.approx(found.products + found.moves)


def test_a_product_moves_its_operands_and_its_result() -> None:
    # scores of 48 heads: 128 rows of 64 by 64 columns of 128
    scores = [p for p in products(SHAPE, 0, PASS) if (p.rows, p.inner, p.columns) == (128, 64, 128)]
    # on the way there, and as gradient on the way back but for the first block, which needs none
    assert sum(p.times for p in scores) == (12 + 11) * 48
    assert scores[0].bytes == scores[0].times * 4 * (128 * 64 + 64 * 128 + 128 * 128)
    added = next(p for p in products(SHAPE, 12, PASS) if p.added and p.inner == 96)
    assert added.bytes == added.times * 4 * (
        added.rows * 96 + 96 * added.columns + 2 * added.rows * added.columns
    )


def test_an_optimiser_step_is_taken_once_however_many_passes_there_are() -> None:
    machine = Machine(flops=1e11, bandwidth=1e10)
    one, four = (step_seconds(SHAPE, 24, PASS, machine, passes=n) for n in (1, 4))
    state = 11 * 4 * trainable_parameters(SHAPE, 24) / 1e10
    assert four.products == pytest.approx(4 * one.products)
    assert four.overhead == pytest.approx(4 * one.overhead)
    assert four.moves - state == pytest.approx(4 * (one.moves - state))


def test_unpacking_touches_every_matrix_on_both_ways_and_the_head_for_each_part_of_it() -> None:
    machine = Machine(flops=1e11, bandwidth=1e10)
    blocks, head = 12 * 12 * 768**2, 50_257 * 768
    first = 3 * 768**2  # the first block's query, key and value, on the way back
    parts = 4  # 512 rows of logits, at most 2**23 numbers at once
    touched = 2 * blocks - first + 2 * parts * head
    for precision, moved in UNPACKED_BYTES.items():
        found = step_seconds(SHAPE, 24, PASS, machine, precision=precision)
        assert found.unpacking == pytest.approx(moved * touched / 1e10)


@pytest.mark.parametrize(
    ("precision", "passes"), [("fp32", 0), ("bf16", 2), ("int8", 3), ("nf4", 2)]
)
def test_a_result_of_an_unpacked_weight_is_gone_over_besides(precision: str, passes: int) -> None:
    machine = Machine(flops=1e11, bandwidth=1e10)
    # there: three, one, four and one times the width a block, and a word's logits; back: once each
    # and four times for what the blocks' last product was given, but not in the first block's first
    results = 512 * (12 * (9 + 7) * 768 - 768 + 50_257 + 768)
    dense, held = (step_seconds(SHAPE, 24, PASS, machine, precision=p) for p in ("fp32", precision))
    assert held.moves - dense.moves == pytest.approx(passes * OTHER_MOVES * 4 * results / 1e10)
    assert (held.products, held.overhead) == (dense.products, dense.overhead)


@given(
    st.sampled_from(["fp32", "int8", "nf4"]),
    st.integers(0, 35),
    st.integers(1, 8),
    st.integers(2, 300),
    st.booleans(),
)
def test_more_work_never_takes_less(
    precision: str, count: int, examples: int, tokens: int, checkpoint: bool
) -> None:
    machine = Machine(flops=1e11, bandwidth=1e10)
    pass_ = Pass(examples=examples, tokens=tokens, response=(tokens + 1) // 2)

    def seconds(count: int, pass_: Pass, *, checkpoint: bool) -> float:
        return step_seconds(
            SHAPE, count, pass_, machine, precision=precision, checkpoint=checkpoint
        ).total

    now = seconds(count, pass_, checkpoint=checkpoint)
    assert seconds(count + 1, pass_, checkpoint=checkpoint) > now
    assert seconds(count, replace(pass_, examples=examples + 1), checkpoint=checkpoint) > now
    assert seconds(count, replace(pass_, tokens=tokens + 1), checkpoint=checkpoint) > now
    assert seconds(count, pass_, checkpoint=True) >= now


@pytest.mark.parametrize(
    "values",
    [
        {"examples": 0, "tokens": 9, "response": 1},
        {"examples": 1, "tokens": 9, "response": 9},
        {"examples": 1, "tokens": 9, "response": 0},
    ],
)
def test_a_pass_that_cannot_be_is_refused(values: dict[str, int]) -> None:
    with pytest.raises(InputError, match="at least 1 example, and a response"):
        Pass(**values)
