"""A run made from its configuration file: what the aggregator needs, and what is written of it."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from cloud_aggregator.cohort import CohortRule
from cloud_aggregator.database import shown
from cloud_aggregator.methods import ModuleShape, find_method, stage_layout
from cloud_aggregator.records import (
    DataRecord,
    EncoderRecord,
    RunRecord,
    encoder_record,
    model_record,
)
from cloud_aggregator.restraint import RestraintSettings
from cloud_aggregator.run_folder import RunFolder, read_record
from cloud_aggregator.service_config import AlignmentSection, RewardSection, Service
from cloud_aggregator.settings import RunSettings
from cloud_aggregator.stages import StagePlan
from device_profiles.errors import InputError
from device_profiles.modules import lora_rank
from device_profiles.reward_heads import BASE_TRUNK
from device_profiles.stages import parse_stages
from messaging.claims import Claims, ClaimStore
from messaging.layout import Layout, joint_sha256
from messaging.mqtt import MqttNetwork
from messaging.protocol import Stage
from messaging.transfer import UploadLimits
from quantization.encoder_identity import EncoderIdentity, identify_encoder
from quantization.identity import BaseIdentity, binding, require_gpt2

_SILENT_BEATS = 3


def encoder_of(service: Service) -> EncoderIdentity | None:
    """Return the encoder that the run's reward models read; none where they read the base.

    Raises:
        BaseModelError: If it is none.
        HubUnavailableError: If it is on a hub that does not answer.
    """
    reads = "reward" in parse_stages(service.stages, find_method(service.method))
    return identify_encoder(service.reward_trunk) if reads else None


def run_settings(
    service: Service, identity: BaseIdentity, encoder: EncoderIdentity | None = None
) -> RunSettings:
    """Return what the aggregator needs of a run.

    Raises:
        InputError: If the base, the method or its settings do not go together.
    """
    modules = ModuleShape(
        base=identity.shape,
        adapter_size=service.adapter_size,
        placement=service.placement,
        lora_rank=lora_rank(identity.shape, service.lora_rank)[0],
        reward_shares=service.reward_shares,
        encoder_width=encoder.width if encoder else None,
    )
    method = find_method(service.method)
    stages = parse_stages(service.stages, method)
    if stages != ["instruction"]:
        require_gpt2(identity, f"stages = '{service.stages}'")
    return RunSettings(
        run=service.run,
        method=service.method,
        seed=service.seed,
        modules=modules,
        stages=tuple(
            _stage_plan(service, stage, stage_layout(stage, method, modules)) for stage in stages
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
        claims=claims_of(service),
    )


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
        restraint=service.restraint if stage == "instruction" else RestraintSettings(),
    )


def _cohort(service: Service) -> CohortRule | None:
    if service.cohort is None:
        return None
    return CohortRule(size=service.cohort, selection="uniform", seed=service.seed)


def claims_of(service: Service) -> Claims | None:
    """Return where large updates and states lie, if somewhere.

    Raises:
        AddressError: If the address of the store is none, or its package is not installed.
    """
    if service.claim_store is None:
        return None
    store = ClaimStore(service.claim_store)
    return Claims(store=store, above_bytes=service.claim_above_bytes)


def written_config(
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


def run_record(
    service: Service,
    identity: BaseIdentity,
    folder: RunFolder,
    encoder: EncoderIdentity | None = None,
) -> RunRecord:
    """Return the record of a run that begins, or of the one that is there and goes on.

    Raises:
        InputError: If the folder holds another run.
    """
    if folder.record_path.exists():
        record = read_record(folder.path)
        pairs = {
            "run": (record.run, service.run),
            "seed": (record.seed, service.seed),
            "method": (record.method, service.method),
            "codec": (record.codec, service.codec),
            "aggregation": (record.aggregation, service.aggregation),
            "reward_shares": (record.reward_shares, service.reward_shares),
            "reward_trunk": (_name(record.encoder), _name(encoder_record(encoder))),
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
        reward_shares=service.reward_shares,
        encoder=encoder_record(encoder),
        model=model_record(identity),
        data=DataRecord(source="the clients' own", examples=0),
    )


def _name(encoder: EncoderRecord | None) -> str:
    """Return what tells one trunk from another, for a person."""
    return BASE_TRUNK if encoder is None else f"{encoder.name} ({encoder.sha256[:12]})"
