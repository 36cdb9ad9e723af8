"""The shapes that memory and time of a training step follow from: base, modules, and a pass.

Shape letters: N rows of a pass, P rows that predict, D width, M bottleneck size, R rank, V words.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from device_profiles.errors import InputError
from device_profiles.modules import BaseShape, adapter_tensors, first_lora_sites

NUMBER_BYTES = 4  # everything but the frozen base is in fp32
HEAD_CHUNK_NUMBERS = 2**23  # of logits at once
SCRATCH_NUMBERS = 2**22  # of a weight, unpacked at once


@dataclass(frozen=True, kw_only=True)
class StepShape:
    """A base and the modules on it.

    Attributes:
        vocabulary: Rows of the embedding, V; the head is the same matrix.
        positions: Longest sequence.
        adapter_size: M; 0 for no adapters.
        placement: Row of ``device_profiles.modules.PLACEMENTS``.
        lora_rank: R.
    """

    base: BaseShape
    heads: int
    vocabulary: int
    positions: int
    adapter_size: int
    placement: str
    lora_rank: int


@dataclass(frozen=True, kw_only=True)
class Pass:
    """What goes through the model at once: a batch, or a part of one.

    Attributes:
        examples: At least 1, all of the same length; what they have in common is not shared.
        tokens: Of each, the end token included, at least 2.
        response: Of these, that are predicted: 1 to ``tokens`` - 1.
    """

    examples: int
    tokens: int
    response: int

    def __post_init__(self) -> None:
        if self.examples < 1 or not 1 <= self.response < self.tokens:
            raise InputError(
                f"examples = {self.examples}, tokens = {self.tokens}, response = {self.response}; "
                "give at least 1 example, and a response of 1 token or more, but not all of it"
            )

    @property
    def length(self) -> int:
        """Rows of an example: its last token predicts nothing."""
        return self.tokens - 1

    @property
    def rows(self) -> int:
        """Rows of the pass, N."""
        return self.examples * self.length

    @property
    def wanted(self) -> int:
        """Rows that predict, P."""
        return self.examples * self.response


@lru_cache(maxsize=256)
def base_matrices(shape: StepShape) -> tuple[tuple[int, int], ...]:
    """Return (outputs, inputs) of the matrices that are held at a precision, the head first."""
    width, inner = shape.base.width, shape.base.inner
    block = ((3 * width, width), (width, width), (inner, width), (width, inner))
    return ((shape.vocabulary, width), *block * shape.base.layers)


def base_vectors(shape: StepShape) -> int:
    """Return the weights of the base that stay in fp32: positions, norms and biases."""
    base = shape.base
    blocks = base.layers * (9 * base.width + base.inner)  # two norms, four projections
    return blocks + shape.positions * base.width + 2 * base.width


def base_parameters(shape: StepShape) -> int:
    """Return the weights of the base; the head is the embedding and counts once."""
    return base_vectors(shape) + sum(a * b for a, b in base_matrices(shape))


@lru_cache(maxsize=1024)
def trainable_parameters(shape: StepShape, lora_count: int) -> int:
    """Return how many parameters train.

    Raises:
        InputError: If adapter size, placement or count do not fit the base.
    """
    adapters = adapter_tensors(shape.base, shape.adapter_size) if shape.adapter_size else []
    sites = first_lora_sites(shape.base, shape.placement, lora_count)
    lora = sum(shape.lora_rank * (site.inputs + site.outputs) for site in sites)
    return sum(tensor.size for tensor in adapters) + lora
