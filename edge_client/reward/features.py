"""What a reward model reads of a response, and a critic of a state: features of a frozen trunk.

At a place p of an example: the hidden state at p; the mean of the example's hidden states from its
first place to p; and the logarithm of how many these are. Each of the two vectors is normalised by
itself, without parameters. A response's features are those of its last place, which has read all
but the end token; a state's, before token t is chosen, those of the place that predicts t.
Shape letters: P places, N examples, D width of the trunk, F features (2 D + 1).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from device_profiles.reward_heads import feature_count
from edge_client.data.packing import pack
from edge_client.data.prompts import Encoded
from edge_client.peft.packed_model import PackedModel

_MOST_TOKENS = 4096  # that go through the trunk at once


class Trunk:
    """The features of a model: as a rule of a bare one, without adapters and LoRA.

    Args:
        model: Whatever is on it counts; a bare ``PackedModel`` reads the same on every device.
    """

    def __init__(self, model: PackedModel) -> None:
        self._model = model
        self.width: int = model.base.weights.positions.shape[1]

    def token_features(self, examples: Sequence[Encoded]) -> tuple[Tensor, list[int]]:
        """Return the features of every place, example after example, and the places of each.

        Shape (P, F); a place for each response token, the end token included.
        """
        lengths = [len(e.tokens) - e.response_start for e in examples]
        found = torch.empty(sum(lengths), feature_count(self.width), device=self._model.device)
        parts = torch.split(found, lengths)
        for index, features in self._each(examples):
            parts[index].copy_(features)
        return found, lengths

    def response_features(self, examples: Sequence[Encoded]) -> Tensor:
        """Return the features of every example's last place. Shape (N, F)."""
        found = torch.empty(len(examples), feature_count(self.width), device=self._model.device)
        for index, features in self._each(examples):
            found[index] = features[-1]
        return found

    def _each(self, examples: Sequence[Encoded]) -> Iterator[tuple[int, Tensor]]:
        """Yield each example's index and features. Shape (places, F)."""
        for batch in _batches(examples):
            with torch.no_grad():
                packed = pack([examples[index] for index in batch], self._model.device)
                hidden = self._model.hidden(packed)  # (P, D)
                lengths = [len(examples[i].tokens) - examples[i].response_start for i in batch]
                features = [state_features(states) for states in torch.split(hidden, lengths)]
            yield from zip(batch, features, strict=True)


def state_features(hidden: Tensor) -> Tensor:
    """Return the features of one example's places. Shape (places, D) -> (places, F)."""
    count = torch.arange(1, len(hidden) + 1, dtype=hidden.dtype, device=hidden.device)[:, None]
    so_far = hidden.cumsum(0) / count
    size = hidden.shape[1:]
    normal = [torch.nn.functional.layer_norm(part, size) for part in (hidden, so_far)]
    return torch.cat([*normal, count.log()], dim=1)


def _batches(examples: Sequence[Encoded]) -> Iterator[list[int]]:
    """Yield the indices of examples that go through together.

    Those with the same prompt stand side by side, and share its rows; within a batch they stand by
    length, so that attention pads little.
    """

    def asked(index: int) -> tuple[int, bytes, int]:
        start = examples[index].response_start
        return start, examples[index].tokens[:start].tobytes(), index

    batch: list[int] = []
    held = 0
    for index in sorted(range(len(examples)), key=asked):
        tokens = len(examples[index].tokens)
        if batch and held + tokens > _MOST_TOKENS:
            yield sorted(batch, key=lambda i: (len(examples[i].tokens), i))
            batch, held = [], 0
        batch.append(index)
        held += tokens
    if batch:
        yield sorted(batch, key=lambda i: (len(examples[i].tokens), i))
