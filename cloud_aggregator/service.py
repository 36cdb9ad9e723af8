"""The aggregator as a service: its configuration file, and a run that resumes where it was."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import psutil
from pydantic import Field

from cloud_aggregator.cohort import CohortRule
from cloud_aggregator.counting import CountingKeys, check_counting
from cloud_aggregator.database import shown
from cloud_aggregator.door import DoorLimits
from cloud_aggregator.health import monitor, parse_address
from cloud_aggregator.methods import METHODS, ModuleShape, find_method, stage_layout
from cloud_aggregator.metrics import CountedNetwork, Metrics
from cloud_aggregator.records import DataRecord, ModelRecord, PricedRecord, RunRecord
from cloud_aggregator.rounds import RoundRules
from cloud_aggregator.run_folder import RunFolder, read_record
from cloud_aggregator.server import Aggregator
from cloud_aggregator.settings import RunSettings
from cloud_aggregator.stages import StagePlan, check_room
from cloud_aggregator.store import Store
from device_profiles.config_files import Config, choose, load
from device_profiles.errors import InputError
from device_profiles.modules import PLACEMENTS, lora_rank
from device_profiles.pricing import CostBasis
from device_profiles.stages import parse_stages
from messaging.access import BrokerAccess
from messaging.chunks import CHUNK_BYTES, ChunkBytes
from messaging.claims import CLAIM_ABOVE_BYTES, Claims, ClaimStore
from messaging.key_files import run_keys
from messaging.layout import Layout, joint_sha256
from messaging.mqtt import MqttNetwork
from messaging.protocol import AlignmentSettings, Codec, Identifier, Stage
from messaging.transfer import UploadLimits
from quantization.identity import BaseIdentity, binding, identify

log = logging.getLogger(__name__)

#: Of the environment: the address of the run's store, in place of the configuration's.
STORE_VARIABLE = "PWFF_STORE"

_SILENT_BEATS = 3


class RewardSection(Config):
    """Reward learning: rounds at most, and what a device does in one (steps of pairs)."""

    rounds: Annotated[int, Field(ge=1, le=1_000_000)] = 5
    local_steps: Annotated[int, Field(ge=1, le=1_000_000)] = 40
    batch_size: Annotated[int, Field(ge=1, le=4096)] = 32
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 3e-4
    margin: Annotated[float, Field(ge=0, le=100)] = 0.0


class AlignmentSection(Config):
    """Alignment: rounds at most, and what a device does in one (batches of rollouts).

    Attributes:
        settings: See ``messaging.protocol.AlignmentSettings``.
        reward_drop: Fall of the mean weighted reward below its beginning at which a round is taken
            back.
    """

    rounds: Annotated[int, Field(ge=1, le=1_000_000)] = 4
    local_steps: Annotated[int, Field(ge=1, le=1_000_000)] = 2
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 3e-4
    reward_drop: Annotated[float, Field(gt=0)] = 2.0
    settings: AlignmentSettings = AlignmentSettings()


class SecuritySection(BrokerAccess):
    """Who may take part, and how the broker is reached: also see ``messaging.access``.

    Attributes:
        keys: The run's key file, of its owner alone (``pwff certs`` makes one). With it, or with
            the keys in the environment, every message is sealed and nobody without a key takes
            part.
    """

    keys: Path | None = None


class LimitsSection(Config):
    """What may come in of one client and of all: see ``cloud_aggregator.door``.

    Attributes:
        messages_per_second: Of one client, chunks included; four seconds' worth may come at once.
        bytes_per_second: Of one client; a second's worth may come at once.
        waiting_bytes: That lie here unread at once, of all clients.
    """

    messages_per_second: Annotated[float, Field(ge=1, le=1e6)] = 5000.0
    bytes_per_second: Annotated[float, Field(ge=2**18, le=1e12)] = 2.0**29
    waiting_bytes: Annotated[int, Field(ge=2**20, le=2**40)] = 2**28

    @property
    def door(self) -> DoorLimits:
        """The same for the door."""
        return DoorLimits(
            messages_per_second=self.messages_per_second,
            burst_messages=4 * self.messages_per_second,
            bytes_per_second=self.bytes_per_second,
            burst_bytes=self.bytes_per_second,
            waiting_bytes=self.waiting_bytes,
        )


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
        cohort: Devices whose updates a round wants, drawn each alike among those that are there; by
            default every one that is there. ``aggregation`` and what goes with it is described in
            ``cloud_aggregator.counting.CountingKeys``.
        quorum: Share of them whose updates end a round.
        deadline_seconds: Of a training round, on this machine's clock; after a restart, anew.
        replacements: Whether another device is asked in the place of one that vanished, while
            there is time.
        heartbeat_seconds: The devices'; after three of them without a word, one is taken for gone.
        evaluation_seconds: How long it waits for held-out results.
        store: Where the run's state is: ``sqlite:///FILE`` or
            ``postgresql+psycopg://USER@HOST/DATABASE``; by default ``state.sqlite`` in ``out``. An
            address with a password is better given in the environment, as ``PWFF_STORE``.
        chunk_bytes: Of a piece on its way down with its header, or ``standard`` (122,880) or
            ``small`` (61,440); smaller by itself where the broker takes less.
        grants: Uploads that may send at once.
        window: Chunks of one upload in flight; grants * window stays below the broker's queue.
        claim_store: Where updates and states above ``claim_above_bytes`` lie beside the broker, the
            same for all devices: ``file:///FOLDER``, ``s3://BUCKET/PREFIX``, ``https://HOST/PATH``.
            Without it, everything travels in chunks.
        monitor: ``HOST:PORT`` that /metrics, /healthz and /readyz are answered at; by default at
            none.
    """

    run: Identifier
    broker: str
    out: Path
    clients: Annotated[int, Field(ge=1, le=100_000)]
    minimum_clients: Annotated[int, Field(ge=1, le=100_000)] = 1
    gather_seconds: Annotated[float, Field(gt=0, le=1e6)] = 120.0
    method: str = "pwff"
    stages: str = "instruction"
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
    claim_store: str | None = None
    claim_above_bytes: Annotated[int, Field(ge=0, le=2**33)] = CLAIM_ABOVE_BYTES
    monitor: str | None = None
    security: SecuritySection = SecuritySection()
    limits: LimitsSection = LimitsSection()
    store: Annotated[str | None, Field(repr=False)] = None
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
    if "alignment" in parse_stages(service.stages, find_method(service.method)):
        check_room(service.alignment.settings, service.max_length, str(path))
    choose("LoRA placement", service.placement, PLACEMENTS)
    if service.monitor is not None:
        parse_address(service.monitor)
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
        stages=parse_stages(service.stages, find_method(service.method)),
        wanted=service.wanted,
        has_cohort=service.cohort is not None,
    )
    return service


