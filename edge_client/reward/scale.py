"""One scale for averaged reward models: mean 0 and deviation 1 on the public reference set.

Bradley-Terry learning leaves the offset and size of a reward open, so a mean of heads has whatever
came about. Every device centres the same head on the same responses.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from device_profiles.errors import InputError
from edge_client.reward.head import Head, scores
from messaging.layout import Tensors

_LEAST_SHARE = 1e-5  # of the mean's size: fp32 rounding makes deviations of up to 1e-6 of it


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Where a head's raw scores lie on the reference set.

    Attributes:
        mean: Finite.
        deviation: Standard deviation (of the set itself, not estimated), above 0 and finite.
    """

    mean: float
    deviation: float

    @classmethod
    def of(cls, head: Head, features: Tensor) -> Scale:
        """Return the scale of a head.

        Args:
            head: One objective's.
            features: Of the reference responses. Shape (N, F).

        Raises:
            InputError: If its scores are not finite, or as good as equal.
        """
        raw = scores(head, features)
        if not np.isfinite(raw).all():
            raise InputError(
                "a reward head's scores on the reference set are not finite: its training "
                "diverged; choose a lower learning_rate"
            )
        mean, deviation = (float(raw.mean()), float(raw.std())) if len(raw) else (0.0, 0.0)
        if deviation <= _LEAST_SHARE * abs(mean):
            raise InputError(
                f"a reward head scores the {len(raw)} responses of the reference set alike "
                f"(deviation {deviation:g}, must be above 0), so its scores have no scale; train "
                "it on more pairs, or for more steps"
            )
        return cls(mean=mean, deviation=deviation)

    def centred(self, raw: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Return scores on the common scale, in deviations from the reference set's mean."""
        return (raw - self.mean) / self.deviation

    def folded(self, tensors: Tensors) -> Tensors:
        """Return a head that gives centred scores by itself: a critic's beginning.

        Args:
            tensors: Of the head that this scale is of.
        """
        folded: Tensors = {}
        for name, values in tensors.items():
            own = values.astype(np.float64)
            if name.endswith(".outer.bias"):
                own = (own - self.mean) / self.deviation
            elif name.endswith(".outer.weight"):
                own = own / self.deviation
            folded[name] = own.astype(np.float32)
        return folded
