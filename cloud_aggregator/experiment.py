"""An experiment: everything that an emulated run is a function of, from a TOML file and options."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from cloud_aggregator.counting import CountingKeys, check_counting
from cloud_aggregator.methods import METHODS, find_method
from cloud_aggregator.presence import PresenceKeys, presence_of
from cloud_aggregator.restraint import RestraintSettings, check_restraint
from cloud_aggregator.rounds import RoundRules
from cloud_aggregator.stages import check_room
from device_profiles.config_files import check, choose, read_toml
from device_profiles.errors import InputError
from device_profiles.link import PAPER_LINK, Link, profile_link
from device_profiles.methods import RewardShares
from device_profiles.modules import PLACEMENTS
from device_profiles.profile import Radio
from device_profiles.reward_heads import BASE_TRUNK, check_trunk
from device_profiles.stages import STAGES, parse_stages
from messaging.chunks import CHUNK_BYTES, ChunkBytes
from messaging.mqtt import parse_address
from messaging.protocol import LEARNING_RATES, Algorithm, AlignmentSettings, Codec, Stage

_MOST = 1_000_000
Positive = Annotated[int, Field(ge=1, le=_MOST)]


def _counts(value: object) -> object:
    """Read ``6`` and ``6,4,4``, as a command line has them, besides TOML's numbers and lists."""
    if isinstance(value, str):
        value = [word.strip() for word in value.split(",")]
        value = [int(word) if word.isdecimal() else word for word in value]
        value = value[0] if len(value) == 1 else value
    given = value if isinstance(value, list) else [value]
    sound = all(type(one) is int and 1 <= one <= _MOST for one in given)
    if not sound or not 1 <= len(given) <= len(STAGES):
        raise ValueError(
            f"give a whole number from 1 to {_MOST}, or one for each stage, separated by commas"
        )
    return value


def _alignment_rate(given: dict[str, Any]) -> float:
    return LEARNING_RATES.get(given.get("algorithm", "ppo"), 0.0)  # one that is none is refused


#: One number for every stage, or one a stage.
Counts = Annotated[int | list[int], BeforeValidator(_counts)]

DEFAULT_ROUNDS: dict[Stage, int] = {"instruction": 6, "reward": 5, "alignment": 4}
DEFAULT_STEPS: dict[Stage, int] = {"instruction": 12, "reward": 40, "alignment": 2}

#: Settings that change how a run is done and not what comes of it; a resumed run may change them.
HOW = frozenset(
    {
        "engine", "address", "workers", "transport", "broker", "broker_port",
        "broker_wait_seconds", "features", "rounds",
    }
)  # fmt: skip


#: Settings of a link that an experiment may make for all its clients.
LINK_FIELDS = (
    "fading",
    "coherence_seconds",
    "rician_k",
    "shadowing_db",
    "scheme",
    "rate_bits_per_hz",
    "cut_off_gain",
    "csi_error_variance",
    "sharing",
)


