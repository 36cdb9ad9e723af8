"""Reward models: what their tensors are called, what they hold, what they start from.

A head is a network with one hidden layer on the features of a trunk: of a state, the trunk's hidden
state, the mean of the response's states so far, and the logarithm of how many these are. The trunk
is the bare base, or has adapters of the reward model's own at the sites of the run's adapters, or
changes of the reward model's own in every weight; or it is an encoder.
Shape letters: D width of the trunk, F features, H hidden units.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from device_profiles.errors import InputError
from device_profiles.modules import (
    BaseShape,
    NamedShape,
    adapter_tensors,
    base_tensors,
    initial_adapters,
)
from device_profiles.seeds import stream

HIDDEN = 64
#: Tokens that go through a trunk and back at once where adapters on it learn, unless one pair has
#: more: as many as a usual step of instruction tuning has, so about its memory.
PASS_TOKENS = 1024
TRUNK = "trunk"
#: What stands for the base itself as what reward models read.
BASE_TRUNK = "base"


def feature_count(width: int) -> int:
    """Return F of a trunk of width D: two vectors and a length."""
    return 2 * width + 1


def head_name(objective: str) -> str:
    """Return the name under which a head's tensors travel."""
    return f"reward.{objective}"


def trunk_prefix(objective: str) -> str:
    """Return what stands before the names of the adapters on a reward model's trunk."""
    return f"{head_name(objective)}.{TRUNK}."


def head_tensors(objective: str, width: int, hidden: int = HIDDEN) -> list[NamedShape]:
    """Return the tensors of one objective's head: H*F + 2*H + 1 parameters.

    Args:
        objective: ``helpfulness`` or ``harmlessness``.
        width: D of the trunk, at least 1.
        hidden: H, at least 1.

    Raises:
        InputError: If ``width`` or ``hidden`` is below 1.
    """
    for name, value in (("trunk width", width), ("hidden units", hidden)):
        if value < 1:
            raise InputError(f"{name} {value} of a reward head; give at least 1")
    inner, outer = (f"{head_name(objective)}.{layer}" for layer in ("inner", "outer"))
    features = feature_count(width)
    return [
        NamedShape(name=f"{inner}.weight", shape=(hidden, features), bottleneck_axis=0),
        NamedShape(name=f"{inner}.bias", shape=(hidden,), bottleneck_axis=None),
        NamedShape(name=f"{outer}.weight", shape=(1, hidden), bottleneck_axis=None),
        NamedShape(name=f"{outer}.bias", shape=(1,), bottleneck_axis=None),
    ]


def initial_heads(
    objectives: Iterable[str], width: int, hidden: int, seed: int
) -> dict[str, npt.NDArray[np.float32]]:
    """Return the heads that every device of a run starts from.

    Weights are uniform within one over the root of their inputs, biases zero. The values belong to
    (seed, tensor name).

    Raises:
        InputError: If ``width`` or ``hidden`` is below 1.
    """
    tensors = {}
    for objective in objectives:
        for tensor in head_tensors(objective, width, hidden):
            if tensor.name.endswith(".weight"):
                bound = tensor.shape[1] ** -0.5
                values = stream(seed, "reward", tensor.name).uniform(-bound, bound, tensor.shape)
            else:
                values = np.zeros(tensor.shape)
            tensors[tensor.name] = values.astype(np.float32)
    return tensors


@dataclass(frozen=True, kw_only=True)
class TrunkShape:
    """What a reward model's head reads, and what of it is the reward model's own.

    Attributes:
        base: The trunk, but for an encoder.
        adapter_size: Bottleneck size of the adapters that each reward model has on it; 0 for none.
        whole: Whether each reward model has a trunk of its own: the base and a change of each of
            its weights.
        encoder_width: Width of the encoder that is the trunk instead; none for the base.
    """

    base: BaseShape
    adapter_size: int = 0
    whole: bool = False
    encoder_width: int | None = None

    @property
    def width(self) -> int:
        """D of what the heads read."""
        return self.encoder_width or self.base.width

    @property
    def own(self) -> bool:
        """Whether a trunk is read for one reward model alone."""
        return self.whole or self.adapter_size > 0


def reward_tensors(objective: str, trunk: TrunkShape) -> list[NamedShape]:
    """Return the tensors of one reward model: its head's, then those of its trunk that are its own.

    Args:
        objective: ``helpfulness`` or ``harmlessness``.
        trunk: What it reads.

    Raises:
        InputError: If the adapters do not fit the trunk, or its weights are not known.
    """
    mine = adapter_tensors(trunk.base, trunk.adapter_size) if trunk.adapter_size else []
    mine += base_tensors(trunk.base) if trunk.whole else []
    own = [replace(t, name=trunk_prefix(objective) + t.name) for t in mine]
    return [*head_tensors(objective, trunk.width), *own]


def initial_rewards(
    objectives: Iterable[str], trunk: TrunkShape, seed: int
) -> dict[str, npt.NDArray[np.float32]]:
    """Return the reward models that every device of a run starts from.

    Their adapters are those that the run's own start as, and the changes of whole trunks are zero:
    they change nothing yet, so that a reward model starts by reading the bare trunk.

    Raises:
        InputError: If the adapters do not fit the trunk, or its weights are not known.
    """
    own: dict[str, npt.NDArray[np.float32]] = {}
    if trunk.adapter_size:
        own = initial_adapters(trunk.base, trunk.adapter_size, seed)
    if trunk.whole:
        own = {t.name: np.zeros(t.shape, np.float32) for t in base_tensors(trunk.base)}
    tensors: dict[str, npt.NDArray[np.float32]] = {}
    for objective in objectives:
        tensors |= initial_heads([objective], trunk.width, HIDDEN, seed)
        tensors |= {trunk_prefix(objective) + n: t.copy() for n, t in own.items()}
    return tensors


def check_trunk(
    reward_trunk: str, reward_shares: str, trunk_precision: str | None = None, where: str = ""
) -> None:
    """Refuse what of a trunk cannot be a reward model's own.

    Args:
        reward_trunk: ``base``, or what names an encoder.
        reward_shares: What of a reward model is learned and travels.
        trunk_precision: Of the base; none where whoever asks does not hold it.
        where: It is asked for; begins the sentence.

    Raises:
        InputError: If an encoder is to change, or weights that are not held in fp32.
    """
    if reward_trunk != BASE_TRUNK and reward_shares != "head":
        raise InputError(
            f"{where}reward_shares = '{reward_shares}' with reward_trunk = '{reward_trunk}': only "
            f"the base changes; give reward_trunk = '{BASE_TRUNK}', or reward_shares = 'head'"
        )
    if reward_shares == "all" and trunk_precision not in {None, "fp32"}:
        raise InputError(
            f"{where}trunk_precision = '{trunk_precision}' with reward_shares = 'all': weights "
            "that learn are held in fp32; give trunk_precision = 'fp32'"
        )
