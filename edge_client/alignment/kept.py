"""What a client's state keeps of alignment from one round to the next: moments, and its critics."""

from __future__ import annotations

from collections.abc import Mapping

from edge_client.alignment.critic import Critic
from edge_client.descent import Moments
from edge_client.state import ClientState
from messaging.layout import Tensors

_CRITIC = "critic/"


def policy_moments(state: ClientState) -> Moments:
    """Return Adam's moments of the policy."""
    return Moments(first=state.first_moments, second=state.second_moments, steps=state.steps)


def critic_tensors(state: ClientState, objective: str) -> Tensors:
    """Return the head of an objective's critic; nothing where none was kept."""
    return _under(state.extra, f"{_CRITIC}{objective}/value/")


def critic_moments(state: ClientState, objective: str) -> Moments:
    """Return Adam's moments of an objective's critic."""
    return Moments(
        first=_under(state.extra, f"{_CRITIC}{objective}/m/"),
        second=_under(state.extra, f"{_CRITIC}{objective}/v/"),
        steps=int(state.numbers.get(f"critic_steps_{objective}", 0)),
    )


def critics_as_tensors(critics: Mapping[str, Critic]) -> Tensors:
    """Return critics, by objective, with their moments, as a state keeps them."""
    kept: Tensors = {}
    for name, critic in critics.items():
        moments = critic.moments()
        parts = {"value": critic.tensors(), "m": moments.first, "v": moments.second}
        for part, tensors in parts.items():
            kept |= {f"{_CRITIC}{name}/{part}/{n}": t for n, t in tensors.items()}
    return kept


def critic_steps(critics: Mapping[str, Critic]) -> dict[str, float]:
    """Return how many steps each critic has taken, as a state keeps it."""
    return {
        f"critic_steps_{name}": float(critic.moments().steps) for name, critic in critics.items()
    }


def _under(tensors: Tensors, prefix: str) -> Tensors:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
