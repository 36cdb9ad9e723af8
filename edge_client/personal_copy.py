"""A device's own copy of what it shares, held near the global one: Ditto, on PWFF's modules.

The shared part w is trained and uploaded as without it, to the same bits. Beside it the device
keeps a personal model v, all of its adapters and LoRA modules, trained on the same examples to
make ``F(v) + lambda / 2 ||v_shared - w||^2`` smaller, w being the state that the round began with:
lambda pulls the copy of what is shared, and its own LoRA, which has no global counterpart, is free.
It is v that is measured, reported and exported. A client that has not trained has none, and is
measured on the global state.

What it costs: a second training in every round (twice the compute), and three vectors of the
trainable tensors on the device's disk (values and Adam's moments); no memory, no byte on the air.
Source: Li et al. 2021, "Ditto: Fair and Robust Federated Learning Through Personalization",
algorithm 1, with deviations: AdamW with a clipped gradient in place of plain gradient steps, and a
part (LoRA) that is personal in both models.
"""

from __future__ import annotations

from dataclasses import replace

from edge_client.policy import Policy
from edge_client.restraint import Anchor
from edge_client.state import COPY, ClientState, extra_group
from edge_client.trainer import Training
from messaging.layout import Vector

#: Groups of the state's extra tensors: values, first and second moments.
_GROUPS = (COPY, f"{COPY}-m", f"{COPY}-v")
_STEPS = "ditto_steps"


def with_copy(state: ClientState, done: Training) -> ClientState:
    """Return the state with a personal model that has been trained."""
    extra = {
        f"{group}/{name}": tensor
        for group, tensors in zip(
            _GROUPS, (done.tensors, done.first_moments, done.second_moments), strict=True
        )
        for name, tensor in tensors.items()
    }
    numbers = {**state.numbers, _STEPS: float(done.steps)}
    return replace(state, extra={**state.extra, **extra}, numbers=numbers)


def install_copy(policy: Policy, state: ClientState, shared: Vector | None) -> ClientState:
    """Put a device's personal model on its model; return its moments as a state to train from.

    Without one yet, it begins with the global state and the device's own LoRA.

    Raises:
        InputError: If the state is of other modules than the device's.
    """
    policy.install(state, shared)
    copy = extra_group(state, COPY)
    if not copy:
        return ClientState(round=state.round, personal={})
    policy.model.put(copy)
    return ClientState(
        round=state.round,
        personal={},
        first_moments=extra_group(state, _GROUPS[1]),
        second_moments=extra_group(state, _GROUPS[2]),
        steps=int(state.numbers[_STEPS]),
    )


def anchor(policy: Policy, shared: Vector, pull: float) -> Anchor:
    """Return what a round's proximal term pulls towards: the device's part of the global state."""
    return Anchor(values=shared[: policy.layout.size], pull=pull)
