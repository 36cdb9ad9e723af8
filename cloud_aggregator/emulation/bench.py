"""Where emulated clients work: the bases and the data that they have in common in one process.

A client is light: its places in the data, its device, and a folder. What it has learned is in the
folder; a base is lent to it for one piece of work at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from cloud_aggregator.emulation.fleet import ClientSpec, WorkerSpec
from cloud_aggregator.methods import ModuleShape, find_method, stage_layout
from device_profiles.errors import InputError
from device_profiles.families import GPT2
from edge_client.data.instructions import Example
from edge_client.data.own_data import Preferences
from edge_client.device_record import link_of
from edge_client.local_client import LocalClient, Setup
from edge_client.peft.build import build_model
from edge_client.progress import Progress
from edge_client.works import build_works, load_judging
from quantization.encoder_identity import EncoderIdentity, identify_encoder
from quantization.frozen_gpt2 import FrozenBase, load_frozen
from quantization.identity import BaseIdentity


def make_setup(spec: WorkerSpec, identity: BaseIdentity) -> Setup:
    """Return what every client of a run has in common; it needs no base in memory.

    Raises:
        InputError: If the encoder of the reward models is not what the run was planned on.
    """
    encoder = _encoder(spec)
    method, modules = find_method(spec.method), _modules(spec, identity, encoder)
    return Setup(
        run=spec.run,
        method=spec.method,
        layouts={stage: stage_layout(stage, method, modules) for stage in spec.stages},
        placement=spec.placement,
        adapter_size=spec.adapter_size,
        lora_rank=spec.lora_rank,
        chunk_bytes=spec.chunk_bytes,
        priced=spec.priced,
        reward_shares=spec.reward_shares,
        encoder=encoder,
    )


def load_bases(
    spec: WorkerSpec, identity: BaseIdentity, there: Mapping[str, FrozenBase] | None = None
) -> dict[str, FrozenBase]:
    """Return the bases that a worker's clients compute with, one for each precision.

    None for a family that transformers computes (``edge_client.peft.build``).

    Args:
        spec: Of the worker.
        identity: Of the base.
        there: Those in memory already, which are not loaded again.

    Raises:
        BaseModelError: If the base is not usable.
        InputError: If a precision does not run on this machine.
    """
    if identity.shape.family != GPT2:
        return {}
    wanted: set[str] = {client.device.precision for client in spec.clients}
    if spec.preferences:
        wanted.add(spec.trunk_precision)
    there = there or {}
    return {p: there.get(p) or load_frozen(identity, p) for p in sorted(wanted)}


def _encoder(spec: WorkerSpec) -> EncoderIdentity | None:
    if spec.encoder_sha256 is None:
        return None
    encoder = identify_encoder(spec.reward_trunk)
    if encoder is None or encoder.sha256 != spec.encoder_sha256:
        raise InputError(
            f"reward_trunk {spec.reward_trunk} changed since the run was planned; start a new run"
        )
    return encoder


def _modules(
    spec: WorkerSpec, identity: BaseIdentity, encoder: EncoderIdentity | None
) -> ModuleShape:
    return ModuleShape(
        base=identity.shape,
        adapter_size=spec.adapter_size,
        placement=spec.placement,
        lora_rank=spec.lora_rank,
        reward_shares=spec.reward_shares,
        encoder_width=encoder.width if encoder else None,
    )


class Bench:
    """Bases and data of one process, and the clients that work on them.

    Args:
        spec: What they are.
        identity: Of the base.
        bases: By precision; each that a client or the reward models need (``load_bases``).
        examples: The run's instruction data.
        preferences: And its preference data.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        identity: BaseIdentity,
        *,
        bases: Mapping[str, FrozenBase],
        examples: Sequence[Example],
        preferences: Preferences,
    ) -> None:
        self.setup = make_setup(spec, identity)
        self._private = spec.private
        self._identity = identity
        self._examples, self._preferences = examples, preferences
        counts: dict[str, int] = {}
        for client in spec.clients:
            precision = client.device.precision
            counts[precision] = max(counts.get(precision, 0), client.device.lora_count)
        adapters = "adapters" in find_method(spec.method).trained
        self._models = {
            precision: build_model(
                identity,
                precision,
                bases.get(precision),
                adapter_size=spec.adapter_size if adapters else 0,
                placement=spec.placement,
                lora_count=count,
                lora_rank=spec.lora_rank,
            )
            for precision, count in sorted(counts.items())
        }
        self._judging = None
        if spec.preferences:
            self._judging = load_judging(
                identity,
                spec.trunk_precision,
                *bases.values(),
                shape=_modules(spec, identity, self.setup.encoder).trunk,
                kept=Path(spec.features),
                encoder=self.setup.encoder,
            )

    def client(self, spec: ClientSpec, folder: Path, progress: Progress | None) -> LocalClient:
        """Return one client.

        Args:
            spec: What it is.
            folder: Where its state is.
            progress: Where it is written down how far a training is; none begins it anew.
        """
        data = self._preferences.own(
            spec.own,
            [self._examples[i] for i in spec.train],
            [self._examples[i] for i in spec.held_out],
            [self._examples[i] for i in spec.others],
        )
        works = build_works(
            self.setup,
            self._models[spec.device.precision],
            spec.device,
            data,
            judging=self._judging,
            folder=folder,
            progress=progress,
        )
        return LocalClient(
            self.setup,
            works,
            base=self._identity,
            device=spec.device,
            profile=spec.profile,
            link=link_of(spec.device),
            folder=folder,
            private=self._private,
        )