class Experiment(CountingKeys, PresenceKeys):
    """One emulated run.

    Attributes:
        method: Row of the methods table.
        clients: How many devices are drawn.
        fleet: Name or TOML file of a mix of device profiles.
        stages: ``instruction``, ``reward`` and ``alignment``, separated by commas.
        rounds: At most so many; one number, or one a stage.
        local_steps: Optimiser steps a client takes a round (of alignment, batches of rollouts);
            one number, or one a stage.
        model: ``mini``, a checkpoint folder or a hub id.
        precision: Of the frozen base; ``auto`` is what each device's plan says.
        data: ``kit``, ``alpaca`` (hub) or a JSON or JSONL file.
        helpfulness: Preference pairs of that objective: ``kit``, a file, or a hub id.
        harmlessness: Likewise.
        preference: Weight of helpfulness of every user, instead of each one's own; harmlessness has
            the rest.
        prompts: Instructions that alignment answers: ``kit`` or a file; by default those of each
            client's own preference pairs.
        trunk_precision: Of the frozen base whose hidden states the reward models read; one for all.
        reward_trunk: What the reward models read: the ``base`` itself, or an encoder, a folder or a
            hub id such as ``distilbert-base-uncased``.
        reward_shares: What of a reward model is learned and travels: its ``head``, or ``adapters``,
            which its trunk then has too, or ``all`` of head and trunk (``docs/rewards.md``).
        reward_batch_size: Pairs a step of reward learning.
        reward_learning_rate: Of its AdamW.
        margin: By which the Bradley-Terry loss wants a chosen response to score higher.
        algorithm: Of alignment: ``ppo``, or the ablations ``rloo`` and ``dpo``.
        rollouts: Prompts that a step of alignment answers.
        alignment_learning_rate: Of its AdamW; by default 0.0003, of ``rloo`` 0.001.
        max_new_tokens: And the four after it: see ``messaging.protocol.AlignmentSettings``.
        reward_drop: Fall of the mean weighted reward below its beginning at which a round of
            alignment is taken back.
        held_out_prompts: That a client answers at most when results are measured.
        partition: How examples are divided among clients; ``alpha`` is Dirichlet's.
        skew: Exponent of the power law of the clients' sizes; 0 for equal sizes.
        held_out_share: Of each client's examples, where the data does not say itself.
        others_sample: Held-out examples of other clients that each client is measured on too, the
            same in every round; 0 for none.
        proximal: And the five after it: see ``cloud_aggregator.restraint.RestraintSettings``.
        lora_count: The same for every client, instead of its profile's.
        lora_rank: Instead of 96 at width 768 in proportion.
        channel: ``paper`` gives every client the paper's link, ``profile`` its own radio.
        fading: And the eight after it: of every client's link, as ``device_profiles.link.Link`` has
            them; where left out, its defaults. The cohort shares the band.
        priced_at: Shape that delay and energy are computed on: the ``base``'s own, or a larger one.
        priced_lora_rank: LoRA's rank there; by default 96 at width 768 in proportion.
        cohort: How many clients train in a round; by default all.
        selection: How they are chosen: by the pilot rate that each shows before the round, or by
            what asking it promises (``utility``).
        upload_policy: ``at-once``, or ``wait`` for good coherence blocks within the deadline.
        quorum: Share of the cohort whose updates end a round.
        deadline_seconds: Modelled seconds after which a round ends.
        epsilon: Nats by which the held-out loss must improve to count.
        patience: Rounds without improvement until training has converged; 0 for never.
        broker_port: Of the embedded broker; by default a free one.
        aggregation: And the eight after it: see ``cloud_aggregator.counting.CountingKeys``.
        threads: Processor threads a client computes with; part of what the bits depend on.
        engine: ``local`` emulates clients on this machine, ``ray`` on a Ray cluster.
        address: Of that cluster, ``HOST:PORT`` or ``auto``; without it Ray starts on this machine.
        workers: Processes that host clients; 0 for one a core (of the cluster's, with Ray).
        features: Folder in which workers keep what the trunk of the reward models says of pairs;
            by default the run's own. Runs that share one read the same pairs once.
    """

    method: str = "pwff"
    stages: str = "instruction"
    clients: Annotated[int, Field(ge=1, le=10_000)] = 10
    fleet: str = "mixed"
    rounds: Counts | None = None
    local_steps: Counts | None = None
    batch_size: Positive = 4
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 1e-3
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    model: str = "mini"
    precision: Literal["auto", "fp32", "bf16", "int8", "int8-dynamic", "nf4"] = "auto"
    data: str = "kit"
    helpfulness: str = "kit"
    harmlessness: str = "kit"
    preference: Annotated[float, Field(ge=0, le=1)] | None = None
    prompts: str | None = None
    trunk_precision: Literal["fp32", "bf16", "int8", "nf4"] = "int8"
    reward_trunk: str = BASE_TRUNK
    reward_shares: RewardShares = "head"
    reward_batch_size: Positive = 32
    reward_learning_rate: Annotated[float, Field(gt=0, le=1)] = 3e-4
    margin: Annotated[float, Field(ge=0, le=100)] = 0.0
    algorithm: Algorithm = "ppo"
    rollouts: Annotated[int, Field(ge=1, le=4096)] = 16
    alignment_learning_rate: float = Field(gt=0, le=1, default_factory=_alignment_rate)
    max_new_tokens: Annotated[int, Field(ge=1, le=4096)] = 48
    temperature: Annotated[float, Field(gt=0, le=10)] = 0.7
    kl_coefficient: Annotated[float, Field(ge=0, le=100)] = 0.15
    kl_target: Annotated[float, Field(ge=0, le=1000)] = 6.0
    kl_limit: Annotated[float, Field(gt=0, le=1e6)] = 50.0
    reward_drop: Annotated[float, Field(gt=0)] = 2.0
    held_out_prompts: Positive = 16
    partition: str = "category"
    alpha: Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)] = 0.5
    skew: Annotated[float, Field(ge=0, le=10, allow_inf_nan=False)] = 0.0
    held_out_share: Annotated[float, Field(gt=0, lt=1)] = 0.2
    others_sample: Annotated[int, Field(ge=0, le=_MOST)] = 0
    proximal: Annotated[float, Field(ge=0, le=1e6)] = 0.0
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    weight_decay: Annotated[float, Field(ge=0, le=100)] = 0.0
    stopping_patience: Annotated[int, Field(ge=0, le=_MOST)] = 0
    validation_share: Annotated[float, Field(gt=0, lt=1)] = 0.2
    validation_every: Positive = 4
    max_length: Annotated[int, Field(ge=8, le=8192)] = 256
    placement: str = "qkv"
    adapter_count: Positive | None = None
    adapter_size: Positive = 10
    lora_count: int | None = None
    lora_rank: int | None = None
    codec: Codec = "fp32"
    channel: Literal["paper", "profile"] = "paper"
    fading: Literal["rayleigh", "rician", "none"] | None = None
    coherence_seconds: float | None = None
    rician_k: float | None = None
    shadowing_db: float | None = None
    scheme: Literal["adaptive", "fixed-rate", "outage", "inversion"] | None = None
    rate_bits_per_hz: float | None = None
    cut_off_gain: float | None = None
    csi_error_variance: float | None = None
    sharing: Literal["dedicated", "tdma", "fdma"] | None = None
    priced_at: Literal["base", "gpt2-small"] = "base"
    priced_lora_rank: int | None = None
    cohort: Positive | None = None
    selection: Literal["uniform", "best-channel", "proportional-fair", "utility"] = "uniform"
    upload_policy: Literal["at-once", "wait"] = "at-once"
    quorum: Annotated[float, Field(gt=0, le=1)] = 1.0
    deadline_seconds: Annotated[float, Field(gt=0)] = 3600.0
    epsilon: Annotated[float, Field(ge=0)] = 0.0
    patience: Annotated[int, Field(ge=0)] = 0
    threads: Annotated[int, Field(ge=1, le=256)] = 1
    chunk_bytes: ChunkBytes = CHUNK_BYTES
    engine: Literal["local", "ray"] = "local"
    address: str | None = None
    workers: Annotated[int, Field(ge=0, le=256)] = 0
    features: str | None = None
    transport: Literal["mqtt", "memory"] = "mqtt"
    broker: str | None = None
    broker_port: Annotated[int, Field(ge=1, le=65_535)] | None = None
    broker_wait_seconds: Annotated[float, Field(gt=0, le=3600)] = 10.0

    def link(self, radio: Radio) -> Link:
        """Return the uplink of a device with that radio in this run.

        Raises:
            InputError: If the settings of the link do not fit each other.
        """
        link = PAPER_LINK if self.channel == "paper" else profile_link(radio)
        given = {name: getattr(self, name) for name in LINK_FIELDS}
        changes = {name: value for name, value in given.items() if value is not None}
        if self.sharing in ("tdma", "fdma"):
            changes["sharers"] = self.cohort or self.clients
        return replace(link, **changes)

    @property
    def rules(self) -> RoundRules:
        """When a training round ends."""
        return RoundRules(
            quorum=self.quorum,
            deadline_seconds=self.deadline_seconds,
            over_selection=self.over_selection,
        )

    @property
    def wanted(self) -> int:
        """Clients that a round is to have."""
        return self.cohort or self.clients

    @property
    def stage_names(self) -> list[Stage]:
        """The stages in their order."""
        return parse_stages(self.stages, find_method(self.method))

    def rounds_of(self, stage: Stage) -> int:
        """Return how many rounds a stage has at most."""
        return self._count_of("rounds", self.rounds, DEFAULT_ROUNDS, stage)

    def steps_of(self, stage: Stage) -> int:
        """Return how many steps a client takes in a round of a stage."""
        return self._count_of("local_steps", self.local_steps, DEFAULT_STEPS, stage)

    def _count_of(
        self, key: str, given: int | list[int] | None, default: dict[Stage, int], stage: Stage
    ) -> int:
        if given is None:
            return default[stage]
        if isinstance(given, int):
            return given
        names = self.stage_names
        if len(given) != len(names):
            raise InputError(
                f"{key} = {','.join(map(str, given))} has {len(given)} numbers for "
                f"{len(names)} stages ({', '.join(names)}); give one, or one a stage"
            )
        return given[names.index(stage)]

    @property
    def total_rounds(self) -> int:
        """Rounds of all stages at most."""
        return sum(self.rounds_of(stage) for stage in self.stage_names)

    @property
    def alignment(self) -> AlignmentSettings:
        """How devices align their models."""
        return AlignmentSettings(
            algorithm=self.algorithm,
            rollouts=self.rollouts,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            kl_coefficient=self.kl_coefficient,
            kl_target=self.kl_target,
            kl_limit=self.kl_limit,
            held_out_prompts=self.held_out_prompts,
        )

    @property
    def restraint(self) -> RestraintSettings:
        """What holds devices back in instruction tuning."""
        names = RestraintSettings.model_fields
        return RestraintSettings(**{name: getattr(self, name) for name in names})

    @property
    def run_name(self) -> str:
        """The run's name in topics and update headers: the same for the same outcome."""
        said = {k: v for k, v in stored(self).items() if k not in HOW}
        digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
        return f"{self.method}-{self.seed}-{digest[:6]}"


