"""The configuration file of a device: its keys, their ranges, and what cannot go together."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from device_profiles.config_files import Config, load
from device_profiles.errors import InputError
from device_profiles.fleet import check_lora_count
from device_profiles.methods import RewardShares, find_method
from device_profiles.reward_heads import BASE_TRUNK, check_trunk
from device_profiles.stages import parse_stages
from messaging.access import BrokerAccess
from messaging.chunks import CHUNK_BYTES, ChunkBytes
from messaging.claims import CLAIM_ABOVE_BYTES
from messaging.protocol import Identifier


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

    @property
    def place(self) -> Path:
        """Where this run's part of the folder is."""
        return self.folder.expanduser() / self.run


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