def serve(
    service: Service,
    *,
    notify: Callable[..., None],
    on_start: Callable[[Aggregator], None],
    clock: Callable[[], float] = time.monotonic,
) -> RunRecord:
    """Run the aggregator until the run is done or stopped; return its record.

    A missing broker is tried again and again, with back-off. ``clock`` gives monotonic seconds.

    Raises:
        InputError: If base, folder, store or broker address are not usable, or another aggregator
            is at work on the run.
        SecretError: If a key, certificate or password is not usable.
        SpoolFullError: If the spool's disk is full.
        StoreError: If the run's store cannot be read or written.
    """
    keys = run_keys(service.security.keys, service.run)
    network = MqttNetwork(service.broker, service.security)
    if keys is None and not network.address.is_local:
        log.warning(
            "this run has no keys: whoever may publish at %s can speak for its devices; "
            "make keys with `pwff certs` and give security.keys",
            network.address,
        )
    metrics = Metrics(service.run, service.method)
    url = store_url(service)
    identity = identify(service.model)
    folder = RunFolder(service.out)
    record = _record(service, identity, folder)
    settings = _settings(service, identity)

    def tell(event: str, **fields: Any) -> None:
        folder.append_event(event, **fields)
        metrics(event, **fields)
        notify(event, **fields)

    with contextlib.ExitStack() as stack:
        store = stack.enter_context(Store(folder.path, service.run, url))
        log.info("the run's state is in %s (start %d)", store.name, store.epoch)
        folder.write_config(_config(service, identity, settings, network, url))
        server = Aggregator(
            settings,
            record,
            folder,
            CountedNetwork(network, metrics),
            store=store,
            notify=tell,
            memory=lambda: psutil.Process().memory_info().rss,
            clock=clock,
            keys=keys,
            door=service.limits.door,
        )
        server.watch(metrics)
        if service.monitor is not None:
            stack.enter_context(monitor(service.monitor, server.vitals(), metrics.page))
        on_start(server)
        return server.run()


