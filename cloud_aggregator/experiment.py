"""An experiment: everything that an emulated run is a function of, from a TOML file and options."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from cloud_aggregator.methods import METHODS
from device_profiles.config_files import Config, check, choose, read_toml
from device_profiles.errors import InputError
from device_profiles.link import PAPER_LINK, Link, profile_link
from device_profiles.modules import PLACEMENTS
from device_profiles.profile import Radio
from messaging.chunks import CHUNK_BYTES
from messaging.mqtt import parse_address
from messaging.protocol import Codec

Positive = Annotated[int, Field(ge=1, le=1_000_000)]

#: Settings that change how a run is done and not what comes of it; a resumed run may change them.
HOW = frozenset({"workers", "transport", "broker", "broker_port", "broker_wait_seconds", "rounds"})


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


class Experiment(Config):
    """One emulated run.

    Attributes:
        method: Row of the methods table.
        clients: How many devices are drawn.
        fleet: Name or TOML file of a mix of device profiles.
        rounds: At most so many.
        local_steps: Optimiser steps a client takes a round.
        model: ``mini``, a checkpoint folder or a hub id.
        precision: Of the frozen base; ``auto`` is what each device's plan says.
        data: ``kit``, ``alpaca`` (hub) or a JSON or JSONL file.
        partition: How examples are divided among clients; ``alpha`` is Dirichlet's.
        skew: Exponent of the power law of the clients' sizes; 0 for equal sizes.
        held_out_share: Of each client's examples, where the data does not say itself.
        lora_count: The same for every client, instead of its profile's.
        lora_rank: Instead of 96 at width 768 in proportion.
        channel: ``paper`` gives every client the paper's link, ``profile`` its own radio.
        fading: And the eight after it: of every client's link, as ``device_profiles.link.Link`` has
            them; where left out, its defaults. The cohort shares the band.
        priced_at: Shape that delay and energy are computed on: the ``base``'s own, or a larger one.
        priced_lora_rank: LoRA's rank there; by default 96 at width 768 in proportion.
        cohort: How many clients train in a round; by default all.
        selection: How they are chosen, by the pilot rate that each shows before the round.
        upload_policy: ``at-once``, or ``wait`` for good coherence blocks within the deadline.
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
    precision: Literal["auto", "fp32", "bf16", "int8", "int8-dynamic", "nf4"] = "auto"
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
    selection: Literal["uniform", "best-channel", "proportional-fair"] = "uniform"
    upload_policy: Literal["at-once", "wait"] = "at-once"
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
    if experiment.priced_lora_rank is not None and experiment.priced_at == "base":
        raise InputError(
            f"priced_lora_rank = {experiment.priced_lora_rank} with priced_at 'base', which has "
            "the rank that learns; name another shape, or leave it out"
        )
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
