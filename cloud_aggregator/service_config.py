"""The configuration file of a deployed run: its keys, their ranges, and what cannot go together."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from cloud_aggregator.counting import CountingKeys, check_counting
from cloud_aggregator.guards import LimitsSection, SecuritySection
from cloud_aggregator.health import parse_address
from cloud_aggregator.methods import METHODS, find_method
from cloud_aggregator.restraint import RestraintSettings, check_restraint
from cloud_aggregator.rounds import RoundRules
from cloud_aggregator.stages import check_room
from device_profiles.config_files import Config, choose, load
from device_profiles.errors import InputError
from device_profiles.methods import RewardShares
from device_profiles.modules import PLACEMENTS
from device_profiles.reward_heads import BASE_TRUNK, check_trunk
from device_profiles.stages import parse_stages
from messaging.chunks import CHUNK_BYTES, ChunkBytes
from messaging.claims import CLAIM_ABOVE_BYTES
from messaging.protocol import LEARNING_RATES, AlignmentSettings, Codec, Identifier
from messaging.transfer import LimitsError, check_limits

#: Of the environment: the address of the run's store, in place of the configuration's.
STORE_VARIABLE = "PWFF_STORE"


class RewardSection(Config):
    """Reward learning: rounds at most, and what a device does in one (steps of pairs)."""

    rounds: Annotated[int, Field(ge=1, le=1_000_000)] = 5
    local_steps: Annotated[int, Field(ge=1, le=1_000_000)] = 40
    batch_size: Annotated[int, Field(ge=1, le=4096)] = 32
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 3e-4
    margin: Annotated[float, Field(ge=0, le=100)] = 0.0


def _alignment_rate(given: dict[str, Any]) -> float:
    settings = given.get("settings")  # what is wrong with them is told
    return LEARNING_RATES[settings.algorithm] if settings else 0.0


class AlignmentSection(Config):
    """Alignment: rounds at most, and what a device does in one (batches of rollouts).

    Attributes:
        settings: See ``messaging.protocol.AlignmentSettings``.
        learning_rate: By default what suits the algorithm.
        reward_drop: Fall of the mean weighted reward below its beginning at which a round is taken
            back.
    """

    rounds: Annotated[int, Field(ge=1, le=1_000_000)] = 4
    local_steps: Annotated[int, Field(ge=1, le=1_000_000)] = 2
    settings: AlignmentSettings = AlignmentSettings()
    learning_rate: float = Field(gt=0, le=1, default_factory=_alignment_rate)
    reward_drop: Annotated[float, Field(gt=0)] = 2.0


class Service(CountingKeys):
    """One deployed run.

    Attributes:
        run: Its name; a new run takes a new one.
        broker: ``mqtt://HOST:PORT`` (``mqtts`` for TLS).
        out: The run's folder; a run that is there goes on.
        clients: How many devices it waits for.
        minimum_clients: With how many it begins after ``gather_seconds``, and each later round at
            least. For so long at most it also tells devices that the run is over.
        rounds: At most, of instruction tuning; and so ``local_steps``, ``batch_size`` and
            ``learning_rate``. The other stages have a section each: see
            ``RewardSection`` and ``AlignmentSection``.
        reward_trunk: What reward models read: the ``base`` itself, or an encoder, a folder or a hub
            id such as ``distilbert-base-uncased``; every device has the same.
        reward_shares: What of a reward model is learned and travels, ``head``, ``adapters`` or
            ``all``: see ``docs/rewards.md``; every device has the same.
        cohort: Devices whose updates a round wants, drawn each alike among those that are there; by
            default every one that is there. ``aggregation`` and what goes with it is described in
            ``cloud_aggregator.counting.CountingKeys``.
        quorum: Share of them whose updates end a round.
        deadline_seconds: Of a training round, on this machine's clock, while an aggregator runs;
            a restart may forget five seconds.
        replacements: Whether another device is asked in the place of one that vanished, while
            there is time.
        heartbeat_seconds: The devices'; after three of them without a word, one is taken for gone.
        restraint: A section too: see ``cloud_aggregator.restraint.RestraintSettings``.
        evaluation_seconds: How long it waits for held-out results.
        store: Where the run's state is: ``sqlite:///FILE`` or
            ``postgresql+psycopg://USER@HOST/DATABASE``; by default ``state.sqlite`` in ``out``. An
            address with a password is better given in the environment, as ``PWFF_STORE``.
        chunk_bytes: Of a piece on its way down with its header, or ``standard`` (122,880) or
            ``small`` (61,440); smaller by itself where the broker takes less.
        grants: Uploads that may send at once.
        window: Chunks of one upload in flight; grants * window stays below the broker's queue.
        broker_queue: Messages that the broker keeps for one receiver (mosquitto's
            ``max_queued_messages``, 1000 by default); what would pass it is refused.
        claim_store: Where updates and states above ``claim_above_bytes`` lie beside the broker, the
            same for all devices: ``file:///FOLDER``, ``s3://BUCKET/PREFIX``, ``https://HOST/PATH``.
            Without it, everything travels in chunks.
        monitor: ``HOST:PORT`` that /metrics, /healthz and /readyz are answered at; by default at
            none.
        broker_log: File that mosquitto writes its log to: whom it turns away is counted in the
            metrics, as nobody else could; only with ``monitor``.
    """

    run: Identifier
    broker: str
    out: Path
    clients: Annotated[int, Field(ge=1, le=100_000)]
    minimum_clients: Annotated[int, Field(ge=1, le=100_000)] = 1
    gather_seconds: Annotated[float, Field(gt=0, le=1e6)] = 120.0
    method: str = "pwff"
    stages: str = "instruction"
    reward_trunk: str = BASE_TRUNK
    reward_shares: RewardShares = "head"
    model: str = "mini"
    placement: str = "qkv"
    lora_rank: Annotated[int, Field(ge=1, le=65_536)] | None = None
    adapter_size: Annotated[int, Field(ge=1, le=4096)] = 10
    rounds: Annotated[int, Field(ge=1, le=1_000_000)] = 10
    local_steps: Annotated[int, Field(ge=1, le=1_000_000)] = 20
    batch_size: Annotated[int, Field(ge=1, le=4096)] = 4
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 1e-3
    max_length: Annotated[int, Field(ge=8, le=8192)] = 256
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    codec: Codec = "fp32"
    cohort: Annotated[int, Field(ge=1, le=100_000)] | None = None
    chunk_bytes: ChunkBytes = CHUNK_BYTES
    quorum: Annotated[float, Field(gt=0, le=1)] = 0.8
    deadline_seconds: Annotated[float, Field(gt=0, le=1e6)] = 3600.0
    replacements: bool = True
    heartbeat_seconds: Annotated[float, Field(ge=1, le=3600)] = 30.0
    evaluation_seconds: Annotated[float, Field(gt=0, le=1e6)] = 600.0
    epsilon: Annotated[float, Field(ge=0)] = 0.001
    patience: Annotated[int, Field(ge=0)] = 5
    grants: Annotated[int, Field(ge=1, le=1024)] = 16
    window: Annotated[int, Field(ge=1, le=1024)] = 16
    broker_queue: Annotated[int, Field(ge=1, le=10_000_000)] = 1000
    claim_store: str | None = None
    claim_above_bytes: Annotated[int, Field(ge=0, le=2**33)] = CLAIM_ABOVE_BYTES
    monitor: str | None = None
    broker_log: Path | None = None
    security: SecuritySection = SecuritySection()
    limits: LimitsSection = LimitsSection()
    store: Annotated[str | None, Field(repr=False)] = None
    restraint: RestraintSettings = RestraintSettings()
    reward: RewardSection = RewardSection()
    alignment: AlignmentSection = AlignmentSection()

    @property
    def rules(self) -> RoundRules:
        """When a training round ends."""
        return RoundRules(
            quorum=self.quorum,
            deadline_seconds=self.deadline_seconds,
            over_selection=self.over_selection,
            replacements=self.replacements,
        )

    @property
    def wanted(self) -> int:
        """Clients that a round is to have."""
        return self.cohort or self.clients

    @property
    def total_rounds(self) -> int:
        """Rounds of all stages at most."""
        names = parse_stages(self.stages, find_method(self.method))
        parts = {"reward": self.reward.rounds, "alignment": self.alignment.rounds}
        return sum(parts.get(name, self.rounds) for name in names)


def load_service(path: Path) -> Service:
    """Return the service that a TOML file describes.

    Raises:
        InputError: Naming file, key, value and remedy.
    """
    service = load(Service, path)
    choose("method", service.method, METHODS)
    stages = parse_stages(service.stages, find_method(service.method))
    if "alignment" in stages:
        check_room(service.alignment.settings, service.max_length, str(path))
    choose("LoRA placement", service.placement, PLACEMENTS)
    try:
        check_limits(service.grants, service.window, service.broker_queue)
    except LimitsError as err:
        raise InputError(f"{path}: {err}") from err
    if service.monitor is not None:
        parse_address(service.monitor)
    elif service.broker_log is not None:
        raise InputError(
            f"{path}: broker_log = '{service.broker_log}' is counted in the metrics, and there is "
            'no monitor to show them; give monitor = "127.0.0.1:9464", or leave it out'
        )
    check_restraint(service.restraint, service.method, stages, str(path))
    check_trunk(service.reward_trunk, service.reward_shares, where=f"{path}: ")
    if service.minimum_clients > service.clients:
        raise InputError(
            f"{path}: minimum_clients = {service.minimum_clients} is above clients = "
            f"{service.clients}; give at most that"
        )
    if service.cohort is not None and service.cohort > service.clients:
        raise InputError(
            f"{path}: cohort = {service.cohort} is above clients = {service.clients}; give at most "
            "that"
        )
    check_counting(
        service,
        service.rules,
        method=service.method,
        stages=stages,
        wanted=service.wanted,
        has_cohort=service.cohort is not None,
    )
    return service


def store_url(service: Service) -> str | None:
    """Return the address of the run's store; none is a file in the run's folder.

    The environment wins over the file: an address may hold a password.
    """
    return os.environ.get(STORE_VARIABLE) or service.store