def load_experiment(path: Path | None, options: dict[str, Any]) -> Experiment:
    """Return the experiment of a file (or the defaults) with the given options on top.

    Raises:
        InputError: Naming file, key, value and remedy.
    """
    values = read_toml(path) if path is not None else {}
    source = str(path) if path is not None else "options"
    experiment = check(Experiment, {**values, **options}, source)
    check_experiment(experiment, source)
    return experiment


def check_experiment(experiment: Experiment, source: str) -> None:
    """Refuse an experiment with a name that is unknown, or settings that do not fit each other.

    Raises:
        InputError: Naming setting, value and remedy.
    """
    choose("method", experiment.method, METHODS)
    choose("LoRA placement", experiment.placement, PLACEMENTS)
    for stage in experiment.stage_names:
        _ = experiment.rounds_of(stage), experiment.steps_of(stage)
    if "alignment" in experiment.stage_names:
        check_room(experiment.alignment, experiment.max_length, source)
    check_restraint(experiment.restraint, experiment.method, experiment.stage_names, source)
    if experiment.others_sample and experiment.clients == 1:
        raise InputError(
            f"others_sample = {experiment.others_sample} of one client, which has no others; give "
            "more clients, or leave it out"
        )
    if experiment.cohort is not None and experiment.cohort > experiment.clients:
        raise InputError(
            f"cohort = {experiment.cohort} of clients = {experiment.clients}; choose at most as "
            "many as there are"
        )
    if experiment.cohort is None and experiment.selection != "uniform":
        raise InputError(
            f"selection = '{experiment.selection}' without a cohort: every client trains in every "
            "round; give cohort, or leave selection out"
        )
    check_counting(
        experiment,
        experiment.rules,
        method=experiment.method,
        stages=experiment.stage_names,
        wanted=experiment.wanted,
        has_cohort=experiment.cohort is not None,
    )
    presence_of(experiment, ["any"], experiment.seed)  # its keys have to fit each other
    check_trunk(experiment.reward_trunk, experiment.reward_shares, experiment.trunk_precision)
    if experiment.priced_lora_rank is not None and experiment.priced_at == "base":
        raise InputError(
            f"priced_lora_rank = {experiment.priced_lora_rank} with priced_at 'base', which has "
            "the rank that learns; name another shape, or leave it out"
        )
    if experiment.engine == "ray" and experiment.reward_shares == "all":
        raise InputError(
            "reward_shares = 'all' with engine 'ray': whole trunks are put together of the base's "
            "files, which a node need not have; give engine local, or reward_shares = 'adapters'"
        )
    local = experiment.engine == "local"
    if local and experiment.address is not None:
        raise InputError(
            f"address = '{experiment.address}' with engine 'local', which stays on this machine; "
            "give --engine ray, or leave address out"
        )
    if local and experiment.transport == "memory" and experiment.workers > 1:
        raise InputError(
            f"workers = {experiment.workers} with transport 'memory', which stays in one process; "
            "leave workers out, or choose transport mqtt"
        )
    if experiment.transport == "memory" and experiment.broker is not None:
        raise InputError("a broker is given with transport 'memory'; leave one of them out")
    if experiment.broker is not None and experiment.broker_port is not None:
        raise InputError("broker_port is of the embedded broker, and a broker is given; choose one")


def stored(experiment: Experiment) -> dict[str, Any]:
    """Return the experiment as TOML can hold it: what is not given, and secrets, are left out."""
    values = experiment.model_dump(exclude_none=True)
    if experiment.broker is not None:
        values["broker"] = str(parse_address(experiment.broker))
    return values


def check_same(kept: dict[str, Any], wanted: Experiment) -> None:
    """Refuse to resume a run with settings that would change what comes of it.

    Raises:
        InputError: Naming the first setting that differs.
    """
    values = stored(wanted)
    for key in sorted(set(kept) | set(values)):
        if key not in HOW and kept.get(key) != values.get(key):
            raise InputError(
                f"{key} = {values.get(key)!r}, but the run to resume has {kept.get(key)!r}; "
                "resume with its own settings, or start a new run in another --out"
            )
