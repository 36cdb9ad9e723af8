"""``run.json``: the record of a run, as scripts and dashboards read it.

Units: bytes, seconds, joules, nats. ``observed`` holds what this machine did and no comparison of
bits includes it. Everything else is a function of configuration, seed and accepted sets.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from cloud_aggregator.privacy import PrivacyRecord
from device_profiles.methods import RewardShares
from device_profiles.pricing import CostBasis
from messaging.protocol import DeviceRecord, Objective, PairFigures, Stage
from quantization.encoder_identity import EncoderIdentity
from quantization.identity import BaseIdentity

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


class EncoderRecord(_Part):
    """What the reward models read, where that is not the base."""

    name: str
    parameters: int
    width: int
    sha256: str


class DataRecord(_Part):
    """What the clients hold, together. In deployment the source is the clients' own.

    ``preferences`` are hashes, of the pairs of each objective and of the prompts.
    """

    source: str
    sha256: str | None = None
    examples: int
    held_out_examples: int = 0
    broken_rows: int = 0
    preferences: dict[str, str] = Field(default_factory=dict)
    partition: str | None = None
    alpha: float | None = None
    skew: float | None = None


class ClientRound(_Part):
    """One client's part of one round.

    Energy stands apart by what took it: radiated (``uplink_joules``), the radio's circuits,
    reception, training, and waiting for the round to end. ``battery_left`` is the share of a
    battery that is left after this round and all before it. ``others_*`` are of held-out examples
    of other clients; ``kept_steps`` are the training steps that early stopping kept.
    """

    id: str
    status: Status
    train_loss: float | None = None
    eval_loss: float | None = None
    eval_accuracy: float | None = None
    others_loss: float | None = None
    others_accuracy: float | None = None
    kept_steps: int | None = None
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
    pairs: dict[Objective, PairFigures] = Field(default_factory=dict)
    drift: float | None = None
    response_tokens: float | None = None
    responses_ended: float | None = None


class GlobalRound(_Part):
    """Example-weighted means over the clients that reported; the cloud runs no model.

    ``kl`` is of the round's rollouts, ``drift`` of the greedy responses after it. ``reward_loss``
    and ``reward_accuracy`` are weighted by held-out pairs; ``weighted_reward`` is of each client's
    score by its own user's preference.
    """

    eval_loss: float | None = None
    eval_accuracy: float | None = None
    others_loss: float | None = None
    others_accuracy: float | None = None
    reward_loss: float | None = None
    reward_accuracy: float | None = None
    reward_helpfulness: float | None = None
    reward_harmlessness: float | None = None
    weighted_reward: float | None = None
    kl: float | None = None
    drift: float | None = None


class Observed(_Part):
    """What this machine saw: no comparison of bits includes it.

    ``spent_seconds`` says where the round's time went, by part: of its devices, each on its own
    clock and summed over them (training, generation, evaluation, codec, disk), and of the
    aggregator (intake of what devices send, aggregation).
    """

    wall_seconds: float = 0.0
    retransmitted_bytes: int = 0
    peak_memory_bytes: int = 0
    refused: dict[str, int] = Field(default_factory=dict)
    spent_seconds: dict[str, float] = Field(default_factory=dict)


class StaleEntry(_Part):
    """A late update of an earlier round that this one folded in.

    ``staleness`` is in rounds; the update moved the global state by ``share`` of what it would have
    in time.
    """

    id: str
    round: int
    staleness: int
    share: float
    examples: int


class RoundRecord(_Part):
    """One round: one task out, a cohort's updates in, one global state out.

    ``stale`` are the late updates that came to it from earlier rounds, and ``stale_dropped`` counts
    those that had become too old. ``unchanged`` says why accepted updates moved nothing.
    ``taken_back`` says why a round of alignment was undone: what its clients have then is measured
    on the state before it, and ``dropped`` is what was measured on the state that it had made.
    ``waited_seconds`` is how long it waited, before it began, for enough devices to be there.
    """

    stage: Stage
    round: int
    accepted: list[str]
    virtual_seconds: float
    clients: list[ClientRound]
    global_: Annotated[GlobalRound, Field(alias="global")]
    waited_seconds: float = 0.0
    taken_back: str = ""
    dropped: GlobalRound | None = None
    stale: list[StaleEntry] = Field(default_factory=list)
    stale_dropped: int = 0
    unchanged: str = ""
    observed: Observed

    @property
    def moved(self) -> bool:
        """Whether any update came into the global state of this round."""
        return bool(self.accepted or self.stale)

    model_config = ConfigDict(extra="forbid", validate_by_name=True, serialize_by_alias=True)


class ClientBefore(_Part):
    """A client's held-out results before the first round of a stage."""

    id: str
    stage: Stage = "instruction"
    eval_loss: float | None
    eval_accuracy: float | None
    others_loss: float | None = None
    others_accuracy: float | None = None
    reward_helpfulness: float | None = None
    reward_harmlessness: float | None = None
    reward_accuracy: float | None = None


