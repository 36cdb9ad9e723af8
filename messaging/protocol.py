"""The messages of the protocol, each with its bounds. Whatever arrives passes through here first.

A message is one JSON object of at most 64 KiB with a ``schema`` version and a ``kind``. Chunks of
tensors travel apart from it as binary DATA (see ``chunks``). Units: bytes, seconds, joules.

Versions: ``schema`` is the protocol that the sender speaks. A newer one may only add fields that
can be left out, and kinds; so a message of a newer one is read without the fields that are not
known here, each known one within its bounds, and a newer aggregator serves older devices. What
changes the meaning of a message raises ``OLDEST`` as well: what is older than that is refused, and
the manifest tells a device which protocols its aggregator still understands.

Up, from a device:    HELLO, ALIVE, OFFER, WANT, REPORT
Down, to a device:    TASK, GRANT, HAVE, DONE, REJECT
To everybody:         MANIFEST (retained)
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Final, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from messaging.chunks import MAX_CHUNKS, chunk_count
from messaging.errors import OtherVersionError, ProtocolError
from messaging.topics import IDENTIFIER

SCHEMA: Final = 1  # what this side speaks
OLDEST: Final = 1  # the oldest that it still understands
MAX_MESSAGE_BYTES = 65_536

Identifier = Annotated[str, Field(pattern=f"^{IDENTIFIER}$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0, le=2**53)]
Amount = Annotated[float, Field(ge=0, le=1e15)]
Loss = Annotated[float, Field(ge=0, le=1e6)]
Share = Annotated[float, Field(ge=0, le=1)]
Round = Annotated[int, Field(ge=0, le=1_000_000)]
Bitmap = Annotated[str, Field(pattern=r"^([0-9a-f]{2})*$", max_length=MAX_CHUNKS // 4)]
Category = Annotated[str, Field(max_length=200)]
Url = Annotated[str, Field(max_length=2000, pattern=r"^(file|s3|https?)://[^\s]+$")]
Score = Annotated[float, Field(ge=-1e6, le=1e6)]
Stage = Literal["instruction", "reward", "alignment"]
Objective = Literal["helpfulness", "harmlessness"]
Precision = Literal["fp32", "bf16", "int8", "int8-dynamic", "nf4"]
Codec = Literal["fp32", "fp16", "int8", "int4"]
Algorithm = Literal["ppo", "rloo", "dpo"]  # of alignment
Part = Literal["training", "generation", "evaluation", "codec", "disk"]
Outcome = Literal["aggregated", "late", "lost", "rejected", "skipped", "none"]


class Record(BaseModel):
    """A frozen record: no field that the schema does not name, no number that is not finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Channel(Record):
    """A device's uplink as the run's record states it; what it has no use for is left out."""

    snr_db: Annotated[float, Field(ge=-100, le=100)]
    bandwidth_hz: Annotated[float, Field(gt=0, le=1e12)]
    transmit_watts: Annotated[float, Field(ge=0, le=1e4)]
    fading: Literal["rayleigh", "rician", "none"]
    coherence_seconds: Annotated[float, Field(gt=0, le=1e4)]
    rician_k: Annotated[float, Field(gt=0, le=1000)] | None = None
    shadowing_db: Annotated[float, Field(ge=0, le=20)] = 0.0
    scheme: Literal["adaptive", "fixed-rate", "outage", "inversion"] = "adaptive"
    rate_bits_per_hz: Annotated[float, Field(gt=0, le=100)] | None = None
    cut_off_gain: Annotated[float, Field(gt=0, le=1000)] | None = None
    csi_error_variance: Annotated[float, Field(ge=0, lt=1)] = 0.0
    sharing: Literal["dedicated", "tdma", "fdma"] = "dedicated"
    sharers: Annotated[int, Field(ge=1, le=100_000)] = 1


