"""A trunk of which every weight learns, for one reward model: a base, and a change of each weight.

The change travels and is averaged, not the weight: it begins at zero, decays towards the base, and
the cloud needs no base. The way there and back is the library's GPT-2 under autograd.
Shape letters: B examples, T tokens of the longest, P places, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from device_profiles.modules import base_tensors
from edge_client.data.prompts import Encoded
from edge_client.peft.flat_state import FlatState, joined, named
from edge_client.quiet import import_quietly
from messaging.layout import Tensors
from quantization.base_model import load_base
from quantization.frozen_gpt2 import FrozenBase

if TYPE_CHECKING:
    from edge_client.reward.adapted import Backward


class WholeTrunk:
    """The changes of one reward model's trunk; one flat buffer holds them. On the CPU.

    Args:
        base: What is changed; its checkpoint is read in fp32.
    """

    def __init__(self, base: FrozenBase) -> None:
        self.device = torch.device("cpu")
        self._base = base
        self._state = FlatState(
            base_tensors(base.identity.shape), torch.float32, torch.device("cpu")
        )
        self._flat = nn.Parameter(self._state.values)
        self._flat.grad = self._state.gradient
        self._views = {n: v for n, (v, _) in self._state.views(len(self._state.shapes)).items()}

    def put(self, tensors: Tensors) -> None:
        """See ``LearningTrunk``."""
        with torch.no_grad():
            self._flat.copy_(torch.from_numpy(joined(tensors, self._views)))

    def parameters(self) -> list[nn.Parameter]:
        """See ``LearningTrunk``."""
        return [self._flat]

    def trainable(self) -> Mapping[str, Tensor]:
        """See ``LearningTrunk``."""
        return self._views

    def take(self) -> Tensors:
        """See ``LearningTrunk``."""
        return named(self._flat.detach().numpy().copy(), self._views)

    def forward(self, examples: Sequence[Encoded]) -> tuple[Tensor, Backward]:
        """See ``LearningTrunk``."""
        changes = torch.split(self._flat, [s.size for s in self._state.shapes])
        weights = {
            s.name: self._weights[s.name] + change.view(s.shape)
            for s, change in zip(self._state.shapes, changes, strict=True)
        }
        found = torch.func.functional_call(self._model, weights, (_padded(examples),))
        states = found.last_hidden_state  # (B, T, D)
        hidden = torch.cat(
            [
                own[e.response_start - 1 : len(e.tokens) - 1]
                for own, e in zip(states, examples, strict=True)
            ]
        )  # (P, D)

        def back(gradient: Tensor, add: bool) -> None:
            if not add:
                self._state.gradient.zero_()
            hidden.backward(gradient)  # type: ignore[no-untyped-call]

        return hidden.detach(), back

    @cached_property
    def _model(self) -> Any:
        import_quietly()
        return load_base(self._base.identity).model.base_model

    @cached_property
    def _weights(self) -> dict[str, Tensor]:
        return dict(self._model.named_parameters())


def _padded(examples: Sequence[Encoded]) -> Tensor:
    """Return tokens, padded on the right, where causal attention reads nothing. Shape (B, T)."""
    longest = max(len(e.tokens) for e in examples)
    rows = torch.zeros(len(examples), longest, dtype=torch.int64)
    for row, example in zip(rows, examples, strict=True):
        row[: len(example.tokens)] = torch.from_numpy(example.tokens)
    return rows
