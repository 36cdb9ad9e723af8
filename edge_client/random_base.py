"""A base of random weights and examples of random tokens: what costs as much as the real ones."""

from __future__ import annotations

from pathlib import Path

import torch

from device_profiles.seeds import stream
from device_profiles.step_model import Pass, StepShape
from edge_client.data.prompts import Encoded
from quantization.backends.dense import hold_fp32
from quantization.frozen_gpt2 import Block, FrozenBase, FrozenGPT2, Norm, Projection
from quantization.identity import BaseIdentity


def random_examples(pass_: Pass, vocabulary: int) -> list[Encoded]:
    """Return the examples of a pass: random tokens, nothing in common at the beginning."""
    draw = stream(0, "random examples", vocabulary)
    tokens = draw.integers(0, vocabulary, (pass_.examples, pass_.tokens))
    tokens[:, 0] = range(pass_.examples)
    start = pass_.tokens - pass_.response
    return [Encoded(tokens=row, response_start=start) for row in tokens]


def random_base(shape: StepShape, device: torch.device) -> FrozenBase:
    """Return a base of random weights in memory: it costs what a trained one costs.

    It has no file and no tokenizer.
    """
    width, inner = shape.base.width, shape.base.inner
    generator = torch.Generator().manual_seed(0)

    def weight(outputs: int, inputs: int) -> torch.Tensor:
        return 0.02 * torch.randn(outputs, inputs, generator=generator)

    def norm() -> Norm:
        return Norm(weight=torch.ones(width, device=device), bias=torch.zeros(width, device=device))

    def projection(outputs: int, inputs: int) -> Projection:
        return Projection(
            matrix=hold_fp32(weight(inputs, outputs).T, str(device)),  # as a checkpoint has it
            bias=torch.zeros(outputs, device=device),
        )

    blocks = tuple(
        Block(
            ln_1=norm(),
            qkv=projection(3 * width, width),
            attention_out=projection(width, width),
            ln_2=norm(),
            mlp_in=projection(inner, width),
            mlp_out=projection(width, inner),
        )
        for _ in range(shape.base.layers)
    )
    weights = FrozenGPT2(
        embedding=hold_fp32(weight(shape.vocabulary, width), str(device)),
        positions=weight(shape.positions, width).to(device),
        blocks=blocks,
        ln_f=norm(),
        heads=shape.heads,
        epsilon=1e-5,
        gelu="tanh",
    )
    identity = BaseIdentity(
        name="random",
        folder=Path(),
        tokenizer_folder=Path(),
        sha256="",
        tokenizer_sha256="",
        parameters=0,
        positions=shape.positions,
        vocabulary=shape.vocabulary,
        shape=shape.base,
    )
    return FrozenBase(
        identity=identity, weights=weights, tokenizer=None, precision="fp32", backend="torch"
    )