class Preference(Record):
    """How much a user cares for each objective; the two sum to one."""

    helpfulness: Share
    harmlessness: Share

    @model_validator(mode="after")
    def _sum_to_one(self) -> Preference:
        total = self.helpfulness + self.harmlessness
        if abs(total - 1) > 1e-6:
            raise ValueError(f"helpfulness and harmlessness sum to {total:g}; they must sum to 1")
        return self


class Power(Record):
    """What a device draws besides training and sending, watts, and what its battery holds."""

    idle_watts: Annotated[float, Field(ge=0, le=1e5)] = 0.0
    receive_watts: Annotated[float, Field(ge=0, le=1e4)] = 0.0
    circuit_watts: Annotated[float, Field(ge=0, le=1e4)] = 0.0
    battery_joules: Annotated[float, Field(gt=0, le=1e12)] | None = None


def encoder_mark(sha256: str | None) -> str:
    """Return what of an encoder's hash stands in ``DeviceRecord.scoring``; empty for none."""
    return (sha256 or "")[:24]


def encoder_of(scoring: str) -> str:
    """Return the mark of the encoder that a device scores by; empty for none."""
    return scoring.partition(":")[0].partition("+")[2]


class DeviceRecord(Record):
    """What a device says of itself; it becomes the client's entry in ``run.json``.

    ``scoring`` names what reward models read and are scaled by: the trunk's precision, ``+`` and
    the beginning of an encoder's hash where there is one, ``:`` and the hash of the reference set.
    It is the same on every device of a run, and empty without reward models.
    """

    id: Identifier
    profile: Identifier
    lora_count: Annotated[int, Field(ge=0, le=4096)]
    lora_rank: Annotated[int, Field(ge=0, le=65_536)]
    lora_rank_rule: Literal["given", "proportional", "none"]
    adapter_count: Annotated[int, Field(ge=0, le=4096)]
    adapter_size: Annotated[int, Field(ge=0, le=65_536)]
    placement: Identifier
    precision: Precision
    threads: Annotated[int, Field(ge=1, le=4096)]
    base_bytes: Count
    examples: Count
    held_out_examples: Count
    preference_pairs: Count = 0
    categories: Annotated[dict[Category, Count], Field(max_length=64)]
    trainable_parameters: Count
    shared_parameters: Count
    preference: Preference
    scoring: Annotated[str, Field(max_length=100)] = ""
    channel: Channel
    power: Power = Power()
    costs: Literal["modelled", "measured"]


class Costs(Record):
    """What a device's part of a round took: modelled in emulation, measured on a real device.

    ``uplink_joules`` are radiated; the radio's circuits and reception stand apart.
    ``uplink_joules_saved`` by waiting for good coherence blocks; below 0 where it cost more. An
    upload that is ``lost`` on the air has cost its time and energy all the same.
    """

    download_bytes: Count = 0
    downlink_seconds: Amount = 0.0
    downlink_joules: Amount = 0.0
    compute_seconds: Amount = 0.0
    compute_joules: Amount = 0.0
    uplink_bits: Amount = 0.0
    uplink_seconds: Amount = 0.0
    uplink_joules: Amount = 0.0
    uplink_air_seconds: Amount = 0.0
    uplink_circuit_joules: Amount = 0.0
    uplink_joules_saved: Annotated[float, Field(ge=-1e15, le=1e15)] = 0.0
    lost: bool = False


class PairFigures(Record):
    """Held-out results of a reward model on a client's own preference pairs.

    Attributes:
        loss: Bradley-Terry's, nats a pair.
        accuracy: Share of the pairs whose chosen side scores higher; a tie counts one half.
        longer_wins: The same of the rule that the longer response is the better one.
        calibration_error: Expected calibration error of the predicted preference.
    """

    pairs: Count
    loss: Loss
    accuracy: Share
    longer_wins: Share
    calibration_error: Share


