"""How long a training step of the packed model takes.

Pure arithmetic: the products of ``step_products`` at the machine's rate, with their operands moved
through its memory; the numbers that everything else reads and writes; what unpacking a quantised
base takes; and what starting the operations takes. SI units: bytes, seconds.

Four constants are fitted, to user time of single passes by ``benchmarks/planning.py`` (GPT-2
small's shape and ``mini``, one thread of a Xeon with AVX-512, torch 2.13). ``bf16`` is not fitted:
it is taken to cost what int8 does, with a byte more to read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from device_profiles.step_model import (
    HEAD_CHUNK_NUMBERS,
    NUMBER_BYTES,
    Pass,
    StepShape,
    trainable_parameters,
)
from device_profiles.step_products import block_work, products

#: Fitted. How often a product's operands and results go through memory: packing moves some twice.
PRODUCT_MOVES = 1.4
#: Fitted. How much of what other operations read and write goes through memory and not a cache.
OTHER_MOVES = 0.65
#: Fitted. Of a pass: what Python and torch take to start its operations.
PASS_OVERHEAD_SECONDS = 0.0117
#: Fitted, but for fp32 and bf16. Unpacking a weight of a matrix for one product, as bytes moved.
UNPACKED_BYTES = {"fp32": 0.0, "bf16": 3.1, "int8": 2.1, "nf4": 8.8}

#: A product with an unpacked weight goes over its result for the bias, or for zeros and a sum;
#: with int8 a scale is in its way too.
_PASSES_OVER_RESULT = {"fp32": 0, "bf16": 2, "int8": 3, "nf4": 2}
_STATE_MOVES = 11  # of each trainable number: cleared, norm, clipped, AdamW (reads 4, writes 3)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What computes a step.

    Attributes:
        flops: FLOP/s, sustained, of large fp32 products, > 0.
        bandwidth: Of memory, bytes read and bytes written counted each, > 0.
        overhead_seconds: Of a pass, besides, >= 0.
    """

    flops: float
    bandwidth: float
    overhead_seconds: float = PASS_OVERHEAD_SECONDS


@dataclass(frozen=True, kw_only=True)
class StepSeconds:
    """Seconds of a training step, by what they are for.

    Attributes:
        products: Matrix products.
        moves: Norms, activations, sums and the optimiser.
        unpacking: The base, from its precision to fp32.
        overhead: The rest of each pass.
    """

    products: float
    moves: float
    unpacking: float
    overhead: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.products + self.moves + self.unpacking + self.overhead


def step_seconds(
    shape: StepShape,
    lora_count: int,
    pass_: Pass,
    machine: Machine,
    *,
    passes: int = 1,
    precision: str = "fp32",
    checkpoint: bool = False,
) -> StepSeconds:
    """Return how long an optimiser step takes.

    Args:
        shape: Base and modules.
        lora_count: LoRA modules that train.
        pass_: What goes through at once.
        machine: What computes it.
        passes: How often that is, >= 1: gradient accumulation.
        precision: Of the base.
        checkpoint: Whether blocks are computed a second time on the way back.

    Raises:
        InputError: If placement or count are unknown or do not fit the base.
    """
    multiplied = moved = unpacked = 0.0
    other = _moves(shape, lora_count, pass_, checkpoint=checkpoint)
    chunks = math.ceil(pass_.wanted * shape.vocabulary / HEAD_CHUNK_NUMBERS)
    for product in products(shape, lora_count, pass_, checkpoint=checkpoint):
        multiplied += product.flops
        moved += product.bytes
        if product.frozen:
            head = shape.vocabulary in (product.inner, product.columns)
            unpacked += product.times * product.inner * product.columns * (chunks if head else 1)
            other += _PASSES_OVER_RESULT[precision] * product.times * product.rows * product.columns
    state = NUMBER_BYTES * _STATE_MOVES * trainable_parameters(shape, lora_count)
    copied = 1 / machine.bandwidth
    return StepSeconds(
        products=passes * (multiplied / machine.flops + PRODUCT_MOVES * moved * copied),
        moves=(passes * OTHER_MOVES * NUMBER_BYTES * other + state) * copied,
        unpacking=passes * UNPACKED_BYTES[precision] * unpacked * copied,
        overhead=passes * machine.overhead_seconds,
    )


def _moves(shape: StepShape, lora_count: int, pass_: Pass, *, checkpoint: bool) -> float:
    """Return the numbers that are read and written outside of products, in a pass."""
    width, inner = shape.base.width, shape.base.inner
    attention = pass_.examples * shape.heads * pass_.length**2
    total = 3.0 * pass_.wanted * shape.vocabulary  # logits: shifted, to a power, gradient
    for block in block_work(shape, lora_count, pass_):
        own, rows = pass_.rows, block.rows
        forward = own * 4 * width + 2 * attention  # norm, mixed values; softmax
        forward += rows * (8 * width + 3 * inner)  # norm, two sums; activation and slope
        backward = rows * (9 * width + 3 * inner) + own * 13 * width + 5 * attention
        if shape.adapter_size:
            forward += rows * 11 * width  # three sums of up's bias, a copy, hidden rows
            backward += rows * 9 * width
        total += forward * (1 + (checkpoint and block.trains)) + backward * block.trains
    return total
