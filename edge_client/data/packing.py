"""Encoded examples one after the other: no padding, and nothing computed twice.

With causal attention a token's states depend on what is left of it alone, so examples that begin
with the same tokens (the prompt's template, mostly) share the rows of that beginning. The last
token of an example predicts nothing and has no row.
Shape letters: N rows of a batch, P response tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from edge_client.data.prompts import Encoded

_Rows = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Span:
    """Where one example lies: its own rows, and before them those of an earlier one.

    Attributes:
        start: First row of its own.
        stop: Row behind its last.
        shared: Rows of its beginning. Shape (T,); often empty.
    """

    start: int
    stop: int
    shared: _Rows


@dataclass(frozen=True, kw_only=True)
class Packed:
    """A batch in one sequence of rows.

    Attributes:
        tokens: Shape (N,).
        positions: Of each token within its example. Shape (N,).
        spans: One an example that has rows of its own; these follow one another.
        places: Rows that predict a response token. Shape (P,).
        targets: Those tokens. Shape (P,).
        real_tokens: Of all examples, each counted in full.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    spans: tuple[Span, ...]
    places: torch.Tensor
    targets: torch.Tensor
    real_tokens: int


def pack(
    examples: Sequence[Encoded], device: torch.device | str = "cpu", *, share: bool = True
) -> Packed:
    """Return at least 1 example as one batch, in the order given.

    Args:
        examples: Not one of them empty.
        device: Where the tensors go.
        share: Whether examples that begin alike share rows.
    """
    rows: list[_Rows] = []  # of each example, shared ones included
    spans, tokens, positions = [], [], []
    stop = 0
    for example in examples:
        inputs = example.tokens[:-1]
        shared = _longest_beginning(inputs, examples[: len(rows)], rows) if share else _NOTHING
        start, stop = stop, stop + len(inputs) - len(shared)
        rows.append(np.concatenate([shared, np.arange(start, stop)]))
        tokens.append(inputs[len(shared) :])
        positions.append(np.arange(len(shared), len(inputs)))
        if start < stop:
            spans.append(Span(start=start, stop=stop, shared=shared))
    places = [own[e.response_start - 1 :] for e, own in zip(examples, rows, strict=True)]

    def joined(parts: list[_Rows]) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(parts)).to(device)

    return Packed(
        tokens=joined(tokens),
        positions=joined(positions),
        spans=tuple(spans),
        places=joined(places),
        targets=joined([e.tokens[e.response_start :] for e in examples]),
        real_tokens=sum(len(e.tokens) for e in examples),
    )


_NOTHING: _Rows = np.zeros(0, np.int64)


def _longest_beginning(inputs: _Rows, earlier: Sequence[Encoded], rows: list[_Rows]) -> _Rows:
    """Return the rows of the longest beginning that an earlier example has in common."""
    best = _NOTHING
    for other, own in zip(earlier, rows, strict=True):
        most = min(len(inputs), len(own))
        differs = np.flatnonzero(inputs[:most] != other.tokens[:most])
        common = int(differs[0]) if len(differs) else most
        if common > len(best):
            best = own[:common]
    return best


def micro_batches(
    examples: Sequence[Encoded], most_tokens: int | None
) -> Iterator[Sequence[Encoded]]:
    """Yield runs of at least 1 example and at most ``most_tokens`` tokens; all at once for none.

    An example that is longer by itself comes alone.
    """
    begin, held = 0, 0
    for i, example in enumerate(examples):
        held += len(example.tokens)
        if most_tokens is not None and held > most_tokens and i > begin:
            yield examples[begin:i]
            begin, held = i, len(example.tokens)
    yield examples[begin:]