class ResponseFigures(Record):
    """Greedy responses to a client's own held-out prompts, scored without penalties.

    Attributes:
        scores: Mean re-centred score by objective.
        tokens: Mean length, the end token not counted.
        ended: Share of the responses that ended by themselves.
        kl: Mean over the last round's rollouts of the summed per-token divergence from the stage-1
            policy, nats, as ``log p - log p_reference`` of what was drawn; none before training.
            Rollouts are drawn before the step that learns from them.
        drift: The same sum over these greedy responses, under the policy as it is now: no
            divergence, but what shows at once that it has gone far.
    """

    responses: Annotated[int, Field(ge=0, le=10_000)]
    scores: dict[Objective, Score]
    tokens: Amount
    ended: Share
    kl: Score | None = None
    drift: Score = 0.0


#: Of AdamW in alignment, where nobody says another: PPO and DPO take many updates of a batch each,
#: RLOO one a step.
LEARNING_RATES: dict[Algorithm, float] = {"ppo": 3e-4, "rloo": 1e-3, "dpo": 3e-4}


class AlignmentSettings(Record):
    """How a device aligns its model.

    Attributes:
        algorithm: PPO, leave-one-out REINFORCE, or DPO on the device's own pairs.
        rollouts: Prompts that are answered a step.
        max_new_tokens: Of a response.
        temperature: Rollouts are drawn at; old, new and reference probabilities are of it too.
        kl_coefficient: What a nat of divergence costs at first.
        kl_target: Nats that the coefficient is steered to; 0 keeps it as it is.
        kl_limit: Mean nats of a step's rollouts beyond which a device takes no further step, and
            of a round's beyond which the round is taken back.
        held_out_prompts: Answered at most when results are measured.
    """

    algorithm: Algorithm = "ppo"
    rollouts: Annotated[int, Field(ge=1, le=4096)] = 16
    max_new_tokens: Annotated[int, Field(ge=1, le=4096)] = 48
    temperature: Annotated[float, Field(gt=0, le=10)] = 0.7
    kl_coefficient: Annotated[float, Field(ge=0, le=100)] = 0.15
    kl_target: Annotated[float, Field(ge=0, le=1000)] = 6.0
    kl_limit: Annotated[float, Field(gt=0, le=1e6)] = 50.0
    held_out_prompts: Annotated[int, Field(ge=1, le=10_000)] = 16


class _Message(Record):
    schema_: Annotated[int, Field(alias="schema", ge=1, le=1000)] = SCHEMA
    run: Identifier


class _FromDevice(_Message):
    client: Identifier
    session: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]


class Hello(_FromDevice):
    """Retained on the device's ``state`` topic; the broker publishes ``online=False`` for it.

    ``epoch`` counts the device's starts, on its own disk: a session of a lower one is over.
    """

    kind: Literal["HELLO"] = "HELLO"
    epoch: Count = 0
    online: bool
    binding: Sha256
    layout: Sha256
    device: DeviceRecord | None = None


class Alive(_FromDevice):
    """Says from time to time that the device is there, in training too."""

    kind: Literal["ALIVE"] = "ALIVE"


class Offer(_FromDevice):
    """An update is ready. Sent again with the same blob, it resumes.

    With ``url``, the blob lies there to be fetched, and no chunk travels over the broker.
    ``spent`` are seconds of the device's own clock, by part of the work; for looking at only.
    """

    kind: Literal["OFFER"] = "OFFER"
    round: Round
    blob: Sha256
    bytes: Annotated[int, Field(ge=1, le=2**33)]
    chunk_bytes: Annotated[int, Field(ge=1024, le=268_435_455)]
    chunks: Annotated[int, Field(ge=1, le=MAX_CHUNKS)]
    binding: Sha256
    layout: Sha256
    codec: Codec
    costs: Costs
    url: Url | None = None
    spent: dict[Part, Amount] = {}


class Want(_FromDevice):
    """Asks for chunks of a global state, named by its hash; ``missing`` is a bitmap."""

    kind: Literal["WANT"] = "WANT"
    blob: Sha256
    missing: Bitmap


