"""``run.json``: the record of a run, as scripts and dashboards read it.

Units: bytes, seconds, joules, nats. ``observed`` holds what this machine did and no comparison of
bits includes it. Everything else is a function of configuration, seed and accepted sets.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from device_profiles.selection import jain_index
from messaging.protocol import DeviceRecord, Stage

Status = Literal["aggregated", "late", "lost", "rejected", "skipped"]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_assignment=True)


class PricedRecord(_Part):
    """The shape that delay and energy are computed on, where it is not the base's own."""

    name: str
    parameters: int
    layers: int
    width: int
    lora_rank: int


class ModelRecord(_Part):
    """The frozen base."""

    name: str
    parameters: int
    layers: int
    width: int
    sha256: str
    tokenizer_sha256: str
    priced: PricedRecord | None = None


class DataRecord(_Part):
    """What the clients hold, together. In deployment the source is the clients' own."""

    source: str
    sha256: str | None = None
    examples: int
    held_out_examples: int = 0
    broken_rows: int = 0
    partition: str | None = None
    alpha: float | None = None
    skew: float | None = None


class ClientRound(_Part):
    """One client's part of one round.

    Energy stands apart by what took it: radiated (``uplink_joules``), the radio's circuits,
    reception, training, and waiting for the round to end. ``battery_left`` is the share of a
    battery that is left after this round and all before it.
    """

    id: str
    status: Status
    train_loss: float | None = None
    eval_loss: float | None = None
    eval_accuracy: float | None = None
    upload_bytes: int = 0
    upload_parameters: int = 0
    download_bytes: int = 0
    downlink_seconds: float = 0.0
    downlink_joules: float = 0.0
    uplink_bits: float = 0.0
    uplink_seconds: float = 0.0
    uplink_joules: float = 0.0
    uplink_air_seconds: float = 0.0
    uplink_circuit_joules: float = 0.0
    uplink_joules_saved: float = 0.0
    compute_seconds: float = 0.0
    compute_joules: float = 0.0
    idle_seconds: float = 0.0
    idle_joules: float = 0.0
    battery_left: float | None = None
    reason: str = ""
    reward_helpfulness: float | None = None
    reward_harmlessness: float | None = None
    kl: float | None = None
    reward_accuracy: float | None = None


class GlobalRound(_Part):
    """Example-weighted means over the clients that reported; the cloud runs no model."""

    eval_loss: float | None = None
    eval_accuracy: float | None = None


class Observed(_Part):
    """What this machine saw: no comparison of bits includes it."""

    wall_seconds: float = 0.0
    retransmitted_bytes: int = 0
    peak_memory_bytes: int = 0
    refused: dict[str, int] = Field(default_factory=dict)


class RoundRecord(_Part):
    """One round: one task out, a cohort's updates in, one global state out."""

    stage: Stage
    round: int
    accepted: list[str]
    virtual_seconds: float
    clients: list[ClientRound]
    global_: Annotated[GlobalRound, Field(alias="global")]
    observed: Observed

    model_config = ConfigDict(extra="forbid", validate_by_name=True, serialize_by_alias=True)


class ClientBefore(_Part):
    """A client's held-out results before the first round."""

    id: str
    eval_loss: float | None
    eval_accuracy: float | None


class Summary(_Part):
    """The run in a few figures. ``*_before`` is measured before the first round."""

    eval_loss_before: float | None = None
    eval_loss_after: float | None = None
    eval_accuracy_before: float | None = None
    eval_accuracy_after: float | None = None
    worst_client_accuracy: float | None = None
    clients_improved: int | None = None
    mean_uplink_seconds: float = 0.0
    mean_uplink_joules: float = 0.0
    participation_fairness: float | None = None
    upload_bytes_total: int = 0


class RunRecord(_Part):
    """The whole of ``run.json``."""

    schema_: Annotated[Literal[1], Field(alias="schema")] = 1
    version: str
    status: Literal["done", "running", "stopped", "failed"] = "running"
    stop_reason: str | None = None
    run: str
    seed: int
    method: str
    stages: list[Stage]
    engine: str
    workers: int
    transport: str
    codec: str
    model: ModelRecord
    data: DataRecord
    clients: list[DeviceRecord] = Field(default_factory=list)
    before: list[ClientBefore] = Field(default_factory=list)
    rounds: list[RoundRecord] = Field(default_factory=list)
    summary: Summary = Field(default_factory=Summary)

    model_config = ConfigDict(extra="forbid", validate_by_name=True, serialize_by_alias=True)


def weighted_mean(pairs: list[tuple[float | None, int]]) -> float | None:
    """Return the mean of the values that are there, weighted by their example counts.

    The sum is exact, so the mean does not depend on the order of the pairs.
    """
    there = [(value, weight) for value, weight in pairs if value is not None and weight > 0]
    total = sum(weight for _, weight in there)
    return math.fsum(value * weight for value, weight in there) / total if total else None


def summarise(run: RunRecord) -> Summary:
    """Return the summary of a run from its rounds.

    A client's last held-out results count, whichever round they are from;
    ``worst_client_accuracy`` is the lowest of them, and ``clients_improved`` counts the clients
    whose accuracy is above theirs before the first round. A client that joined later has none.
    ``participation_fairness`` is Jain's index of how often each client's update counted.
    """
    weights = {c.id: c.held_out_examples for c in run.clients}
    before = {c.id: c.eval_accuracy for c in run.before if c.eval_accuracy is not None}
    last: dict[str, ClientRound] = {}
    for record in run.rounds:
        last.update({c.id: c for c in record.clients if c.eval_accuracy is not None})
    uploads = [c for r in run.rounds for c in r.clients if c.upload_bytes]
    after = {i: c.eval_accuracy for i, c in last.items() if c.eval_accuracy is not None}
    improved = [i for i, a in after.items() if i in before and a > before[i]]
    return Summary(
        eval_loss_before=weighted_mean([(c.eval_loss, weights[c.id]) for c in run.before]),
        eval_loss_after=weighted_mean([(c.eval_loss, weights[i]) for i, c in last.items()]),
        eval_accuracy_before=weighted_mean([(c.eval_accuracy, weights[c.id]) for c in run.before]),
        eval_accuracy_after=weighted_mean([(a, weights[i]) for i, a in after.items()]),
        worst_client_accuracy=min(after.values(), default=None),
        clients_improved=len(improved) if after else None,
        mean_uplink_seconds=_mean([c.uplink_seconds for c in uploads]),
        mean_uplink_joules=_mean([c.uplink_joules for c in uploads]),
        participation_fairness=_fairness(run),
        upload_bytes_total=sum(c.upload_bytes for c in uploads),
    )


def _fairness(run: RunRecord) -> float | None:
    """Return Jain's index of how often each client's update counted; none before any did."""
    counts = dict.fromkeys((c.id for c in run.clients), 0)
    for record in run.rounds:
        for client in record.accepted:
            counts[client] = counts.get(client, 0) + 1
    return jain_index(list(counts.values())) if any(counts.values()) else None


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0
