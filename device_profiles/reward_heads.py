"""Reward models: what their tensors are called, what they hold, what they start from.

A head is a network with one hidden layer on the features of a trunk: of a state, the trunk's hidden
state, the mean of the response's states so far, and the logarithm of how many these are. The trunk
is the bare base, or has adapters of the reward model's own at the sites of the run's adapters.
Shape letters: D width of the trunk, F features, H hidden units.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from device_profiles.errors import InputError
from device_profiles.modules import BaseShape, NamedShape, adapter_tensors, initial_adapters
from device_profiles.seeds import stream

HIDDEN = 64
#: Tokens that go through a trunk and back at once where adapters on it learn, unless one pair has
#: more: as many as a usual step of instruction tuning has, so about its memory.
PASS_TOKENS = 1024
TRUNK = "trunk"


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


def reward_tensors(
    objective: str, base: BaseShape, adapter_size: int = 0, encoder_width: int | None = None
) -> list[NamedShape]:
    """Return the tensors of one reward model: its head's, then those of its trunk's adapters.

    Args:
        objective: ``helpfulness`` or ``harmlessness``.
        base: The trunk, as a rule.
        adapter_size: Bottleneck size of the adapters on it; 0 for a bare trunk.
        encoder_width: Width of the encoder that is the trunk instead; none for the base.

    Raises:
        InputError: If the adapters do not fit the trunk.
    """
    adapters = adapter_tensors(base, adapter_size) if adapter_size else []
    own = [replace(t, name=trunk_prefix(objective) + t.name) for t in adapters]
    return [*head_tensors(objective, encoder_width or base.width), *own]


def initial_rewards(
    objectives: Iterable[str],
    base: BaseShape,
    adapter_size: int,
    seed: int,
    encoder_width: int | None = None,
) -> dict[str, npt.NDArray[np.float32]]:
    """Return the reward models that every device of a run starts from.

    Their adapters are those that the run's own start as: they change nothing yet, so that a reward
    model starts by reading the bare trunk.

    Raises:
        InputError: If the adapters do not fit the trunk.
    """
    adapters = initial_adapters(base, adapter_size, seed) if adapter_size else {}
    tensors: dict[str, npt.NDArray[np.float32]] = {}
    for objective in objectives:
        tensors |= initial_heads([objective], encoder_width or base.width, HIDDEN, seed)
        tensors |= {trunk_prefix(objective) + n: t.copy() for n, t in adapters.items()}
    return tensors
