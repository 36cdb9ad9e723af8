"""What the tests of alignment share: a bandit that a tiny packed model plays."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

from device_profiles.modules import BaseShape, initial_adapters
from device_profiles.step_model import StepShape
from edge_client.alignment.critic import Critic
from edge_client.alignment.rollouts import Rollout
from edge_client.data.packing import pack
from edge_client.data.prompts import Encoded
from edge_client.peft.packed_model import PackedModel
from edge_client.random_base import random_base
from messaging.layout import Tensors
from quantization.backends.dense import Fp32Matrix

Floats = npt.NDArray[np.float64]

ARMS = 6
PROMPT = 5
TEMPERATURE = 0.7
SHAPE = StepShape(
    base=BaseShape(layers=1, width=8, inner=16),
    heads=2,
    vocabulary=ARMS,
    positions=8,
    adapter_size=8,
    placement="qkv",
    lora_rank=2,
)


class LinearHead(nn.Module):
    """A head of one weight a feature and a bias."""

    def __init__(self, tensors: Tensors) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.from_numpy(tensors["weight"]))
        self.bias = nn.Parameter(torch.from_numpy(tensors["bias"]))

    def forward(self, features: Tensor) -> Tensor:
        """Return scores. Shape (N, F) -> (N,)."""
        return features @ self.weight + self.bias


def linear_critic(features: int = 1, learning_rate: float = 0.05, **more: float) -> Critic:
    """Return a critic that begins at zero."""
    tensors = {"weight": np.zeros(features, np.float32), "bias": np.zeros((), np.float32)}
    return Critic(LinearHead, tensors, learning_rate=learning_rate, **more)


def one_token(arm: int) -> Encoded:
    """Return the response that is one token, to the only prompt there is."""
    return Encoded(tokens=np.array([PROMPT, arm]), response_start=1)


class Bandit:
    """One state, six arms: a policy that answers with one token, which is paid by a table."""

    def __init__(self) -> None:
        base = random_base(SHAPE, torch.device("cpu"))
        rng = torch.Generator().manual_seed(1)
        width = SHAPE.base.width
        weights = dataclasses.replace(
            base.weights,
            # long enough that the last norm's output can make any arm very likely, and short
            # beside the position, or the prompt's own token would be all but certain
            embedding=Fp32Matrix(0.5 * torch.randn(ARMS, width, generator=rng)),
            positions=5 * torch.randn(SHAPE.positions, width, generator=rng),
        )
        self.model = PackedModel(
            dataclasses.replace(base, weights=weights),
            adapter_size=SHAPE.adapter_size,
            placement=SHAPE.placement,
            lora_count=0,
            lora_rank=SHAPE.lora_rank,
        )
        self.model.put(initial_adapters(SHAPE.base, SHAPE.adapter_size, seed=2))
        self.reference = self.model.take_flat()

    def probabilities(self) -> Floats:
        """Return the policy. Shape (arms,)."""
        logits = self.model.logits(pack([one_token(0)]))[0].double() / TEMPERATURE
        return np.asarray(torch.softmax(logits, 0).numpy())

    def play(
        self,
        count: int,
        pays: Mapping[str, Sequence[float]],
        generator: np.random.Generator,
    ) -> list[Rollout]:
        """Return responses; each arm comes as often as its probability says, to one more or less.

        Systematic sampling is unbiased, and leaves the tests far less noise than independent draws.
        """
        ends = np.cumsum(self.probabilities())
        places = (np.arange(count) + generator.random()) / count
        arms = np.minimum(np.searchsorted(ends, places, side="right"), ARMS - 1)
        generator.shuffle(arms)
        return [
            Rollout(
                example=one_token(arm),
                ended=True,
                scores={name: pay[arm] for name, pay in pays.items()},
                features={name: torch.ones(1, 1) for name in pays},
            )
            for arm in arms
        ]


def tilted(reference: Floats, pays: Sequence[float], kl_coefficient: float) -> Floats:
    """Return the policy that whitened rewards and a KL penalty balance at.

    Its advantage is the same for every arm: ``r / s - b (log p - log q)`` is constant, with s the
    deviation of the rewards under p itself. So p is q tilted by ``exp(r / (b s))``.
    """
    pay, policy = np.array(pays), reference
    for _ in range(2000):
        deviation = np.sqrt(policy @ pay**2 - (policy @ pay) ** 2)
        tilt = reference * np.exp(pay / (kl_coefficient * deviation))
        policy = 0.9 * policy + 0.1 * tilt / tilt.sum()
    return policy


@pytest.fixture
def bandit() -> Bandit:
    """Return a bandit whose policy is the reference."""
    return Bandit()
