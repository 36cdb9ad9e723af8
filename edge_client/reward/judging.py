"""Reward models as a run uses them: a trunk, the heads on it, and the scale of their scores.

The trunk is the bare base at one precision for the whole run, so that a head that was averaged over
devices reads the same features on each of them; scores are put on one scale by the reference set.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

from torch import Tensor

from device_profiles.methods import Objective
from device_profiles.reward_heads import HIDDEN, head_tensors
from edge_client.data.prompts import encode_example
from edge_client.peft.packed_model import PackedModel
from edge_client.reward.features import Trunk
from edge_client.reward.head import Head, of_objective
from edge_client.reward.reference import load_reference
from edge_client.reward.scale import Scale
from messaging.layout import Layout, Tensors, Vector
from quantization.frozen_gpt2 import FrozenBase

_MOST_TOKENS = 256  # of a response of the reference set


class Heads:
    """Frozen reward models, one an objective.

    Args:
        tensors: Of all of them, by name.
        objectives: That are among them.
        reference: Features of the reference set. Shape (N, F).

    Attributes:
        scales: Of their scores on the reference set.

    Raises:
        InputError: If a head's scores on the reference set have no spread.
    """

    build = staticmethod(Head)

    def __init__(
        self, tensors: Tensors, objectives: Sequence[Objective], reference: Tensor
    ) -> None:
        self._tensors: dict[str, Tensors] = {
            name: of_objective(tensors, name) for name in objectives
        }
        self._heads = {name: Head(own).to(reference.device) for name, own in self._tensors.items()}
        self.scales = {name: Scale.of(head, reference) for name, head in self._heads.items()}

    def tensors(self, objective: str) -> Tensors:
        """Return a reward model's tensors by name."""
        return self._tensors[objective]

    def score(self, objective: str) -> Callable[[Tensor], Tensor]:
        """Return what gives re-centred scores from features. Shape (N, F) -> (N,)."""
        head, scale = self._heads[objective], self.scales[objective]
        return lambda features: (head(features) - scale.mean) / scale.deviation


class Judging:
    """A trunk, and the reference set in its features.

    Args:
        base: At the run's trunk precision; it is read, not changed.
    """

    def __init__(self, base: FrozenBase) -> None:
        self.base = base
        bare = PackedModel(base, adapter_size=0, placement="qkv", lora_count=0, lora_rank=1)
        self.trunk = Trunk(bare)
        self._known: tuple[bytes, Heads] | None = None

    @cached_property
    def reference_features(self) -> Tensor:
        """Of the public reference set. Shape (N, F)."""
        most = min(_MOST_TOKENS, self.base.identity.positions)
        rows = load_reference().examples
        encoded = [encode_example(row, self.base.tokenizer, most) for row in rows]
        return self.trunk.response_features(encoded)

    def unpack(self, vector: Vector | None, objectives: Sequence[Objective]) -> Tensors | None:
        """Return the reward models that a packed vector holds, by tensor name; none for none."""
        return None if vector is None else heads_layout(objectives, self.trunk.width).unpack(vector)

    def heads(self, tensors: Tensors, objectives: Sequence[Objective]) -> Heads:
        """Return the reward models of these tensors; those that were asked for last are kept."""
        key = b"".join(t.tobytes() for t in tensors.values())
        if self._known is None or self._known[0] != key:
            self._known = key, Heads(tensors, objectives, self.reference_features)
        return self._known[1]


def heads_layout(objectives: Sequence[Objective], width: int) -> Layout:
    """Return the order of the reward models' tensors in a packed vector."""
    tensors = [t for name in objectives for t in head_tensors(name, width, HIDDEN)]
    return Layout.of(tensors)