class Report(_FromDevice):
    """Held-out results on the state of ``round``, or a training that has nothing to upload.

    ``stage`` and ``phase`` are the task's: one round is measured again when it is taken back, and
    where the next stage begins. ``others_*`` are of held-out examples of other clients, and
    ``kept_steps`` are those of the round's training that early stopping kept. ``spent`` as in
    OFFER.
    """

    kind: Literal["REPORT"] = "REPORT"
    stage: Stage = "instruction"
    round: Round
    phase: Literal["train", "evaluate", "restore"]
    examples: Count
    train_loss: Loss | None = None
    eval_loss: Loss | None = None
    eval_accuracy: Share | None = None
    pairs: dict[Objective, PairFigures] = {}
    responses: ResponseFigures | None = None
    others_loss: Loss | None = None
    others_accuracy: Share | None = None
    kept_steps: Count | None = None
    costs: Costs
    spent: dict[Part, Amount] = {}


class StateRef(Record):
    """A global state by content: enough to ask for it and to check it.

    With ``url``, it lies there to be fetched, and no chunk travels over the broker.
    """

    round: Round
    blob: Sha256
    bytes: Annotated[int, Field(ge=1, le=2**33)]
    chunk_bytes: Annotated[int, Field(ge=1024, le=268_435_455)]
    chunks: Annotated[int, Field(ge=1, le=MAX_CHUNKS)]
    url: Url | None = None

    @model_validator(mode="after")
    def _chunks_follow_from_bytes(self) -> StateRef:
        expected = chunk_count(self.bytes, self.chunk_bytes)
        if self.chunks != expected:
            raise ValueError(
                f"{self.chunks} chunks for {self.bytes} bytes; "
                f"pieces of {self.chunk_bytes} bytes make {expected}"
            )
        return self


class Task(_Message):
    """One piece of work for one device: install ``state``, then train or evaluate, or stop.

    To ``restore`` is to take ``state`` and the device's own part as it was before ``round`` for
    what comes of that round, and to evaluate it. In alignment, ``reward`` names the reward models
    to score by, and ``reference`` the shared part of the stage-1 policy.
    ``outcome`` says what became of the device's last update: of ``outcome_round``, or without one
    of ``round`` when it evaluates and of the round before when it trains. ``upload_within_seconds``
    of the round's beginning: above 0, the device may wait so long for a good channel. ``private``
    asks for no loss, count or figure of the device's data: client-level privacy is on.
    ``proximal`` and the five after it hold back instruction tuning: see ``edge_client.restraint``.
    """

    kind: Literal["TASK"] = "TASK"
    client: Identifier
    work: Literal["train", "evaluate", "restore", "stop"]
    stage: Stage
    round: Round
    state: StateRef | None
    reward: StateRef | None = None
    reference: StateRef | None = None
    outcome: Outcome = "none"
    outcome_round: Round | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    local_steps: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    batch_size: Annotated[int, Field(ge=1, le=65_536)] = 1
    learning_rate: Annotated[float, Field(ge=0, le=100)] = 0.0
    codec: Codec = "fp32"
    upload_within_seconds: Annotated[float, Field(ge=0, le=1e9)] = 0.0
    max_length: Annotated[int, Field(ge=8, le=1_048_576)] = 512
    margin: Annotated[float, Field(ge=0, le=100)] = 0.0
    alignment: AlignmentSettings | None = None
    proximal: Annotated[float, Field(ge=0, le=1e6)] = 0.0
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    weight_decay: Annotated[float, Field(ge=0, le=100)] = 0.0
    stopping_patience: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    validation_share: Annotated[float, Field(gt=0, lt=1)] = 0.2
    validation_every: Annotated[int, Field(ge=1, le=1_000_000)] = 4
    private: bool = False
    reason: Annotated[str, Field(max_length=400)] = ""


class Grant(_Message):
    """Send these chunks now, at most ``window`` of them not yet acknowledged by a HAVE."""

    kind: Literal["GRANT"] = "GRANT"
    client: Identifier
    blob: Sha256
    missing: Bitmap
    window: Annotated[int, Field(ge=1, le=4096)]
    expiry_seconds: Annotated[float, Field(gt=0, le=1e6)]