def store_url(service: Service) -> str | None:
    """Return the address of the run's store; none is a file in the run's folder.

    The environment wins over the file: an address may hold a password.
    """
    return os.environ.get(STORE_VARIABLE) or service.store


def _settings(service: Service, identity: BaseIdentity) -> RunSettings:
    modules = ModuleShape(
        base=identity.shape,
        adapter_size=service.adapter_size,
        placement=service.placement,
        lora_rank=lora_rank(identity.shape, service.lora_rank)[0],
    )
    method = find_method(service.method)
    return RunSettings(
        run=service.run,
        method=service.method,
        seed=service.seed,
        modules=modules,
        stages=tuple(
            _stage_plan(service, stage, stage_layout(stage, method, modules))
            for stage in parse_stages(service.stages, method)
        ),
        binding=binding(identity, service.placement),
        clients=service.clients,
        minimum_clients=service.minimum_clients,
        gather_seconds=service.gather_seconds,
        codec=service.codec,
        max_length=service.max_length,
        chunk_bytes=service.chunk_bytes,
        rules=service.rules,
        counting=service.counting(service.rules, service.wanted),
        keep_states=service.keep_states,
        cohort=_cohort(service),
        silence_seconds=_SILENT_BEATS * service.heartbeat_seconds,
        virtual_time=False,
        patience_seconds=service.evaluation_seconds,
        farewell_seconds=service.gather_seconds,
        limits=UploadLimits(grants=service.grants, window=service.window),
        claims=_claims(service),
    )


def _claims(service: Service) -> Claims | None:
    if service.claim_store is None:
        return None
    store = ClaimStore(service.claim_store)
    return Claims(store=store, above_bytes=service.claim_above_bytes)


def _cohort(service: Service) -> CohortRule | None:
    if service.cohort is None:
        return None
    return CohortRule(size=service.cohort, selection="uniform", seed=service.seed)


def _config(
    service: Service,
    identity: BaseIdentity,
    settings: RunSettings,
    network: MqttNetwork,
    url: str | None,
) -> dict[str, Any]:
    """Return what ``config.toml`` holds of the run itself, without secrets."""
    config = service.model_dump(mode="json", exclude_none=True)
    config["broker"] = str(network.address)
    if url is not None:
        config["store"] = shown(url)
    return {
        "service": config,
        "hashes": {
            "base": identity.sha256,
            "tokenizer": identity.tokenizer_sha256,
            "binding": settings.binding,
            "layout": joint_sha256(plan.layout for plan in settings.stages),
        },
    }


def _stage_plan(service: Service, stage: Stage, layout: Layout) -> StagePlan:
    sections: dict[Stage, RewardSection | AlignmentSection] = {
        "reward": service.reward,
        "alignment": service.alignment,
    }
    part = sections.get(stage, service)
    aligns = stage == "alignment"
    return StagePlan(
        stage=stage,
        layout=layout,
        rounds=part.rounds,
        local_steps=part.local_steps,
        batch_size=service.reward.batch_size if stage == "reward" else service.batch_size,
        learning_rate=part.learning_rate,
        epsilon=service.epsilon,
        patience=service.patience,
        margin=service.reward.margin if stage == "reward" else 0.0,
        alignment=service.alignment.settings if aligns else None,
        reward_drop=service.alignment.reward_drop,
    )


def _record(service: Service, identity: BaseIdentity, folder: RunFolder) -> RunRecord:
    if folder.record_path.exists():
        record = read_record(folder.path)
        pairs = {
            "run": (record.run, service.run),
            "seed": (record.seed, service.seed),
            "method": (record.method, service.method),
            "codec": (record.codec, service.codec),
            "aggregation": (record.aggregation, service.aggregation),
            "stages": (record.stages, parse_stages(service.stages, find_method(service.method))),
            "base": (record.model.sha256, identity.sha256),
            "tokenizer": (record.model.tokenizer_sha256, identity.tokenizer_sha256),
        }
        for name, (then, now) in pairs.items():
            if then != now:
                raise InputError(
                    f"{folder.path} holds a run whose {name} is {then!r}, and {now!r} is asked "
                    "for; give this run another 'out'"
                )
        return record
    return RunRecord(
        version=version("pwff"),
        run=service.run,
        seed=service.seed,
        method=service.method,
        stages=parse_stages(service.stages, find_method(service.method)),
        engine="deployment",
        workers=0,
        transport="mqtt",
        codec=service.codec,
        aggregation=service.aggregation,
        model=model_record(identity),
        data=DataRecord(source="the clients' own", examples=0),
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
