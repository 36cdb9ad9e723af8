"""The client as a service: its configuration file, and a device that takes part until the end."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from device_profiles.channel import PAPER_LINK, profile_link
from device_profiles.config_files import Config, load
from device_profiles.errors import InputError
from device_profiles.families import GPT2
from device_profiles.fleet import check_lora_count, lora_count_of
from device_profiles.methods import Objective, RewardShares, find_method
from device_profiles.profile import find_profile
from device_profiles.reward_heads import BASE_TRUNK, check_trunk
from device_profiles.stages import parse_stages
from edge_client.data.instructions import load_instructions
from edge_client.data.own_data import Preferences, load_sources
from edge_client.data.partition import partition
from edge_client.device_record import Modules, base_precision, describe_device, held_bytes
from edge_client.host import Host
from edge_client.ledger import Ledger
from edge_client.local_client import LocalClient, Setup
from edge_client.outbox import Outbox
from edge_client.peft.build import build_model
from edge_client.peft.packed_model import PackedModel
from edge_client.preflight import (
    NotEnoughDiskError,
    check_disk,
    check_memory,
    client_memory,
    encoder_memory,
    free_memory,
    reward_memory,
    step_shape,
    whole_memory,
    whole_states,
)
from edge_client.progress import Interruption, Progress
from edge_client.reward.reference import scoring
from edge_client.works import build_works, load_judging
from messaging.access import BrokerAccess
from messaging.chunks import CHUNK_BYTES, ChunkBytes
from messaging.claims import CLAIM_ABOVE_BYTES, Claims, ClaimStore
from messaging.key_files import DeviceKeys, device_keys
from messaging.mqtt import MqttNetwork
from messaging.protocol import DeviceRecord, Identifier
from messaging.security import DeviceSeal
from quantization.base_model import set_threads
from quantization.checkpoint import look_through
from quantization.encoder_identity import (
    EncoderIdentity,
    identify_encoder,
)
from quantization.identity import BaseIdentity, binding, identify, require_gpt2

log = logging.getLogger(__name__)

#: What an aggregator asks for if it says nothing else.
_USUAL_BATCH, _USUAL_LENGTH = 4, 256


class SecuritySection(BrokerAccess):
    """How the broker is reached, and the device's own key: also see ``messaging.access``.

    Attributes:
        key: The device's key file for this run, of its owner alone (``pwff certs`` makes one). A
            run that has keys is heard by nobody without.
    """

    key: Path | None = None


class Client(Config):
    """One real device.

    Attributes:
        run: The run's name, as its aggregator has it.
        client: The device's own name.
        broker: ``mqtt://[user:password@]HOST:PORT`` (``mqtts`` for TLS).
        folder: Where the device keeps what never leaves it, in a folder for each run.
        profile: What the device is: a name of the catalog or a TOML file.
        precision: Of the frozen base; ``auto`` is what the device's plan says.
        lora_count: 12 to 36, instead of the profile's.
        method: The run's: which modules train here, and which of them travel.
        stages: The run's.
        helpfulness_data: Preference pairs of that objective, ``kit`` or a file, where the run
            learns reward models; ``harmlessness_data`` likewise.
        prompts: That alignment answers, ``kit`` or a file; by default the pairs' own.
        trunk_precision: The run's: of the frozen base whose hidden states reward models read.
        reward_trunk: The run's: what reward models read, the ``base`` or an encoder, a folder or a
            hub id; the critics read the base in any case.
        reward_shares: The run's: what of a reward model is learned and travels.
        others_data: A file of examples that stand for other users' data: the device is measured on
            them too.
        held_out_share: Of the device's examples, where the data does not say itself.
        private: Whether nothing leaves the device but updates and what they cost: no loss, count or
            figure. A run with ``[privacy]`` takes private devices alone.
        helpfulness: The user's preference; harmlessness has the rest.
        chunk_bytes: Of a piece on its way up with its header, or ``standard`` (122,880) or
            ``small`` (61,440); smaller by itself where the broker takes less.
        threads: Processor threads.
        checkpoint_steps: Training steps after which it is written down where the training stands:
            so many at most are lost when the device is killed.
        heartbeat_seconds: Between two signs of life; the aggregator's own limit is some of these.
        claim_store: The run's, where updates and global states above ``claim_above_bytes`` lie:
            ``file:///FOLDER``, ``s3://BUCKET/PREFIX`` or ``https://HOST/PATH``. Without it,
            everything travels in chunks.
        alive_file: Touched every ten seconds while this program goes round, for whoever watches
            over it (a container's health check looks at its age); by default none.
    """

    run: Identifier
    client: Identifier
    broker: str
    folder: Path
    profile: str
    data: str
    model: str = "mini"
    method: str = "pwff"
    stages: str = "instruction"
    helpfulness_data: str | None = None
    harmlessness_data: str | None = None
    prompts: str | None = None
    trunk_precision: Literal["fp32", "bf16", "int8", "nf4"] = "int8"
    reward_trunk: str = BASE_TRUNK
    reward_shares: RewardShares = "head"
    placement: str = "qkv"
    adapter_size: Annotated[int, Field(ge=1, le=4096)] = 10
    precision: Literal["auto", "fp32", "bf16", "int8", "int8-dynamic", "nf4"] = "auto"
    lora_count: int | None = None
    lora_rank: int | None = None
    others_data: str | None = None
    held_out_share: Annotated[float, Field(gt=0, lt=1)] = 0.2
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    private: bool = False
    helpfulness: Annotated[float, Field(ge=0, le=1)] = 0.5
    channel: Literal["paper", "profile"] = "profile"
    chunk_bytes: ChunkBytes = CHUNK_BYTES
    threads: Annotated[int, Field(ge=1, le=256)] = 1
    checkpoint_steps: Annotated[int, Field(ge=1, le=1_000_000)] = 10
    heartbeat_seconds: Annotated[float, Field(ge=1, le=3600)] = 30.0
    claim_store: str | None = None
    claim_above_bytes: Annotated[int, Field(ge=0, le=2**33)] = CLAIM_ABOVE_BYTES
    alive_file: Path | None = None
    security: SecuritySection = SecuritySection()


def load_client(path: Path) -> Client:
    """Return the client that a TOML file describes.

    Raises:
        InputError: Naming file, key, value and remedy.
    """
    client = load(Client, path)
    parse_stages(client.stages, find_method(client.method))
    if client.lora_count is not None:
        check_lora_count(client.lora_count, f"{path}: lora_count")
    check_trunk(client.reward_trunk, client.reward_shares, client.trunk_precision, f"{path}: ")
    if client.private and client.others_data is not None:
        raise InputError(
            f"{path}: others_data = '{client.others_data}' with private = true: what is measured "
            "on it would stay on this device; leave one of them out"
        )
    return client


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
    folder = _folder(client)
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


def _folder(client: Client) -> Path:
    return client.folder.expanduser() / client.run


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
    _check_memory(client, identity, device, encoder)
    if device.scoring and client.reward_shares == "all":
        _check_disk(client, identity)
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
    folder = _folder(client)
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


def _check_memory(
    client: Client,
    identity: BaseIdentity,
    device: DeviceRecord,
    encoder: EncoderIdentity | None,
) -> None:
    """Refuse, before the base is loaded, a device that the system would stop for its memory.

    Raises:
        NotEnoughMemoryError: If training on a usual batch would take more than is free.
    """
    if identity.shape.family != GPT2:
        return  # what the library's step takes is not modelled
    shape = step_shape(
        identity,
        look_through(identity).heads,
        adapter_size=device.adapter_size,
        placement=client.placement,
        lora_rank=device.lora_rank,
    )
    precision = device.precision.removesuffix("-dynamic")
    usual = client_memory(
        shape,
        device.lora_count,
        batch_size=_USUAL_BATCH,
        max_length=_USUAL_LENGTH,
        precision=precision,
    )
    other = device.scoring and client.trunk_precision != device.precision
    needed = usual.total + (held_bytes(identity, client.trunk_precision) if other else 0)
    if device.scoring and client.reward_shares == "adapters":
        learning = reward_memory(
            replace(shape, adapter_size=client.adapter_size),
            max_length=_USUAL_LENGTH,
            precision=client.trunk_precision,
        )
        policy = usual.state + usual.before + (usual.base if other else 0)
        needed = max(needed, learning.total + policy)
    if device.scoring and client.reward_shares == "all":
        rewards = len(find_method(client.method).objectives)
        bare = replace(shape, adapter_size=0)
        learning_all = whole_memory(bare, identity.parameters, rewards, max_length=_USUAL_LENGTH)
        needed = max(needed, learning_all + usual.state + usual.before + usual.base)
    remedies = ["give precision = 'int8' or 'nf4'", "a smaller lora_count"]
    if client.reward_shares == "all" and device.scoring:
        remedies = ["give reward_shares = 'adapters' or 'head' here and in the run"]
    elif encoder is not None:
        needed += encoder_memory(encoder.parameters, encoder.width)
        remedies.append("reward_trunk = 'base' here and in the run")
    check_memory(
        needed,
        free_memory(),
        what=f"training on {_USUAL_BATCH} examples of {_USUAL_LENGTH} tokens",
        remedies=[*remedies, "free memory on this device"],
    )


def _check_disk(client: Client, identity: BaseIdentity) -> None:
    """Refuse a device whose disk would not take the states of whole reward models.

    Raises:
        NotEnoughDiskError: If they would take more than is free, whatever the run's codec is.
    """
    rewards = len(find_method(client.method).objectives)

    def check(*, lossy: bool) -> None:
        check_disk(
            whole_states(identity.parameters, rewards, lossy=lossy),
            _folder(client),
            what="what this device keeps of whole reward models",
            remedies=[
                "name a folder on a larger disk",
                "give reward_shares = 'adapters' or 'head' here and in the run",
            ],
        )

    check(lossy=False)
    try:
        check(lossy=True)
    except NotEnoughDiskError as err:
        log.warning("if the run's codec is lossy: %s", err)


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
