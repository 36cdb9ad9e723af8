"""What training keeps in memory at its peak.

Pure arithmetic on shapes, counted from the tensors that ``edge_client/peft/packed_network.py`` and
``packed_model.py`` hold: the base, what trains, what the way back needs of the way there, and the
largest working set beside it. Everything but the base is fp32.

Two constants are fitted, to the resident memory that ``benchmarks/planning.py`` measures (GPT-2
small's shape and ``mini``, Linux, torch 2.13); a GPU's own libraries are not part of them.

Units: bytes where a name says so, else numbers of 4 bytes. Shape letters: N rows of a pass, P rows
that predict, D width, M bottleneck size, R rank, V words, H heads, T rows of an example.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from itertools import accumulate

from device_profiles.config_files import choose
from device_profiles.step_model import (
    HEAD_CHUNK_NUMBERS,
    NUMBER_BYTES,
    SCRATCH_NUMBERS,
    Pass,
    StepShape,
    base_matrices,
    base_vectors,
    trainable_parameters,
)
from device_profiles.step_products import BlockWork, block_work

STATE_BYTES = 16  # of a trainable number: value, gradient, two moments
EVALUATED_STATE_BYTES = 8  # of it, while held-out results are computed
BEFORE_BYTES = 12  # of it, until the round is over: value and moments as they were before
EVALUATION_EXAMPLES = 16  # at once

#: Fitted, as are the holes: resident memory of a device's process, torch in it, without a base.
RUNTIME_BYTES = 290_000_000
#: Fitted. What the allocator holds beyond the tensors that come and go, as a share of those.
HOLES_SHARE = 0.2

_CODES_BYTES = {"fp32": 4.0, "bf16": 2.0, "int8": 1.0, "nf4": 0.5}  # of a weight of a matrix
_NF4_BLOCK = 64


@dataclass(frozen=True, kw_only=True)
class StepMemory:
    """Memory of training at its peak, bytes, by what it is for.

    Attributes:
        base: Frozen weights at their precision.
        state: What trains, its gradients and moments.
        before: The same as it was before the round, without gradients.
        kept: What the way back needs of the way there.
        working: The largest set of tensors in passing, beside it; an unpacked weight included.
        runtime: The interpreter and its libraries.
        holes: What the allocator holds between what is kept and in passing (glibc's, mostly).
    """

    base: int
    state: int
    before: int
    kept: int
    working: int
    runtime: int = 0
    holes: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return sum(getattr(self, field.name) for field in fields(self))


def in_process(memory: StepMemory) -> StepMemory:
    """Return the memory of tensors with that of the process around them."""
    holes = int(HOLES_SHARE * (memory.kept + memory.working))
    return replace(memory, runtime=RUNTIME_BYTES, holes=holes)


def base_bytes(shape: StepShape, precision: str) -> int:
    """Return what the frozen base takes at a precision.

    Raises:
        InputError: If the precision is unknown.
    """
    codes = _CODES_BYTES[choose("precision", precision, _CODES_BYTES)]
    total = float(NUMBER_BYTES * base_vectors(shape))
    for outputs, inputs in base_matrices(shape):
        columns = -(-inputs // _NF4_BLOCK) * _NF4_BLOCK if precision == "nf4" else inputs
        total += outputs * columns * codes
        if precision == "nf4":
            total += NUMBER_BYTES * outputs * columns // _NF4_BLOCK
        elif precision == "int8":
            total += NUMBER_BYTES * outputs
    return int(total)


def training_memory(
    shape: StepShape,
    lora_count: int,
    pass_: Pass,
    *,
    precision: str = "fp32",
    checkpoint: bool = False,
) -> StepMemory:
    """Return the memory of a local step at its peak, without the runtime's.

    Args:
        shape: Base and modules.
        lora_count: LoRA modules that train.
        pass_: The largest part of a batch that goes through at once.
        precision: Of the base.
        checkpoint: Whether blocks are computed a second time on the way back.

    Raises:
        InputError: If precision, placement or count are unknown or do not fit the base.
    """
    trainable = trainable_parameters(shape, lora_count)
    phases = _checkpointed if checkpoint else _whole
    kept, working = max(phases(shape, lora_count, pass_, precision), key=sum)
    return StepMemory(
        base=base_bytes(shape, precision),
        state=STATE_BYTES * trainable,
        before=BEFORE_BYTES * trainable,
        kept=NUMBER_BYTES * kept,
        working=NUMBER_BYTES * (working + _always(shape, pass_, precision)),
    )


def evaluation_memory(
    shape: StepShape, lora_count: int, pass_: Pass, *, precision: str = "fp32"
) -> StepMemory:
    """Return the memory of computing held-out results, without the runtime's.

    ``EVALUATION_EXAMPLES`` go through at once, as long as those of ``pass_``; nothing is kept.

    Raises:
        InputError: If precision, placement or count are unknown or do not fit the base.
    """
    many = Pass(examples=EVALUATION_EXAMPLES, tokens=pass_.tokens, response=pass_.response)
    trainable = trainable_parameters(shape, lora_count)
    first = block_work(shape, lora_count, many)[0]
    held = _kept(shape, first, many) - many.rows * shape.base.inner  # no slope
    ends = 2 * many.wanted * shape.base.width
    before = held - 3 * many.rows * shape.base.width  # of the last block, but for its attention
    working = max(
        before + held + _forward(shape, first, many), ends + _loss(shape, many, precision)
    )
    return StepMemory(
        base=base_bytes(shape, precision),
        state=EVALUATED_STATE_BYTES * trainable,
        before=BEFORE_BYTES * trainable,
        kept=0,
        working=NUMBER_BYTES * (working + _always(shape, many, precision)),
    )


def _whole(
    shape: StepShape, lora_count: int, pass_: Pass, precision: str
) -> Iterator[tuple[int, int]]:
    """Yield what is kept and what is in passing where that may be most: each block lets go."""
    blocks = block_work(shape, lora_count, pass_)
    kept = list(accumulate(_kept(shape, block, pass_) for block in blocks))
    ends = 3 * pass_.wanted * shape.base.width  # last hidden states, normalised; their gradient
    yield kept[-1], ends + _loss(shape, pass_, precision)
    for block, held in zip(blocks, kept, strict=True):
        yield held, _forward(shape, block, pass_)
        if block.trains:
            yield held, ends + _backward(shape, block, pass_, precision)


def _checkpointed(
    shape: StepShape, lora_count: int, pass_: Pass, precision: str
) -> Iterator[tuple[int, int]]:
    """Yield the same where the input of each block is kept, and one block at a time."""
    blocks = block_work(shape, lora_count, pass_)
    inputs = pass_.rows * shape.base.width
    ends = 3 * pass_.wanted * shape.base.width
    yield inputs * len(blocks), ends + _loss(shape, pass_, precision)
    above = 0  # the block before on the way back is let go when this one has been computed
    for i, block in reversed(list(enumerate(blocks))):
        held = inputs * i + _kept(shape, block, pass_)
        yield held, _forward(shape, block, pass_)
        if block.trains:
            outward = block.rows * shape.base.width
            yield held + above, ends + outward + _forward(shape, block, pass_)
            yield held, ends + _backward(shape, block, pass_, precision)
        above = _kept(shape, block, pass_)


def _always(shape: StepShape, pass_: Pass, precision: str) -> int:
    """Return the mask and places of attention, and room for an unpacked part of a weight."""
    places = 16 * pass_.rows * shape.heads  # eight for each head of a row, of 8 bytes each
    scratch = min(SCRATCH_NUMBERS, max(a * b for a, b in base_matrices(shape)))
    return _attention(shape, pass_) + places + (0 if precision == "fp32" else scratch)


def _kept(shape: StepShape, block: BlockWork, pass_: Pass) -> int:
    """Return what a block keeps for the way back, its input included."""
    width, inner = shape.base.width, shape.base.inner
    own, rows = pass_.rows, block.rows
    # inputs, query, key and value; what is normalised, the activation's slope; means, deviations
    total = own * (4 * width + 2) + rows * (width + inner + 2)
    total += _attention(shape, pass_)
    if shape.adapter_size:  # what goes in, and the narrow rows before and behind the activation
        total += 3 * rows * (width + 2 * shape.adapter_size)
    for module in block.lora:
        total += (own if module.place == "qkv" else rows) * shape.lora_rank
    # what LoRA multiplies; normalised rows are computed again
    return total + (rows * inner if block.has_lora("mlp_out") else 0)


def _attention(shape: StepShape, pass_: Pass) -> int:
    """Return the attention weights of a pass."""
    return pass_.examples * shape.heads * pass_.length**2


def _forward(shape: StepShape, block: BlockWork, pass_: Pass) -> int:
    """Return the largest working set of a block on the way there, beside what it keeps."""
    width, inner = shape.base.width, shape.base.inner
    # normalised rows, queries, keys and values, mixed values twice; scores
    attention = 6 * pass_.rows * width + _attention(shape, pass_)
    end = block.rows * (3 * width + inner)  # mixed and normalised values, output; what is activated
    end += 0 if block.has_lora("mlp_out") else block.rows * inner
    if not shape.adapter_size:
        end += block.rows * width
    return max(attention - _later(shape, block), end)


def _later(shape: StepShape, block: BlockWork) -> int:
    """Return what a block keeps that is not there yet during its attention."""
    width, rows = shape.base.width, block.rows
    kept = rows * (width + shape.base.inner)
    if shape.adapter_size:
        kept += 3 * rows * width
    return kept + (rows * shape.base.inner if block.has_lora("mlp_out") else 0)


def _loss(shape: StepShape, pass_: Pass, precision: str) -> int:
    """Return the working set of the loss: logits of some rows, and the gradient to those.

    As many rows as ever go at once: they are cut into parts of the same size, so at times fewer do.
    """
    rows = min(pass_.wanted, max(1, HEAD_CHUNK_NUMBERS // shape.vocabulary))
    copies = 2 if precision == "int8" else 1  # its rows' scales go on a copy of the gradient
    return rows * (copies * shape.vocabulary + shape.base.width)


def _backward(shape: StepShape, block: BlockWork, pass_: Pass, precision: str) -> int:
    """Return the largest working set of a block on the way back, beside what is kept."""
    width, inner = shape.base.width, shape.base.inner
    own, rows = pass_.rows, block.rows
    scaled = precision == "int8"  # its rows' scales go on a copy of the gradient
    stages = [rows * ((6 + scaled) * width + inner)]  # up to the second norm
    # gradients: of the output, of the attention's input twice, of the activation, of a norm
    before = 3 * rows * width + rows * inner + own * width
    joint = own * 4 * width  # of the mixed values; of query, key and value
    if not block.lowest or block.has_lora("qkv"):
        # queries, keys, values and the gradients of all and of what they mix; scores, twice
        stages.append(before + joint + 7 * own * width + 2 * _attention(shape, pass_))
    if not block.lowest:
        stages.append(before + joint + own * (1 + 3 * scaled) * width)
        stages.append(before - rows * width + joint + 3 * own * width)
    return max(stages)