class Summary(_Part):
    """The run in a few figures. ``*_before`` is measured before the first round of its stage.

    ``worst_decile_accuracy`` is the mean of the lowest tenth of the clients, and
    ``accuracy_fairness`` is Jain's index of all of them. ``others_*`` are of the same personal
    models on held-out examples of other clients: the gap to ``eval_*`` is what is personal.
    ``clients_rewarded`` counts the clients whose weighted reward ends above where it began;
    ``longer_wins`` is the pair accuracy of the rule that the longer response is the better one.
    """

    eval_loss_before: float | None = None
    eval_loss_after: float | None = None
    eval_accuracy_before: float | None = None
    eval_accuracy_after: float | None = None
    worst_client_accuracy: float | None = None
    worst_decile_accuracy: float | None = None
    accuracy_fairness: float | None = None
    others_loss_before: float | None = None
    others_loss_after: float | None = None
    others_accuracy_before: float | None = None
    others_accuracy_after: float | None = None
    clients_improved: int | None = None
    mean_uplink_seconds: float = 0.0
    mean_uplink_joules: float = 0.0
    participation_fairness: float | None = None
    upload_bytes_total: int = 0
    reward_accuracy_after: float | None = None
    longer_wins: float | None = None
    weighted_reward_before: float | None = None
    weighted_reward_after: float | None = None
    clients_rewarded: int | None = None
    kl_after: float | None = None


class RunRecord(_Part):
    """The whole of ``run.json``.

    ``aggregation`` is the rule by which updates count (``docs/aggregation.md``); ``reward_shares``
    what of a reward model is learned and travels, and ``encoder`` what it reads, where that is not
    the base (``docs/rewards.md``); ``privacy`` what the rounds
    so far have spent, where each client's part is hidden.
    """

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
    aggregation: str = "mean"
    reward_shares: RewardShares = "head"
    encoder: EncoderRecord | None = None
    privacy: PrivacyRecord | None = None
    model: ModelRecord
    data: DataRecord
    clients: list[DeviceRecord] = Field(default_factory=list)
    before: list[ClientBefore] = Field(default_factory=list)
    rounds: list[RoundRecord] = Field(default_factory=list)
    summary: Summary = Field(default_factory=Summary)

    model_config = ConfigDict(extra="forbid", validate_by_name=True, serialize_by_alias=True)


def modelled_seconds(rounds: Sequence[RoundRecord]) -> float:
    """Return what rounds took on the clock of ``virtual_seconds``, with the waits before them."""
    return sum(r.waited_seconds + r.virtual_seconds for r in rounds)


def encoder_record(encoder: EncoderIdentity | None) -> EncoderRecord | None:
    """Return the record of an encoder; none of none."""
    if encoder is None:
        return None
    return EncoderRecord(
        name=encoder.name,
        parameters=encoder.parameters,
        width=encoder.width,
        sha256=encoder.sha256,
    )


def model_record(identity: BaseIdentity, priced: CostBasis | None = None) -> ModelRecord:
    """Return the record of a base, and of the shape that costs are computed on if it is another."""
    other = None
    if priced is not None:
        other = PricedRecord(
            name=priced.name,
            parameters=priced.parameters,
            layers=priced.base.layers,
            width=priced.base.width,
            lora_rank=priced.lora_rank,
        )
    return ModelRecord(
        name=identity.name,
        parameters=identity.parameters,
        layers=identity.shape.layers,
        width=identity.shape.width,
        sha256=identity.sha256,
        tokenizer_sha256=identity.tokenizer_sha256,
        priced=other,
    )
