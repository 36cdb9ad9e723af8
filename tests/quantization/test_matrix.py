"""Frozen matrices: products with what they hold, whatever that is, and how it is rounded."""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from device_profiles.seeds import stream
from edge_client.peft.memory_count import MemoryCount
from quantization.backends import stored
from quantization.backends.bf16 import hold_bf16
from quantization.backends.dense import Fp32Matrix, hold_fp32
from quantization.backends.int8 import (
    hold_int8,
    hold_int8_dynamic,
    hold_int8_dynamic_head,
    round_rows,
)
from quantization.backends.nf4 import LEVELS, hold_nf4, round_blocks
from quantization.backends.nf4_bitsandbytes import hold_nf4_bitsandbytes
from quantization.matrix import FrozenMatrix
from quantization.precision import PRECISIONS

EXACT = [("fp32", "torch"), ("bf16", "torch"), ("int8", "torch"), ("nf4", "torch")]
EXACT += [("nf4", "bitsandbytes")]
ALL = [*EXACT, ("int8-dynamic", "torch")]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SHAPES = [(48, 128), (150, 80), (3, 1)]  # 80 and 1 are no whole blocks of nf4

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


def draw(*shape: int, words: str = "", scale: float = 1.0) -> Tensor:
    """Return normal numbers, fp32, the same at each call."""
    values = stream(0, "matrix", words, *shape).standard_normal(shape)
    return torch.tensor(scale * values, dtype=torch.float32)


def hold(precision: str, backend: str, weight: Tensor, device: str = "cpu") -> FrozenMatrix:
    """Hold a weight, or skip where that cannot run; not where it runs and is wrong."""
    row = next(row for row in PRECISIONS[precision].backends if row.name == backend)
    if device not in row.devices:
        pytest.skip(f"{precision} is not for {device}")
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch sees no GPU")
    if row.package is not None and importlib.util.find_spec(row.package) is None:
        pytest.skip(f"{row.package} is not installed")
    if row.processors and torch.backends.cpu.get_cpu_capability() not in row.processors:
        pytest.skip(f"{precision} is for {' or '.join(row.processors)}")
    return row.hold(weight, device)


