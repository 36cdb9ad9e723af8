"""A frozen GPT-2 as plain values, read from its checkpoint one tensor at a time.

Shape letters: N tokens, T positions, D model width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from quantization.backends.dense import hold_fp32
from quantization.backends.stored import pieces
from quantization.checkpoint import Checkpoint, look_through
from quantization.errors import BaseModelError
from quantization.identity import BaseIdentity
from quantization.matrix import FrozenMatrix
from quantization.precision import choose
from quantization.tokenizer import load_tokenizer


@dataclass(frozen=True, kw_only=True)
class Norm:
    """Scale and shift of a layer norm, fp32. Shapes (D,), (D,)."""

    weight: Tensor
    bias: Tensor

    @property
    def nbytes(self) -> int:
        """Memory, bytes."""
        return self.weight.nbytes + self.bias.nbytes


@dataclass(frozen=True, kw_only=True)
class Projection:
    """A frozen linear layer; ``bias`` has shape (outputs,), fp32."""

    matrix: FrozenMatrix
    bias: Tensor

    @property
    def nbytes(self) -> int:
        """Memory, bytes."""
        return self.matrix.nbytes + self.bias.nbytes


@dataclass(frozen=True, kw_only=True)
class Block:
    """One transformer block.

    Attributes:
        qkv: Query, key and value side by side, D -> 3 D.
    """

    ln_1: Norm
    qkv: Projection
    attention_out: Projection
    ln_2: Norm
    mlp_in: Projection
    mlp_out: Projection

    @property
    def nbytes(self) -> int:
        """Memory, bytes."""
        norms = self.ln_1.nbytes + self.ln_2.nbytes
        attention = self.qkv.nbytes + self.attention_out.nbytes
        return norms + attention + self.mlp_in.nbytes + self.mlp_out.nbytes


@dataclass(frozen=True, kw_only=True)
class FrozenGPT2:
    """The weights of a GPT-2, none of them trainable.

    Attributes:
        embedding: Of tokens, (V, D); the head is the same matrix.
        positions: Shape (T, D), fp32.
        epsilon: Of every layer norm.
        gelu: ``approximate`` of ``torch.nn.functional.gelu``.
    """

    embedding: FrozenMatrix
    positions: Tensor
    blocks: tuple[Block, ...]
    ln_f: Norm
    heads: int
    epsilon: float
    gelu: Literal["tanh", "none"]

    @property
    def nbytes(self) -> int:
        """Memory of all weights, bytes; the tied head counts once."""
        ends = self.embedding.nbytes + self.positions.nbytes + self.ln_f.nbytes
        return ends + sum(block.nbytes for block in self.blocks)


@dataclass(frozen=True, kw_only=True)
class FrozenBase:
    """A frozen base in memory.

    Attributes:
        tokenizer: A ``quantization.tokenizer.Tokenizer``; none of a base without words.
        precision: What its matrices are held in, a row of ``quantization.precision.PRECISIONS``.
        backend: Whose kernels multiply by them.
    """

    identity: BaseIdentity
    weights: FrozenGPT2
    tokenizer: Any
    precision: str
    backend: str

    @property
    def end_token(self) -> int:
        """Token that ends a response."""
        return int(self.tokenizer.eos_token_id)


def load_frozen(
    identity: BaseIdentity,
    precision: str = "fp32",
    device: str = "cpu",
    backend: str | None = None,
) -> FrozenBase:
    """Return a base at a precision.

    Tensors are read, converted and dropped one by one: beside what is returned, one of them is in
    memory. While GPT-2 small's shape was loaded from an fp32 file on Linux, resident memory grew by
    196 MB at the most in int8, of which 128 stayed, and by 181 in nf4, of which 73 stayed. Matrices
    of an fp32 file at fp32 stay in the file, mapped: it must not be written to.

    Args:
        identity: Of a folder.
        precision: Row of ``quantization.precision.PRECISIONS``.
        device: ``cpu`` or ``cuda``.
        backend: By name; None tries those of the precision and takes the first that runs.

    Raises:
        BaseModelError: If the weights do not fit the configuration or are damaged, are of a GPT-2
            that this version does not compute, or the tokenizer does not fit the weights.
        InputError: If the precision does not run on this machine.
    """
    chosen = choose(precision, device, backend)
    checkpoint = look_through(identity)
    tokenizer = load_tokenizer(identity)

    def hold(name: str, weight: Tensor) -> FrozenMatrix:
        try:
            head = chosen.hold_head if name == "wte" else None
            return (head or chosen.hold)(weight, device)
        except ValueError as err:
            raise BaseModelError(
                f"{identity.folder}: '{name}': {err}; give another checkpoint"
            ) from err

    if precision == "fp32":
        with checkpoint.opened() as read:
            weights = _read_weights(checkpoint, read, hold, device)
    else:
        weights = _read_weights(checkpoint, checkpoint.read, hold, device)
    return FrozenBase(
        identity=identity,
        weights=weights,
        tokenizer=tokenizer,
        precision=precision,
        backend=chosen.name,
    )


def changed(base: FrozenBase, changes: Mapping[str, npt.NDArray[np.float32]]) -> FrozenBase:
    """Return a base whose every weight is the checkpoint's plus a change, in fp32 on the CPU.

    Args:
        base: At any precision; it stays as it is.
        changes: Of all weights, by the checkpoint's names without its prefix, in their shapes.

    Raises:
        KeyError: If a weight has none.
        BaseModelError: If the checkpoint cannot be read any more.
    """
    checkpoint = look_through(base.identity)
    with checkpoint.opened() as read:
        weights = _read_weights(
            checkpoint,
            lambda name: read(name).to(torch.float32) + torch.from_numpy(changes[name].copy()),
            lambda _name, weight: hold_fp32(weight, "cpu"),
            "cpu",
        )
    return replace(base, weights=weights, precision="fp32", backend="torch")


def _read_weights(
    checkpoint: Checkpoint,
    read: Callable[[str], Tensor],
    hold: Callable[[str, Tensor], FrozenMatrix],
    device: str,
) -> FrozenGPT2:
    def vector(name: str) -> Tensor:
        return read(name).to(device, torch.float32, copy=True)

    def norm(name: str) -> Norm:
        return Norm(weight=vector(f"{name}.weight"), bias=vector(f"{name}.bias"))

    def projection(name: str) -> Projection:
        matrix = hold(name, read(f"{name}.weight").T)
        return Projection(matrix=matrix, bias=vector(f"{name}.bias"))

    def block(name: str) -> Block:
        return Block(
            ln_1=norm(f"{name}.ln_1"),
            qkv=projection(f"{name}.attn.c_attn"),
            attention_out=projection(f"{name}.attn.c_proj"),
            ln_2=norm(f"{name}.ln_2"),
            mlp_in=projection(f"{name}.mlp.c_fc"),
            mlp_out=projection(f"{name}.mlp.c_proj"),
        )

    return FrozenGPT2(
        embedding=hold("wte", read("wte.weight")),
        positions=vector("wpe.weight"),
        blocks=tuple(block(f"h.{i}") for i in range(checkpoint.identity.shape.layers)),
        ln_f=norm("ln_f"),
        heads=checkpoint.heads,
        epsilon=checkpoint.epsilon,
        gelu=checkpoint.gelu,
    )


def distance_to_original(base: FrozenBase) -> dict[str, float]:
    """Return ||held - original|| / ||original|| of each matrix by name, and of all as ``overall``.

    The original is the checkpoint's file. Norms are Frobenius', summed in float64.

    Raises:
        BaseModelError: If the checkpoint cannot be read any more.
    """
    checkpoint = look_through(base.identity)
    squares = {}
    for name, matrix in _matrices(base.weights):
        weight = checkpoint.read(f"{name}.weight")
        squares[name] = _squares(matrix, weight if name == "wte" else weight.T)
    squares["overall"] = (sum(e for e, _ in squares.values()), sum(w for _, w in squares.values()))
    return {name: math.sqrt(error / whole) for name, (error, whole) in squares.items()}


def _matrices(weights: FrozenGPT2) -> Iterator[tuple[str, FrozenMatrix]]:
    yield "wte", weights.embedding
    for i, block in enumerate(weights.blocks):
        yield f"h.{i}.attn.c_attn", block.qkv.matrix
        yield f"h.{i}.attn.c_proj", block.attention_out.matrix
        yield f"h.{i}.mlp.c_fc", block.mlp_in.matrix
        yield f"h.{i}.mlp.c_proj", block.mlp_out.matrix


def _squares(matrix: FrozenMatrix, original: Tensor) -> tuple[float, float]:
    """Return the squared norms of error and original, a few rows at a time."""
    error = whole = 0.0
    for start, stop in pieces(matrix.outputs, matrix.inputs):
        part = original[start:stop].to(torch.float64)
        held = matrix.rows(torch.arange(start, stop)).to("cpu", torch.float64)
        error += float((held - part).square().sum())
        whole += float(part.square().sum())
    return error, whole