class Have(_Message):
    """What is still missing of a granted upload."""

    kind: Literal["HAVE"] = "HAVE"
    client: Identifier
    blob: Sha256
    missing: Bitmap


class Done(_Message):
    """The update is on the aggregator's disk, its hash verified; the device may forget it."""

    kind: Literal["DONE"] = "DONE"
    client: Identifier
    blob: Sha256
    status: Literal["stored", "late"]


class Reject(_Message):
    """The offer or the update is refused; sending the same again is of no use."""

    kind: Literal["REJECT"] = "REJECT"
    client: Identifier
    blob: Sha256 | None
    code: Annotated[str, Field(pattern=r"^[a-z-]{1,32}$")]
    reason: Annotated[str, Field(max_length=400)]


class Manifest(_Message):
    """Retained: the newest global state, and what a device must be built on to use it.

    A ``session`` that a device has not seen is an aggregator that has not seen the device;
    ``epoch`` counts the aggregator's starts. ``reconnect_seconds`` is the window over which devices
    spread their return after a break. ``taken_back`` are rounds of which nothing has come.
    ``oldest`` is the oldest protocol that the aggregator understands.
    """

    kind: Literal["MANIFEST"] = "MANIFEST"
    session: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
    method: Identifier
    stage: Stage
    state: StateRef | None
    binding: Sha256
    layout: Sha256
    finished: bool = False
    epoch: Count = 0
    reconnect_seconds: Annotated[float, Field(ge=0, le=86_400)] = 0.0
    taken_back: Annotated[tuple[Round, ...], Field(max_length=1000)] = ()
    oldest: Annotated[int, Field(ge=1, le=1000)] = OLDEST


Message = Hello | Alive | Offer | Want | Report | Task | Grant | Have | Done | Reject | Manifest
_MESSAGES: TypeAdapter[Message] = TypeAdapter(Annotated[Message, Field(discriminator="kind")])


def encode(message: Message) -> bytes:
    """Return the message as compact UTF-8 JSON."""
    return message.model_dump_json(by_alias=True).encode()


def decode(payload: bytes) -> Message:
    """Return the message that ``payload`` holds, every field within its bounds.

    Raises:
        ProtocolError: With code ``size``, or ``schema`` and the first field that is wrong.
        OtherVersionError: If it is older than what is understood here.
    """
    if len(payload) > MAX_MESSAGE_BYTES:
        raise ProtocolError(
            "size", f"message of {len(payload)} bytes; at most {MAX_MESSAGE_BYTES} are read"
        )
    try:
        message = _MESSAGES.validate_json(payload)
    except ValidationError as err:
        message = _of_a_newer_side(payload, err)
    if message.schema_ < OLDEST:
        raise OtherVersionError(
            f"a message of protocol {message.schema_}, and this side understands {OLDEST} to "
            f"{SCHEMA}; update pwff on the other side",
        )
    return message


def _of_a_newer_side(payload: bytes, err: ValidationError) -> Message:
    """Return a message of a newer protocol without the fields that are not known here.

    Raises:
        ProtocolError: If it is of no newer one, or wrong in what is known.
    """
    errors = err.errors(include_url=False, include_input=False)
    unknown = [e["loc"] for e in errors if e["type"] == "extra_forbidden"]
    if len(unknown) == len(errors):
        try:
            record = json.loads(payload)
            if record["schema"] > SCHEMA:
                for _kind, *way in unknown:
                    _strike(record, way)
                return _MESSAGES.validate_json(json.dumps(record))
        except ValidationError as again:
            errors = again.errors(include_url=False, include_input=False)
        except (LookupError, TypeError, ValueError, RecursionError):
            pass  # what only the first reader takes for JSON; its words stand
    first = errors[0]
    place = ".".join(str(part) for part in first["loc"]) or "message"
    raise ProtocolError("schema", f"{place}: {first['msg']}") from err


def _strike(record: Any, place: list[int | str]) -> None:
    *above, last = place
    for step in above:
        record = record[step]
    del record[last]