@pytest.fixture
def small_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut every weight into parts of a few rows."""
    monkeypatch.setattr(stored, "SCRATCH_ELEMENTS", 300)


def close(found: Tensor, expected: Tensor, size: Tensor) -> bool:
    """Return whether a product of fp32 is right to rounding.

    ``size`` is the product of the magnitudes: a sum of at most 150 terms is off by no more than
    150 half units in the last place of it, and a few more for scales and bias.
    """
    bound = 160 * 2.0**-24 * size.to(torch.float64) + 1e-30
    return bool(((found.to(torch.float64) - expected).abs() <= bound).all())


# -- products --------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("precision", "backend"), EXACT)
def test_products_both_ways_are_those_of_the_dequantised_weight(
    precision: str, backend: str, shape: tuple[int, int], device: str
) -> None:
    outputs, inputs = shape
    matrix = hold(precision, backend, draw(*shape), device)
    assert (matrix.outputs, matrix.inputs) == shape
    dense = matrix.dense().cpu().double()
    assert dense.shape == shape
    for n in (1, 7):
        x, g, bias = draw(n, inputs), draw(n, outputs, words="g"), draw(outputs, words="bias")
        size = x.abs() @ dense.abs().T.float()
        product = matrix.times(x.to(device))
        assert product.dtype == torch.float32
        assert close(product.cpu(), x.double() @ dense.T, size)
        product = matrix.times(x.to(device), bias.to(device))
        expected = x.double() @ dense.T + bias.double()
        assert close(product.cpu(), expected, size + bias.abs())
        gradient = matrix.times_transposed(g.to(device))
        assert close(gradient.cpu(), g.double() @ dense, g.abs() @ dense.abs().float())


@pytest.mark.parametrize("shape", SHAPES[:2])
def test_dynamic_products_are_off_by_no_more_than_the_rounding_of_the_batch(
    shape: tuple[int, int],
) -> None:
    outputs, inputs = shape
    matrix = hold("int8-dynamic", "torch", draw(*shape))
    dense = matrix.dense().double()
    for n in (1, 7):
        x, g, bias = draw(n, inputs), draw(n, outputs, words="g"), draw(outputs, words="bias")
        # Each number of a row is off by at most half a step, and a step is 1/127 of the largest.
        # 1.001 leaves room for the rounding of fp32.
        half = x.abs().amax(1, keepdim=True) / 254
        bound = 1.001 * (half * dense.abs().sum(1)).double() + 1e-6
        error = (matrix.times(x, bias) - (x.double() @ dense.T + bias)).abs()
        assert (error <= bound).all()
        assert error.max() > bound.max() / 1000  # it does round the batch
        # A row of the gradient is multiplied by the weight's scales before it is rounded: entry
        # i is off by half a step of the row over scale i, and the weight's row i is scale i of
        # at most 127 steps, so the scales cancel.
        scales = dense.abs().amax(1) / 127
        steps = (g.double() * scales).abs().amax(1, keepdim=True) / 254
        codes = (dense / scales[:, None]).abs().sum(0)
        assert (
            (matrix.times_transposed(g) - g @ dense.float()).abs() <= 1.001 * steps * codes + 1e-6
        ).all()


def test_a_head_in_dynamic_int8_multiplies_gradients_without_rounding_them() -> None:
    hold("int8-dynamic", "torch", draw(2, 2))  # skips where it does not run
    matrix = hold_int8_dynamic_head(draw(150, 80), "cpu")
    g = draw(7, 150)
    g[:, 3] = 1000.0  # beside which int8 would lose all others
    dense = matrix.dense()
    expected = g.double() @ dense.double()
    assert close(matrix.times_transposed(g), expected, g.abs() @ dense.abs())
    rounded = hold_int8_dynamic(draw(150, 80), "cpu").times_transposed(g)
    assert not close(rounded, expected, g.abs() @ dense.abs())


@pytest.mark.parametrize(("precision", "backend"), ALL)
def test_a_batch_without_rows_gives_none(precision: str, backend: str) -> None:
    matrix = hold(precision, backend, draw(48, 128))
    assert matrix.times(draw(0, 128), draw(48)).shape == (0, 48)
    assert matrix.times_transposed(draw(0, 48)).shape == (0, 128)


@pytest.mark.parametrize("stride", [0, 1, 5])
def test_a_batch_of_one_row_is_multiplied_whatever_its_stride(stride: int) -> None:
    matrix = hold("int8-dynamic", "torch", draw(48, 128))
    x = draw(1, 128)
    assert torch.equal(matrix.times(x.as_strided((1, 128), (stride, 1))), matrix.times(x))


@pytest.mark.parametrize("shape", [(3, 1), (1, 3)])
def test_dynamic_int8_refuses_a_shape_that_torch_multiplies_wrongly(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="one row or column; take precision int8"):
        hold_int8_dynamic(draw(*shape), "cpu")


@pytest.mark.parametrize("order", ["rows", "columns"])
@pytest.mark.parametrize(("precision", "backend"), ALL)
def test_the_order_in_memory_of_a_weight_does_not_matter(
    precision: str, backend: str, order: str
) -> None:
    weight = draw(48, 128)
    given = weight if order == "rows" else weight.T.contiguous().T
    matrix = hold(precision, backend, given)
    assert torch.equal(matrix.dense(), hold(precision, backend, weight.clone()).dense())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("precision", "backend"), ALL)
def test_a_weight_in_half_precision_is_held_as_its_fp32_value(
    precision: str, backend: str, dtype: torch.dtype
) -> None:
    weight = draw(48, 128).to(dtype)
    matrix = hold(precision, backend, weight)
    assert torch.equal(matrix.dense(), hold(precision, backend, weight.float()).dense())
    assert matrix.dense().dtype == torch.float32


@pytest.mark.usefixtures("small_scratch")
@pytest.mark.parametrize(("precision", "backend"), ALL)
def test_a_weight_in_many_parts_is_the_weight_in_one(
    precision: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, x, g = draw(150, 80), draw(7, 80), draw(7, 150)
    many = hold(precision, backend, weight)
    found = (many.dense(), many.times(x), many.times_transposed(g))
    monkeypatch.undo()
    one = hold(precision, backend, weight)
    assert torch.equal(found[0], one.dense())
    dense = one.dense().abs()
    assert close(found[1], one.times(x).double(), x.abs() @ dense.T)
    assert close(found[2], one.times_transposed(g).double(), g.abs() @ dense)


# -- looking rows up -------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("precision", "backend"), EXACT)
def test_rows_are_those_of_the_dequantised_weight(
    precision: str, backend: str, shape: tuple[int, int], device: str
) -> None:
    matrix = hold(precision, backend, draw(*shape), device)
    index = torch.tensor([2, 0, 2, 1], device=device)
    assert torch.equal(matrix.rows(index), matrix.dense()[index])
    assert matrix.rows(index[:0]).shape == (0, shape[1])


@pytest.mark.parametrize(("precision", "backend"), ALL)
def test_a_lookup_unpacks_only_its_rows(precision: str, backend: str) -> None:
    matrix = hold(precision, backend, draw(1000, 64))
    index = torch.tensor([999, 5])
    with MemoryCount() as count:
        matrix.rows(index)
    assert 0 < count.largest_bytes <= 2 * 64 * 8  # two rows, their codes as indices of 8 bytes


@pytest.mark.parametrize(("precision", "backend"), [pair for pair in EXACT if pair[0] != "fp32"])
def test_a_product_unpacks_a_part_of_the_weight_at_a_time(
    precision: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored, "SCRATCH_ELEMENTS", 64 * 50)
    monkeypatch.setattr(stored, "_local", threading.local())  # no scratch yet
    matrix = hold(precision, backend, draw(1000, 64))
    x, g = draw(2, 64), draw(2, 1000)
    with MemoryCount() as count:
        matrix.times(x)
        matrix.times_transposed(g)
    # A part in fp32 is 12,800 bytes, and the next may be made before the last is dropped; its
    # codes as indices of pairs are 6,400, product and scaled gradient 8,000 each.
    assert count.largest_bytes == 12_800
    assert count.peak_bytes <= 2 * 12_800 + 6_400 + 2 * 8_000 + 1_000


# -- rounding --------------------------------------------------------------------------------------


def test_fp32_is_the_weight_itself() -> None:
    weight = draw(48, 128)
    assert hold_fp32(weight, "cpu").dense().data_ptr() == weight.data_ptr()
    assert hold_fp32(weight, "cpu").nbytes == 4 * 48 * 128


def test_bf16_is_the_weight_rounded_to_bf16() -> None:
    weight = draw(48, 128)
    assert torch.equal(hold_bf16(weight, "cpu").dense(), weight.bfloat16().float())
    assert hold_bf16(weight, "cpu").nbytes == 2 * 48 * 128


def test_int8_has_127_steps_to_the_largest_of_a_row() -> None:
    # Row 0: a step is 2.54 / 127 = 0.02, so -1.0 is step -50 and 0.031 is 1.55 steps.
    rows = torch.tensor([[2.54, -1.0, 0.031], [0.0, 0.0, 0.0], [-127.0, 63.4, 0.0]])
    codes, scale = round_rows(rows)
    assert codes.dtype == torch.int8
    assert codes.tolist() == [[127, -50, 2], [0, 0, 0], [-127, 63, 0]]
    torch.testing.assert_close(scale[[0, 2]], torch.tensor([0.02, 1.0]))
    assert torch.equal(hold_int8(rows, "cpu").dense()[1], torch.zeros(3))


def test_int8_is_off_by_half_a_step_at_most() -> None:
    weight = draw(150, 80)
    error = (hold_int8(weight, "cpu").dense() - weight).abs()
    half = weight.abs().amax(1, keepdim=True) / 254
    assert (error <= 1.0001 * half).all()  # room for the rounding of fp32
    assert (error.amax(1, keepdim=True) > 0.5 * half).all()


@pytest.mark.parametrize("hold_it", [hold_int8, hold_int8_dynamic, hold_int8_dynamic_head])
def test_int8_takes_a_byte_a_weight_and_four_a_row(
    hold_it: Callable[[Tensor, str], FrozenMatrix],
) -> None:
    assert hold_it(draw(48, 128), "cpu").nbytes == 48 * 128 + 48 * 4


@needs_bitsandbytes
def test_int8_rounds_as_bitsandbytes_does() -> None:
    functional = _bitsandbytes()
    weight = draw(150, 80)
    codes, largest, _ = functional.int8_vectorwise_quant(weight.half())
    found, scale = round_rows(weight.half().float())
    # It multiplies by 127 / largest where here is a division; a number that lies between two steps
    # to the last bit may go either way.
    assert (found.int() - codes.int()).abs().max() <= 1
    assert (found != codes).float().mean() < 1e-3
    torch.testing.assert_close(scale, largest.float() / 127)


def test_nf4_takes_the_nearest_of_its_levels() -> None:
    block = torch.zeros(64)
    block[:4] = torch.tensor([-2.0, 1.0, 0.0, 0.1])  # relative to the largest, 2: -1, .5, 0, .05
    codes, scales = round_blocks(torch.stack([block, torch.zeros(64)]))
    # .5 is nearer to .4407 (level 12) than to .5626; .05 is nearer to .0796 (level 8) than to 0
    assert codes[0, :2].tolist() == [0 << 4 | 12, 7 << 4 | 8]
    assert scales.tolist() == [[2.0], [0.0]]
    assert codes[1].tolist() == [7 << 4 | 7] * 32
    dense = hold_nf4(torch.stack([block, torch.zeros(64)]), "cpu").dense()
    expected = torch.tensor([-2.0, 2 * LEVELS[12], 0.0, 2 * LEVELS[8]])
    torch.testing.assert_close(dense[0, :4], expected)
    assert not dense[1].any()


def test_nf4_takes_half_a_byte_a_weight_and_four_a_block() -> None:
    assert hold_nf4(draw(48, 128), "cpu").nbytes == 48 * (64 + 2 * 4)
    assert hold_nf4(draw(48, 80), "cpu").nbytes == 48 * (64 + 2 * 4)  # padded to two blocks


def test_no_other_level_of_nf4_is_nearer() -> None:
    weight = draw(20, 128)
    dense = hold_nf4(weight, "cpu").dense().view(20, 2, 64)
    blocks = weight.view(20, 2, 64)
    largest = blocks.abs().amax(2, keepdim=True)
    nearest = (blocks[..., None] - largest[..., None] * torch.tensor(LEVELS)).abs().amin(3)
    torch.testing.assert_close((dense - blocks).abs(), nearest, rtol=0, atol=1e-6)


@needs_bitsandbytes
def test_nf4_rounds_as_bitsandbytes_does() -> None:
    functional = _bitsandbytes()
    weight = draw(48, 128)
    packed, state = functional.quantize_4bit(weight, quant_type="nf4", blocksize=64)
    codes, scales = round_blocks(weight)
    assert torch.equal(scales.flatten(), state.absmax)
    assert torch.equal(codes.flatten(), packed.flatten())
    assert torch.equal(hold_nf4(weight, "cpu").dense(), functional.dequantize_4bit(packed, state))


@needs_bitsandbytes
@pytest.mark.parametrize("shape", SHAPES)
def test_backends_of_nf4_give_the_same_weights_to_the_bit(shape: tuple[int, int]) -> None:
    other = hold("nf4", "bitsandbytes", draw(*shape))
    assert torch.equal(other.dense(), hold_nf4(draw(*shape), "cpu").dense())
    assert other.nbytes == hold_nf4(draw(*shape), "cpu").nbytes


def _bitsandbytes() -> Any:
    hold_nf4_bitsandbytes(draw(1, 64), "cpu")  # imports it quietly
    import bitsandbytes.functional

    return bitsandbytes.functional


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("hold_it", [hold_int8, hold_int8_dynamic, hold_nf4])
def test_a_weight_that_is_no_finite_number_is_not_rounded_to_one(
    hold_it: Callable[[Tensor, str], FrozenMatrix], bad: float
) -> None:
    weight = draw(48, 128)
    weight[11, 70] = bad
    with pytest.raises(ValueError, match="not a finite number"):
        hold_it(weight, "cpu")


def test_what_is_not_a_number_in_a_batch_stays_none_in_dynamic_int8() -> None:
    matrix = hold("int8-dynamic", "torch", draw(48, 128))
    x = draw(3, 128)
    x[1, 5] = float("nan")
    assert matrix.times(x).isnan().all(1).tolist() == [False, True, False]


# -- training through it ---------------------------------------------------------------------------


class Product(torch.autograd.Function):
    """A frozen matrix as autograd sees it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: FrozenMatrix) -> Tensor:  # noqa: D102
        ctx.matrix = matrix
        return matrix.times(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # noqa: D102
        return ctx.matrix.times_transposed(grads[0]), None


def gradients(product: Callable[[Tensor, int], Tensor]) -> Iterator[Tensor]:
    """Train an adapter and LoRA factors around two frozen products; yield their gradients."""
    small = [draw(8, 64, words="a"), draw(96, 8, words="b"), draw(96, 4), draw(4, 96)]
    trainable = [(0.2 * t).requires_grad_() for t in small]
    down, up, squeeze, spread = trainable
    x = draw(11, 64, words="x")
    h = product(x, 0) + x @ down.T @ up.T  # LoRA
    h = h + torch.nn.functional.gelu(h @ squeeze) @ spread  # an adapter
    loss = product(h, 1).square().mean()
    yield from torch.autograd.grad(loss, trainable)


@pytest.mark.parametrize(("precision", "backend"), EXACT)
def test_gradients_through_a_frozen_base_are_those_through_its_dequantised_weights(
    precision: str, backend: str
) -> None:
    weights = [draw(96, 64, scale=0.1), draw(40, 96, scale=0.1)]
    held = [hold(precision, backend, weight) for weight in weights]
    found = gradients(lambda x, i: Product.apply(x, held[i]))
    expected = gradients(lambda x, i: x @ held[i].dense().T)
    for one, other in zip(found, expected, strict=True):
        # The same sums in another order; their length is at most 96, so 1e-5 of the largest is
        # some ten times what fp32 loses.
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * float(other.abs().max()))


