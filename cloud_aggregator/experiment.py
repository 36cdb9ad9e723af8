"""An experiment: everything that an emulated run is a function of, from a TOML file and options."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from cloud_aggregator.methods import METHODS
from device_profiles.config_files import Config, check, choose, read_toml
from device_profiles.errors import InputError
from device_profiles.modules import PLACEMENTS
from messaging.chunks import CHUNK_BYTES
from messaging.mqtt import parse_address
from messaging.protocol import Codec

Positive = Annotated[int, Field(ge=1, le=1_000_000)]

#: Settings that change how a run is done and not what comes of it; a resumed run may change them.
HOW = frozenset({"workers", "transport", "broker", "broker_port", "broker_wait_seconds", "rounds"})


class Experiment(Config):
    """One emulated run.

    Attributes:
        method: Row of the methods table.
        clients: How many devices are drawn.
        fleet: Name or TOML file of a mix of device profiles.
        rounds: At most so many.
        local_steps: Optimiser steps a client takes a round.
        model: ``mini``, a checkpoint folder or a hub id.
        data: ``kit``, ``alpaca`` (hub) or a JSON or JSONL file.
        partition: How examples are divided among clients; ``alpha`` is Dirichlet's.
        skew: Exponent of the power law of the clients' sizes; 0 for equal sizes.
        held_out_share: Of each client's examples, where the data does not say itself.
        lora_count: The same for every client, instead of its profile's.
        lora_rank: Instead of 96 at width 768 in proportion.
        channel: ``paper`` gives every client the paper's link, ``profile`` its own radio.
        quorum: Share of the cohort whose updates end a round.
        deadline_seconds: Modelled seconds after which a round ends.
        epsilon: Nats by which the held-out loss must improve to count.
        patience: Rounds without improvement until training has converged; 0 for never.
        broker_port: Of the embedded broker; by default a free one.
        threads: Processor threads a client computes with; part of what the bits depend on.
        workers: Processes that host clients; 0 for one a core.
    """

    method: str = "pwff"
    stages: Literal["instruction"] = "instruction"
    clients: Annotated[int, Field(ge=1, le=10_000)] = 10
    fleet: str = "mixed"
    rounds: Positive = 6
    local_steps: Positive = 12
    batch_size: Positive = 4
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 1e-3
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    model: str = "mini"
    precision: Literal["auto", "fp32"] = "auto"
    data: str = "kit"
    partition: str = "category"
    alpha: Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)] = 0.5
    skew: Annotated[float, Field(ge=0, le=10, allow_inf_nan=False)] = 0.0
    held_out_share: Annotated[float, Field(gt=0, lt=1)] = 0.2
    max_length: Annotated[int, Field(ge=8, le=8192)] = 256
    placement: str = "qkv"
    adapter_count: Positive | None = None
    adapter_size: Positive = 10
    lora_count: int | None = None
    lora_rank: int | None = None
    codec: Codec = "fp32"
    channel: Literal["paper", "profile"] = "paper"
    quorum: Annotated[float, Field(gt=0, le=1)] = 1.0
    deadline_seconds: Annotated[float, Field(gt=0)] = 3600.0
    epsilon: Annotated[float, Field(ge=0)] = 0.0
    patience: Annotated[int, Field(ge=0)] = 0
    threads: Annotated[int, Field(ge=1, le=256)] = 1
    chunk_bytes: Annotated[int, Field(ge=1024, le=262_144)] = CHUNK_BYTES
    engine: Literal["local"] = "local"
    workers: Annotated[int, Field(ge=0, le=256)] = 0
    transport: Literal["mqtt", "memory"] = "mqtt"
    broker: str | None = None
    broker_port: Annotated[int, Field(ge=1, le=65_535)] | None = None
    broker_wait_seconds: Annotated[float, Field(gt=0, le=3600)] = 10.0

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
    choose("method", experiment.method, METHODS)
    choose("LoRA placement", experiment.placement, PLACEMENTS)
    if experiment.transport == "memory" and experiment.workers > 1:
        raise InputError(
            f"workers = {experiment.workers} with transport 'memory', which stays in one process; "
            "leave workers out, or choose transport mqtt"
        )
    if experiment.transport == "memory" and experiment.broker is not None:
        raise InputError("a broker is given with transport 'memory'; leave one of them out")
    if experiment.broker is not None and experiment.broker_port is not None:
        raise InputError("broker_port is of the embedded broker, and a broker is given; choose one")
    return experiment


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
