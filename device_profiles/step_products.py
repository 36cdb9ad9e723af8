"""What a training step of the packed model multiplies, block by block.

Pure arithmetic on shapes, counted from ``edge_client/peft/packed_network.py``: a frozen weight
costs a product on the way there and one on the way back, a trainable one a third; the last block
computes the rows that predict a response alone, from its attention on; the lowest block passes no
gradient down. ``step_time`` says how long that takes, ``step_memory`` what it keeps.

FLOP: a multiplication and an addition are two.
Shape letters: N rows of a pass, P rows that predict, D width, M bottleneck size, R rank, V words.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from device_profiles.modules import BaseShape, first_lora_sites
from device_profiles.step_model import NUMBER_BYTES, Pass, StepShape

#: Where a LoRA module's projection is, by the beginning of its path in the block.
_PLACES = {"attn.c_attn": "qkv", "mlp.c_fc": "mlp_in", "mlp.c_proj": "mlp_out"}


class LoraWork(NamedTuple):
    """A LoRA module: the projection that it is on, and its two sizes."""

    place: str
    inputs: int
    outputs: int


@dataclass(frozen=True, kw_only=True)
class BlockWork:
    """A block as a pass meets it.

    Attributes:
        rows: From the output of its attention on: P in the last block, N elsewhere.
        lora: Its LoRA modules.
        trains: Whether a gradient reaches it: it or a block below it trains.
        lowest: Whether nothing below it trains.
    """

    rows: int
    lora: tuple[LoraWork, ...]
    trains: bool
    lowest: bool

    def has_lora(self, place: str) -> bool:
        """Return whether a LoRA module is on that projection."""
        return any(module.place == place for module in self.lora)


class Product(NamedTuple):
    """``times`` products of shapes (rows, inner) and (inner, columns).

    ``frozen`` says that one operand is a weight of the base, ``added`` that the result is added to
    what is there.
    """

    rows: int
    inner: int
    columns: int
    times: int = 1
    frozen: bool = False
    added: bool = False

    @property
    def flops(self) -> int:
        """FLOP of all of them."""
        return 2 * self.times * self.rows * self.inner * self.columns

    @property
    def bytes(self) -> int:
        """Bytes of all operands and results, each moved once."""
        result = (2 if self.added else 1) * self.rows * self.columns
        operands = self.rows * self.inner + self.inner * self.columns
        return NUMBER_BYTES * self.times * (operands + result)


def block_work(shape: StepShape, lora_count: int, pass_: Pass) -> list[BlockWork]:
    """Return the blocks, from the first, that a pass with so many LoRA modules meets.

    Raises:
        InputError: If the base has fewer sites, or the placement is unknown.
    """
    modules = _lora_by_block(shape.base, shape.placement, lora_count)
    last = shape.base.layers - 1
    own = [i for i in range(last + 1) if shape.adapter_size or modules[i]]
    lowest = min(own, default=last + 1)
    return [
        BlockWork(
            rows=pass_.wanted if i == last else pass_.rows,
            lora=modules[i],
            trains=i >= lowest,
            lowest=i == lowest,
        )
        for i in range(last + 1)
    ]


def products(
    shape: StepShape, lora_count: int, pass_: Pass, *, checkpoint: bool = False
) -> Iterator[Product]:
    """Yield the matrix products of a pass, there and back.

    ``checkpoint`` says whether blocks are computed a second time on the way back.

    Raises:
        InputError: See ``block_work``.
    """
    width = shape.base.width
    yield Product(pass_.wanted, width, shape.vocabulary, frozen=True)
    yield Product(pass_.wanted, shape.vocabulary, width, frozen=True)
    for block, count in Counter(block_work(shape, lora_count, pass_)).items():
        again = count * (1 + (checkpoint and block.trains))
        yield from (p._replace(times=again * p.times) for p in _forward(shape, block, pass_))
        if block.trains:
            yield from (p._replace(times=count * p.times) for p in _backward(shape, block, pass_))


def pass_flops(shape: StepShape, lora_count: int, pass_: Pass, *, checkpoint: bool = False) -> int:
    """Return the FLOP of all matrix products of a pass."""
    return sum(p.flops for p in products(shape, lora_count, pass_, checkpoint=checkpoint))


def _forward(shape: StepShape, block: BlockWork, pass_: Pass) -> Iterator[Product]:
    width, inner, rank = shape.base.width, shape.base.inner, shape.lora_rank
    length, rows = pass_.length, block.rows
    size, heads = width // shape.heads, pass_.examples * shape.heads
    yield Product(pass_.rows, width, 3 * width, frozen=True)
    yield Product(length, size, length, heads)  # scores
    yield Product(length, length, size, heads)
    yield Product(rows, width, width, frozen=True)
    yield Product(rows, width, inner, frozen=True)
    yield Product(rows, inner, width, frozen=True)
    if narrow := shape.adapter_size:
        yield Product(rows, width, narrow, 3)
        yield Product(rows, narrow, width, 3, added=True)
    for place, inputs, outputs in block.lora:
        height = pass_.rows if place == "qkv" else rows
        yield Product(height, inputs, rank)
        yield Product(height, rank, outputs, added=True)


def _backward(shape: StepShape, block: BlockWork, pass_: Pass) -> Iterator[Product]:
    width, inner, rank = shape.base.width, shape.base.inner, shape.lora_rank
    length, rows = pass_.length, block.rows
    size, heads = width // shape.heads, pass_.examples * shape.heads
    if narrow := shape.adapter_size:
        yield Product(rows, width, narrow, 3)
        yield Product(width, rows, narrow, 3, added=True)
        yield Product(narrow, rows, width, 3, added=True)
        yield Product(rows, narrow, width, 3, added=True)
    yield Product(rows, width, inner, frozen=True)
    yield Product(rows, inner, width, frozen=True)
    if not block.lowest or block.has_lora("qkv"):
        yield Product(rows, width, width, frozen=True)
        yield Product(length, size, length, heads)  # gradient of the weights
        yield Product(length, length, size, 3 * heads)  # of queries, keys and values
    if not block.lowest:
        yield Product(pass_.rows, 3 * width, width, frozen=True)
    for place, inputs, outputs in block.lora:
        height = pass_.rows if place == "qkv" else rows
        yield Product(height, outputs, rank)
        yield Product(outputs, height, rank, added=True)
        yield Product(rank, height, inputs, added=True)
        if not (block.lowest and place == "qkv"):
            yield Product(height, rank, inputs, added=True)


@lru_cache(maxsize=1024)
def _lora_by_block(
    base: BaseShape, placement: str, lora_count: int
) -> tuple[tuple[LoraWork, ...], ...]:
    blocks: list[list[LoraWork]] = [[] for _ in range(base.layers)]
    for site in first_lora_sites(base, placement, lora_count):
        _, _, number, kind = site.path.split(".", 3)
        place = next(name for path, name in _PLACES.items() if kind.startswith(path))
        blocks[int(number)].append(LoraWork(place, site.inputs, site.outputs))
    return tuple(tuple(modules) for modules in blocks)
