"""Reward models as a run uses them: a trunk, what is on it, and the scale of their scores.

The trunk is the frozen base at one precision for the whole run, so that a reward model that was
averaged over devices reads the same features on each of them; scores are put on one scale by the
reference set. It is bare, and then one pass serves all reward models; or every reward model has
adapters on it or weights of its own, and reads for itself. Or the trunk is an encoder: it reads
whole responses, and the critics, which want features of a state, read the bare base.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from device_profiles.methods import Objective
from device_profiles.reward_heads import HIDDEN, TrunkShape, initial_heads, reward_tensors
from edge_client.data.prompts import Encoded, encode_example
from edge_client.peft.packed_model import PackedModel
from edge_client.reward.adapted import AdaptedTrunk, LearningTrunk
from edge_client.reward.encoder import Encoder
from edge_client.reward.features import Trunk
from edge_client.reward.head import Head, of_objective, trunk_tensors_of
from edge_client.reward.kept_features import KeptFeatures
from edge_client.reward.reference import load_reference
from edge_client.reward.scale import Scale
from edge_client.reward.whole import WholeTrunk
from messaging.layout import Layout, Tensors, Vector
from quantization.frozen_gpt2 import FrozenBase, changed

_MOST_TOKENS = 256  # of a response of the reference set


class Heads:
    """Frozen reward models, one an objective.

    Args:
        tensors: Of all of them, by name.
        objectives: That are among them.
        judging: The trunk that they read, and the reference set.

    Attributes:
        scales: Of their scores on the reference set.

    Raises:
        InputError: If a head's scores on the reference set have no spread.
    """

    build = staticmethod(Head)

    def __init__(self, tensors: Tensors, objectives: Sequence[Objective], judging: Judging) -> None:
        self._all, self._judging = tensors, judging
        self._tensors: dict[str, Tensors] = {
            name: of_objective(tensors, name) for name in objectives
        }
        place = judging.scores_on
        self._heads = {n: Head(own).to(place) for n, own in self._tensors.items()}
        self.scales = {
            name: Scale.of(head, judging.reference_features(tensors, name))
            for name, head in self._heads.items()
        }

    def tensors(self, objective: str) -> Tensors:
        """Return a head's tensors by name."""
        return self._tensors[objective]

    def critic(self, objective: str) -> tuple[Tensors, float, float]:
        """Return what an objective's critic starts from: a head on the trunk, mean, deviation.

        That is the reward model's own; an encoder's reads nothing of a state, so that critics start
        from a head on the bare base that knows nothing, the same everywhere.
        """
        if self._judging.encoder is not None:
            return initial_heads([objective], self._judging.trunk.width, HIDDEN, 0), 0.0, 1.0
        scale = self.scales[objective]
        return self._tensors[objective], scale.mean, scale.deviation

    def encoded_features(self, examples: Sequence[Encoded]) -> Mapping[str, Tensor] | None:
        """Return responses as each objective's reward model reads them, if that is an encoder.

        None where the last of the token features is what it reads. Shape (N, F) for each.
        """
        if self._judging.encoder is None:
            return None
        found = self._judging.encoded(examples)
        return dict.fromkeys(self._heads, found)

    def score(self, objective: str) -> Callable[[Tensor], Tensor]:
        """Return what gives re-centred scores from features. Shape (N, F) -> (N,)."""
        head, scale = self._heads[objective], self.scales[objective]
        return lambda features: (head(features) - scale.mean) / scale.deviation

    def token_features(self, examples: Sequence[Encoded]) -> tuple[Mapping[str, Tensor], list[int]]:
        """Return what each objective's reward model reads at every place, and the places of each.

        Example after example, shape (P, F) for each objective: the same tensor for all of them on
        a bare trunk, which goes through the examples once.
        """
        found: dict[str, Tensor] = {}
        lengths: list[int] = []
        for name in self._heads:
            if found and not self._judging.shape.own:
                found[name] = next(iter(found.values()))
                continue
            trunk = self._judging.trunk_of(self._all, name)
            found[name], lengths = trunk.token_features(examples)
        return found, lengths


