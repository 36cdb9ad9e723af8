"""Direct preference optimisation on the pairs of several objectives, each with its weight.

The loss of a pair is ``-w log sigmoid(beta ((p_c - q_c) - (p_r - q_r)))``: log-probabilities of the
chosen and the rejected response under the policy, p, and under the reference, q; w is the weight of
the pair's objective. A batch's loss is the mean over its pairs, so an objective with more pairs
counts more often.
Shape letters: E pairs of a batch, P actions of their responses.

Source: Rafailov et al., Direct preference optimization, 2023, equation 7; the weights are ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from device_profiles.errors import InputError
from device_profiles.seeds import stream
from edge_client.alignment.advantages import check_weights
from edge_client.alignment.losses import preference
from edge_client.alignment.policy import all_log_probabilities, sequence_gradient, values_of
from edge_client.alignment.settings import DpoSettings
from edge_client.data.batches import training_order
from edge_client.data.packing import pack
from edge_client.data.prompts import Encoded
from edge_client.descent import Descent
from edge_client.peft.packed_model import PackedModel
from messaging.layout import Vector


@dataclass(frozen=True, kw_only=True)
class Compared:
    """Two responses to a prompt, end tokens included, and the objective that tells them apart."""

    objective: str
    chosen: Encoded
    rejected: Encoded


@dataclass(frozen=True, kw_only=True)
class DpoFigures:
    """What training on pairs was like: means over the pairs as they came.

    Attributes:
        steps: Updates taken.
        pairs: That were looked at, each once under the reference.
        loss: Weighted, nats a pair.
        accuracy: Share of pairs whose chosen side had gained more than the rejected one; equal
            gains, as before the first update, count half.
        margin: By how much it had, times beta.
    """

    steps: int
    pairs: int
    loss: float
    accuracy: float
    margin: float


def dpo_steps(
    model: PackedModel,
    descent: Descent,
    pairs: Sequence[Compared],
    *,
    reference: Vector,
    weights: Mapping[str, float],
    settings: DpoSettings,
    seed: int,
    words: tuple[str | int, ...],
) -> DpoFigures:
    """Take ``settings.steps`` updates of the policy.

    Args:
        model: The policy; it is trained in place.
        descent: Of its parameter, see ``policy_descent``.
        pairs: At least 1; a batch has no more than there are.
        reference: State of stage 1. Shape (size,).
        weights: Of the pairs' objectives, with the sum 1.
        settings: Of DPO.
        seed: Of the run.
        words: Client and round; the same seed and words give the same bits.

    Raises:
        InputError: If there are no pairs, weights or reference do not fit, or training diverges.
    """
    if not pairs:
        raise InputError("no preference pairs to train on; give this client at least one")
    check_weights(weights, sorted({pair.objective for pair in pairs}))
    sides = [[pair.chosen, pair.rejected] for pair in pairs]
    size = min(settings.batch_size, len(pairs))
    order = [*training_order(len(pairs), settings.steps, size, stream(seed, "pairs", *words))]
    used = sorted({i for indices in order for i in indices})
    with values_of(model, reference):
        before = _before(model, sides, used, settings)
    by_pair = before.new_tensor([weights[pair.objective] for pair in pairs])
    seen: list[Tensor] = []
    for indices in order:
        batch = [sides[i] for i in indices]
        start = 0
        for part in _parts(batch, settings.most_tokens):
            mine = indices[start : start + len(part)]
            weigh = _Weigh(part, before[mine], by_pair[mine], settings.beta, len(indices))
            sequence_gradient(
                model,
                pack([side for both in part for side in both], model.device),
                weigh,
                settings.temperature,
                add=start > 0,
                checkpoint=settings.checkpoint,
            )
            seen += weigh.seen
            start += len(part)
        descent.step()
    losses, margins = torch.cat(seen, dim=1).double()
    return DpoFigures(
        steps=settings.steps,
        pairs=len(used),
        loss=float(losses.mean()),
        accuracy=float(((margins.sign() + 1) / 2).mean()),
        margin=float(margins.mean()),
    )


class _Weigh:
    """Derivatives of the mean loss of a batch by the log-probabilities of some of its pairs."""

    def __init__(
        self,
        part: Sequence[Sequence[Encoded]],
        reference: Tensor,
        weights: Tensor,
        beta: float,
        count: int,
    ) -> None:
        self._lengths = [len(e.tokens) - e.response_start for both in part for e in both]
        self._reference, self._weights, self._beta, self._count = reference, weights, beta, count
        self.seen: list[Tensor] = []

    def __call__(self, actions: Tensor) -> Tensor:
        gained = _sums(actions, self._lengths).view(-1, 2) - self._reference  # (E, 2)
        margins = self._beta * (gained[:, 0] - gained[:, 1])
        losses, slopes = preference(margins, self._weights)
        self.seen.append(torch.stack([losses, margins]))
        slopes = self._beta * slopes / self._count
        both = torch.stack([slopes, -slopes], 1).view(-1)  # chosen, rejected, chosen ...
        lengths = torch.tensor(self._lengths, device=both.device)
        return both.repeat_interleave(lengths)


def _before(
    model: PackedModel,
    sides: Sequence[Sequence[Encoded]],
    used: Sequence[int],
    settings: DpoSettings,
) -> Tensor:
    """Return the log-probability of both sides of each pair; NaN for those that are not used.

    Shape (pairs, 2).
    """
    size = settings.batch_size
    parts = [used[start : start + size] for start in range(0, len(used), size)]
    known = [_totals(model, [s for i in part for s in sides[i]], settings) for part in parts]
    found = known[0].new_full((len(sides), 2), math.nan)
    found[used] = torch.cat(known).view(-1, 2)
    return found


def _totals(model: PackedModel, examples: Sequence[Encoded], settings: DpoSettings) -> Tensor:
    """Return the log-probability of each whole response. Shape (examples,)."""
    lengths = [len(e.tokens) - e.response_start for e in examples]
    found = all_log_probabilities(model, examples, settings.temperature, settings.most_tokens)
    return _sums(found, lengths)


def _sums(actions: Tensor, lengths: Sequence[int]) -> Tensor:
    return torch.stack([part.sum() for part in torch.split(actions, list(lengths))])


def _parts(
    batch: Sequence[Sequence[Encoded]], most_tokens: int | None
) -> list[Sequence[Sequence[Encoded]]]:
    """Return runs of at least 1 pair and at most ``most_tokens`` tokens."""
    parts, begin, held = [], 0, 0
    for i, both in enumerate(batch):
        held += (size := sum(len(e.tokens) for e in both))
        if most_tokens is not None and held > most_tokens and i > begin:
            parts.append(batch[begin:i])
            begin, held = i, size
    return [*parts, batch[begin:]]