# -- threads and modes -----------------------------------------------------------------------------


def test_each_thread_has_a_scratch_buffer_of_its_own() -> None:
    def address() -> int:
        return stored.scratch(2, 3, torch.device("cpu")).data_ptr()

    others: list[int] = []
    thread = threading.Thread(target=lambda: others.append(address()))
    thread.start()
    thread.join()
    assert address() == address()
    assert others[0] != address()


@pytest.mark.parametrize(("precision", "backend"), ALL)
def test_a_matrix_used_in_inference_mode_can_be_trained_through_afterwards(
    precision: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored, "_local", threading.local())  # no scratch yet
    matrix = hold(precision, backend, draw(48, 128))
    with torch.inference_mode():
        matrix.times(draw(2, 128))
        matrix.times_transposed(draw(2, 48))
    x = draw(2, 128).requires_grad_()
    torch.autograd.backward(Product.apply(x, matrix).sum())
    assert x.grad is not None


def test_every_row_of_the_table_of_precisions_is_tried_here() -> None:
    rows = [(name, row.name) for name, held in PRECISIONS.items() for row in held.backends]
    assert sorted(rows) == sorted(ALL)


@pytest.mark.parametrize("rows", [1, 4, 33])
@pytest.mark.parametrize("across", [False, True], ids=["by rows", "transposed"])
def test_very_many_outputs_are_those_of_the_whole_product(rows: int, across: bool) -> None:
    rng = torch.Generator().manual_seed(3)
    weight = torch.randn(9000, 24, generator=rng, dtype=torch.float64)  # 8 parts, and a rest
    if across:
        weight = weight.T.contiguous().T
    x = torch.randn(rows, 24, generator=rng, dtype=torch.float64)
    bias = torch.randn(9000, generator=rng, dtype=torch.float64)
    matrix = Fp32Matrix(weight)
    torch.testing.assert_close(matrix.times(x), x @ weight.T, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(matrix.times(x, bias), x @ weight.T + bias, rtol=1e-12, atol=1e-12)