class Judging:
    """A trunk, and the reference set in its features.

    Args:
        base: At the run's trunk precision; it is read, not changed.
        adapter_size: Bottleneck size of the adapters that each reward model has on it; 0 for none.
        whole: Whether each reward model changes all of its weights; the base is in fp32 then.
        kept: Folder in which the features of a bare trunk are kept for the next process; None for
            no next one.
        encoder: Trunk instead of the base, which has no adapters then; its texts are of the base's
            tokens.

    Attributes:
        shape: What reward models read, and what of it is each one's own.
        model: The base with room for the adapters of one reward model at a time.
        trunk: Reads features with whatever is on ``model``.
    """

    def __init__(
        self,
        base: FrozenBase,
        *,
        adapter_size: int = 0,
        whole: bool = False,
        kept: Path | None = None,
        encoder: Encoder | None = None,
    ) -> None:
        self.base, self.encoder = base, encoder
        self.shape = TrunkShape(
            base=base.identity.shape,
            adapter_size=adapter_size,
            whole=whole,
            encoder_width=None if encoder is None else encoder.width,
        )
        self.model = PackedModel(
            base, adapter_size=adapter_size, placement="qkv", lora_count=0, lora_rank=1
        )
        self.trunk = Trunk(self.model)
        self.device = self.model.device
        self._known: tuple[bytes, Heads] | None = None
        self._kept = None if self.shape.own or kept is None else KeptFeatures(kept)

    @property
    def scores_on(self) -> torch.device:
        """Where heads compute: where what they read is."""
        return self.device if self.encoder is None else torch.device("cpu")

    def encoded(self, examples: Sequence[Encoded]) -> Tensor:
        """Return examples as the encoder reads their texts. Shape (N, F).

        Raises:
            ValueError: If there is no encoder.
        """
        if self.encoder is None:
            raise ValueError("the trunk is no encoder")
        return self.encoder.response_features([self._text(example) for example in examples])

    def _text(self, example: Encoded) -> tuple[str, str]:
        start, tokens = example.response_start, example.tokens
        end = len(tokens) - (len(tokens) > start and int(tokens[-1]) == self.base.end_token)
        decode = self.base.tokenizer.decode
        return decode(tokens[:start].tolist()), decode(tokens[start:end].tolist())

    def trunk_of(self, tensors: Tensors, objective: str) -> Trunk:
        """Return the trunk as an objective's reward model reads it, until the next is asked for.

        Args:
            tensors: Of reward models, by name.
            objective: Whose adapters go on it, or whose changes into it, if it has any.
        """
        if self.shape.whole:
            own = changed(self.base, trunk_tensors_of(tensors, objective))
            return Trunk(_bare(own))
        if self.shape.adapter_size:
            self.model.put(trunk_tensors_of(tensors, objective))
        return self.trunk

    @cached_property
    def learning(self) -> LearningTrunk:
        """What of a trunk learns with a head.

        Raises:
            ValueError: If nothing of it does.
        """
        if self.shape.whole:
            return WholeTrunk(self.base)
        if self.shape.adapter_size:
            return AdaptedTrunk(self.model)
        raise ValueError("nothing of a bare trunk learns")

    def response_features(
        self, tensors: Tensors, objective: str, examples: Sequence[Encoded]
    ) -> Tensor:
        """Return examples as a reward model reads them; what is kept is not read again.

        Shape (N, F).
        """

        def read() -> Tensor:
            if self.encoder is not None:
                return self.encoded(examples)
            return self.trunk_of(tensors, objective).response_features(examples)

        if self._kept is None:
            return read()
        encoder = "" if self.encoder is None else self.encoder.sha256
        return self._kept.of(self.base, examples, read, encoder=encoder)

    def reads(self, objectives: Sequence[Objective]) -> int:
        """Return how often a response goes through the trunk until all have scored it."""
        return len(objectives) if self.shape.own else 1

    def reference_features(self, tensors: Tensors, objective: str) -> Tensor:
        """Return the public reference set as a reward model reads it. Shape (N, F)."""
        if self.encoder is not None:
            return self._encoded_reference
        if not self.shape.own:
            return self._bare_reference
        return self.trunk_of(tensors, objective).response_features(self._reference)

    @cached_property
    def _reference(self) -> list[Encoded]:
        most = min(_MOST_TOKENS, self.base.identity.positions)
        rows = load_reference().examples
        return [encode_example(row, self.base.tokenizer, most) for row in rows]

    @cached_property
    def _encoded_reference(self) -> Tensor:
        return self.encoded(self._reference)

    @cached_property
    def _bare_reference(self) -> Tensor:
        return self.trunk.response_features(self._reference)

    def unpack(self, vector: Vector | None, objectives: Sequence[Objective]) -> Tensors | None:
        """Return the reward models that a packed vector holds, by tensor name; none for none."""
        if vector is None:
            return None
        return reward_layout(objectives, self.shape).unpack(vector)

    def heads(self, tensors: Tensors, objectives: Sequence[Objective]) -> Heads:
        """Return the reward models of these tensors; those that were asked for last are kept."""
        key = b"".join(t.tobytes() for t in tensors.values())
        if self._known is None or self._known[0] != key:
            self._known = key, Heads(tensors, objectives, self)
        return self._known[1]


def reward_layout(objectives: Sequence[Objective], trunk: TrunkShape) -> Layout:
    """Return the order of the reward models' tensors in a packed vector."""
    return Layout.of(t for name in objectives for t in reward_tensors(name, trunk))


def _bare(base: FrozenBase) -> PackedModel:
    return PackedModel(base, adapter_size=0, placement="qkv", lora_count=0, lora_rank=1)
