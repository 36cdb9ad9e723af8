"""The client as a service: a device that takes part until the end."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable

from device_profiles.channel import PAPER_LINK, profile_link
from device_profiles.errors import InputError
from device_profiles.fleet import lora_count_of
from device_profiles.methods import Objective, find_method
from device_profiles.profile import find_profile
from device_profiles.stages import parse_stages
from edge_client.data.instructions import load_instructions
from edge_client.data.own_data import Preferences, load_sources
from edge_client.data.partition import partition
from edge_client.device_record import Modules, base_precision, describe_device
from edge_client.host import Host
from edge_client.ledger import Ledger
from edge_client.local_client import LocalClient, Setup
from edge_client.outbox import Outbox
from edge_client.peft.build import build_model
from edge_client.peft.packed_model import PackedModel
from edge_client.progress import Interruption, Progress
from edge_client.reward.reference import scoring
from edge_client.room import check_room
from edge_client.service_config import Client
from edge_client.works import build_works, load_judging
from messaging.claims import Claims, ClaimStore
from messaging.key_files import DeviceKeys, device_keys
from messaging.mqtt import MqttNetwork
from messaging.security import DeviceSeal
from quantization.base_model import set_threads
from quantization.encoder_identity import (
    identify_encoder,
)
from quantization.identity import BaseIdentity, binding, identify, require_gpt2

log = logging.getLogger(__name__)


def take_part(client: Client, on_start: Callable[[Host], None]) -> list[str]:
    """Take part in a run until it is over or the host is stopped; return what made it give up.

    A missing broker is tried again and again, with back-off. A device that is stopped in the middle
    of a training, killed even, goes on from its last checkpoint when it is started again; one that
    had an update to send sends it.

    Raises:
        InputError: If base, data, profile or modules are not usable, or training diverges.
        SecretError: If a key, certificate or password is not usable.
        DiskError: If the disk does not take what must be kept; what it holds is whole.
        HubUnavailableError: If base or data are on a hub that does not answer.
    """
    set_threads(client.threads)
    claims = None
    if client.claim_store is not None:
        claims = Claims(store=ClaimStore(client.claim_store), above_bytes=client.claim_above_bytes)
    keys = device_keys(client.security.key, client.run, client.client)
    network = MqttNetwork(client.broker, client.security)
    identity = identify(client.model)
    interruption = Interruption()
    local = _local_client(client, identity, interruption)
    folder = client.place
    ledger = Ledger(folder)
    seals = {} if keys is None else {client.client: _seal(keys, ledger)}
    host = Host(
        network,
        [local],
        binding=binding(identity, client.placement),
        seals=seals,
        ledgers={client.client: ledger},
        outboxes={client.client: Outbox(folder)},
        heartbeat_seconds=client.heartbeat_seconds,
        isolates=True,
        interrupt=interruption.stop,
        claims=claims,
        alive_file=client.alive_file,
    )
    on_start(host)
    log.info("%s: waiting for the run '%s' at %s", client.client, client.run, network.address)
    host.run()
    return host.failures


def _seal(keys: DeviceKeys, ledger: Ledger) -> DeviceSeal:
    return DeviceSeal(
        run=keys.run,
        client=keys.client,
        key=keys.key,
        verify_key=keys.verify_key,
        session=secrets.token_hex(8),
        epoch=ledger.epoch,
        highest=ledger.highest,
    )


def _local_client(
    client: Client, identity: BaseIdentity, interruption: Interruption
) -> LocalClient:
    method = find_method(client.method)
    profile = find_profile(client.profile)
    if profile.emulation_only:
        raise InputError(
            f"profile '{profile.name}' is for emulation only: this software does not run on it "
            f"({profile.note or profile.title}); give the profile of this machine, or measure one "
            "with `pwff devices measure`"
        )
    if client.stages != "instruction":
        require_gpt2(identity, f"stages = '{client.stages}'")
    preferences = _preferences(client)
    encoder = identify_encoder(client.reward_trunk) if preferences.hashes else None
    modules = Modules(
        method=method,
        identity=identity,
        encoder=encoder,
        adapter_size=client.adapter_size,
        placement=client.placement,
        rank=client.lora_rank,
        reward_shares=client.reward_shares,
    )
    dataset = load_instructions(client.data)
    for line, reason in dataset.broken:
        log.warning("data: line %d left out: %s", line, reason)
    (part,) = partition(
        dataset.examples,
        clients=1,
        kind="iid",
        alpha=1.0,
        skew=0.0,
        held_out_share=client.held_out_share,
        seed=client.seed,
    )
    (own,) = preferences.divide(clients=1, held_out_share=client.held_out_share, seed=client.seed)
    link = PAPER_LINK if client.channel == "paper" else profile_link(profile.radio)
    device = describe_device(
        modules,
        part,
        link,
        client=client.client,
        profile=profile,
        lora_count=client.lora_count or modules.lora_count(lora_count_of(profile, None)),
        threads=client.threads,
        helpfulness=client.helpfulness,
        preference_pairs=own.training_pairs,
        scoring=scoring(client.trunk_precision, encoder.sha256 if encoder else None)
        if own.train
        else "",
        precision=base_precision(identity, client.precision, profile),
        costs="measured",
        private=client.private,
    )
    check_room(client, identity, device, encoder)
    model = build_model(
        identity,
        device.precision,
        adapter_size=device.adapter_size,
        placement=client.placement,
        lora_count=device.lora_count,
        lora_rank=device.lora_rank,
    )
    setup = Setup(
        run=client.run,
        method=client.method,
        layouts={stage: modules.layout(stage) for stage in parse_stages(client.stages, method)},
        placement=client.placement,
        adapter_size=client.adapter_size,
        lora_rank=device.lora_rank,
        chunk_bytes=client.chunk_bytes,
        reward_shares=client.reward_shares,
        encoder=encoder,
    )
    data = preferences.own(
        own,
        [dataset.examples[i] for i in part.train],
        [dataset.examples[i] for i in part.held_out],
        load_instructions(client.others_data).examples if client.others_data else None,
    )
    folder = client.place
    progress = Progress(folder, interruption, every_steps=client.checkpoint_steps)
    judging = None
    if own.train:
        there = [model.base] if isinstance(model, PackedModel) else []
        judging = load_judging(
            identity,
            client.trunk_precision,
            *there,
            shape=modules.shape().trunk,
            kept=folder / "features",
            encoder=encoder,
        )
    return LocalClient(
        setup,
        build_works(setup, model, device, data, judging=judging, folder=folder, progress=progress),
        base=identity,
        device=device,
        profile=profile,
        link=link,
        folder=folder,
        private=client.private,
    )


def _preferences(client: Client) -> Preferences:
    """Return the device's own preference data.

    Raises:
        InputError: If the run learns reward models, and an objective of its method has no data.
    """
    method = find_method(client.method)
    if "reward" not in parse_stages(client.stages, method):
        return load_sources({}, None, seed=client.seed)
    given = {"helpfulness": client.helpfulness_data, "harmlessness": client.harmlessness_data}
    sources: dict[Objective, str] = {}
    for name in method.objectives:
        source = given[name]
        if source is None:
            raise InputError(
                f"{name}_data is not given, and the run learns a reward model of {name}; give "
                "'kit', a file of pairs (`pwff prefer` makes one), or leave 'reward' and "
                "'alignment' out of stages"
            )
        sources[name] = source
    preferences = load_sources(sources, client.prompts, seed=client.seed)
    for name, data in preferences.sets.items():
        for line, reason in data.broken:
            log.warning("%s_data: line %d left out: %s", name, line, reason)
    return preferences
