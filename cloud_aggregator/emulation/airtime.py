"""What an upload of each stage takes on the air, in words, before the run starts.

Priced by the same channel model as the run, over its devices' own links and at its priced shape; a
mean of seeded draws, so the run's own draws differ. Bytes are those of the codes, without headers.
Of a reward model its head travels, or the adapters on its trunk as well, or all of its trunk
(``reward_shares``). What the other choices would take is said beside it, so that the choice is seen
before it is paid for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import numpy as np

from cloud_aggregator.emulation.fleet import FleetPlan
from cloud_aggregator.experiment import Experiment
from cloud_aggregator.progress import human_bytes
from device_profiles.channel import upload_seconds
from device_profiles.methods import Kind, Method, ModuleShape, RewardShares, find_method
from device_profiles.seeds import stream
from edge_client.costs import own_layout, stage_layout
from edge_client.device_record import link_of
from messaging.chunks import wire_bytes
from messaging.codecs import CODECS
from messaging.layout import Layout
from messaging.protocol import DeviceRecord, Stage

_MOST_LINKS = 16  # devices whose links are drawn from; more change a mean by little
_TITLES: dict[Stage, str] = {
    "instruction": "instruction tuning",
    "reward": "reward learning",
    "alignment": "alignment",
}
_KINDS: dict[tuple[Kind, ...], str] = {
    ("adapters",): "the adapters",
    ("lora",): "the LoRA modules",
    ("adapters", "lora"): "adapters and LoRA modules",
}
_REWARDS: dict[RewardShares, str] = {
    "head": "the heads alone",
    "adapters": "the heads and the adapters on each trunk",
    "all": "the heads and all weights of each trunk",
}


@dataclass(frozen=True, kw_only=True)
class Upload:
    """A mean upload: bytes, and seconds on the air."""

    bytes: float
    seconds: float

    @property
    def words(self) -> str:
        """For a person: ``25.3 kB, about 0.9 s on the air``."""
        return f"{human_bytes(self.bytes)}, about {_duration(self.seconds)} on the air"


def airtime_lines(experiment: Experiment, fleet: FleetPlan) -> list[str]:
    """Return one sentence a stage; nothing of a stage in which nothing travels."""
    method, modules = find_method(experiment.method), _priced_modules(fleet)
    devices = [client.device for client in fleet.clients]
    lines = []
    for stage in experiment.stage_names:
        layout = stage_layout(stage, method, modules)
        if not layout.size:
            continue
        sent = _mean(experiment, devices, layout, stage)
        chosen = experiment.reward_shares
        kinds = _REWARDS[chosen] if stage == "reward" else _KINDS[method.shared]
        line = (
            f"Of {_TITLES[stage]}, {kinds} travel: an upload is {sent.words} "
            f"(modelled, {experiment.codec})"
        )
        if stage == "reward":
            line += _beyond(experiment, devices, method, modules)
        lines.append(f"{line}.")
    return lines


def _beyond(
    experiment: Experiment, devices: Sequence[DeviceRecord], method: Method, modules: ModuleShape
) -> str:
    """Return what the other choices would take; an encoder leaves none."""
    if modules.encoder_width is not None:
        return "; the encoder that they read does not travel"
    others = []
    for shares, words in _REWARDS.items():
        if shares != modules.reward_shares:
            layout = stage_layout("reward", method, replace(modules, reward_shares=shares))
            instead = _mean(experiment, devices, layout, "reward").words
            others.append(f"{words} (reward_shares = '{shares}') would be {instead}")
    return f"; {', and '.join(others)}"


def _mean(
    experiment: Experiment, devices: Sequence[DeviceRecord], layout: Layout, stage: Stage
) -> Upload:
    """Return a mean upload over the first devices; each sends what of the layout it holds."""
    sizes, seconds = [], []
    for device in devices[:_MOST_LINKS]:
        size = _code_bytes(own_layout(layout, device.lora_count), experiment.codec)
        bits = 8 * wire_bytes(size, experiment.chunk_bytes)
        generator = stream(experiment.seed, "airtime", stage, device.id)
        sizes.append(size)
        seconds.append(_seconds(bits, device, generator))
    return Upload(bytes=fmean(sizes), seconds=fmean(seconds))


def _seconds(bits: float, device: DeviceRecord, generator: np.random.Generator) -> float:
    """Return the airtime of so many bits; a long upload is a short one, so many times over."""
    times = max(1.0, bits / 1e8)  # the mean rate of fading has long been reached by then
    return times * upload_seconds(bits / times, link_of(device), generator)


def _code_bytes(layout: Layout, codec: str) -> int:
    arrays = CODECS[codec].arrays(layout).values()
    return sum(np.dtype(kind).itemsize * math.prod(shape) for kind, shape in arrays)


def _priced_modules(fleet: FleetPlan) -> ModuleShape:
    if fleet.priced is None:
        return fleet.modules
    return replace(fleet.modules, base=fleet.priced.base, lora_rank=fleet.priced.lora_rank)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
