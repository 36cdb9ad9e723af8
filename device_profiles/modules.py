"""The small modules that go on a decoder: where they sit, what they are called, what they hold.

Pure arithmetic on the shape of the base. Shape letters: D model width, R rank, M bottleneck size.
Adapter names and shapes are what travels; LoRA names and shapes are what must not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from device_profiles.config_files import choose
from device_profiles.errors import InputError
from device_profiles.families import FAMILIES, GPT2, PLACEMENTS
from device_profiles.seeds import stream

__all__ = [
    "ADAPTER_SITES",
    "PLACEMENTS",
    "BaseShape",
    "LoraSite",
    "NamedShape",
    "adapter_name",
    "adapter_sites",
    "adapter_tensors",
    "base_tensors",
    "first_lora_sites",
    "initial_adapters",
    "initial_lora",
    "is_lora",
    "lora_rank",
    "lora_sites",
    "lora_tensors",
]

ADAPTER_SITES = ("attention", "mlp", "block")
REFERENCE_WIDTH = 768
REFERENCE_RANK = 96


@dataclass(frozen=True, kw_only=True)
class BaseShape:
    """What of a base the modules depend on.

    Attributes:
        family: Row of ``device_profiles.families.FAMILIES``.
        keys: Width of the keys and of the values, where heads share them; none for the width.
        vocabulary: Rows of the embedding; no module depends on it, nor on
        positions: the longest sequence, tokens. Both are of use where all weights are looked at.
    """

    layers: int
    width: int
    inner: int
    family: str = GPT2
    keys: int | None = None
    vocabulary: int = field(default=0, compare=False)
    positions: int = field(default=0, compare=False)


@dataclass(frozen=True, kw_only=True)
class LoraSite:
    """One projection that a LoRA module can sit on: its path in the model and its two sizes."""

    path: str
    inputs: int
    outputs: int


def lora_sites(base: BaseShape, placement: str) -> list[LoraSite]:
    """Return the sites of a placement in the order in which they are filled.

    Raises:
        InputError: If the placement is unknown, or the base's family has no sites for it.
    """
    choose("LoRA placement", placement, PLACEMENTS)
    family = FAMILIES[base.family]
    if placement not in family.placements:
        raise InputError(
            f"LoRA placement '{placement}' has no sites on {family.title}; choose "
            f"{' or '.join(family.placements)}"
        )
    size = {
        "width": base.width,
        "qkv": 3 * base.width,
        "inner": base.inner,
        "keys": base.keys or base.width,
    }
    return [
        LoraSite(
            path=f"{family.blocks}.{block}.{kind.path}",
            inputs=size[kind.inputs],
            outputs=size[kind.outputs],
        )
        for kind in family.placements[placement]
        for block in reversed(range(base.layers))
    ]


def first_lora_sites(base: BaseShape, placement: str, count: int) -> list[LoraSite]:
    """Return the first ``count`` sites.

    Raises:
        InputError: If the base has fewer.
    """
    sites = lora_sites(base, placement)
    if not 0 <= count <= len(sites):
        raise InputError(
            f"LoRA count {count} on a base of {base.layers} blocks; "
            f"placement '{placement}' has {len(sites)} sites there"
        )
    return sites[:count]


def adapter_sites(base: BaseShape, count: int | None = None) -> list[tuple[int, str]]:
    """Return (block, site) of every adapter, block by block.

    Raises:
        InputError: If ``count`` is given and is not what the sites of this base give.
    """
    sites = [(block, site) for block in range(base.layers) for site in ADAPTER_SITES]
    if count is not None and count != len(sites):
        raise InputError(
            f"adapter count {count}; a base of {base.layers} blocks has "
            f"{len(sites)} sites (three a block), so give {len(sites)} or leave it out"
        )
    return sites


def lora_rank(base: BaseShape, given: int | None) -> tuple[int, str]:
    """Return the rank and where it is from: ``given``, or ``proportional`` (96 at width 768).

    Raises:
        InputError: If a given rank is not between 1 and the width.
    """
    if given is None:
        return max(1, round(REFERENCE_RANK * base.width / REFERENCE_WIDTH)), "proportional"
    if not 1 <= given <= base.width:
        raise InputError(f"LoRA rank {given}; choose 1 to {base.width}, the width of the base")
    return given, "given"


@dataclass(frozen=True, kw_only=True)
class NamedShape:
    """A tensor of a module: its name, its shape, and its bottleneck axis (none for a bias)."""

    name: str
    shape: tuple[int, ...]
    bottleneck_axis: int | None

    @property
    def size(self) -> int:
        """Number of parameters."""
        return math.prod(self.shape)


def base_tensors(base: BaseShape) -> list[NamedShape]:
    """Return all weights of a GPT-2, whose head is the embedding; projections as (inputs, outputs).

    Raises:
        InputError: If the base is of another family, or of no known vocabulary and positions.
    """
    if base.family != GPT2 or not base.vocabulary or not base.positions:
        raise InputError(
            f"the weights of a {base.family} with {base.vocabulary} words and {base.positions} "
            "positions are not known one by one; give a GPT-2"
        )
    width, inner = base.width, base.inner
    projections = {
        "attn.c_attn": (width, 3 * width),
        "attn.c_proj": (width, width),
        "mlp.c_fc": (width, inner),
        "mlp.c_proj": (inner, width),
    }
    block: dict[str, tuple[int, ...]] = {
        **{f"{norm}.{part}": (width,) for norm in ("ln_1", "ln_2") for part in ("weight", "bias")},
        **{f"{name}.weight": shape for name, shape in projections.items()},
        **{f"{name}.bias": (shape[1],) for name, shape in projections.items()},
    }
    shapes: dict[str, tuple[int, ...]] = {
        "wte.weight": (base.vocabulary, width),
        "wpe.weight": (base.positions, width),
        **{f"h.{i}.{k}": v for i in range(base.layers) for k, v in block.items()},
        "ln_f.weight": (width,),
        "ln_f.bias": (width,),
    }
    return [NamedShape(name=n, shape=s, bottleneck_axis=None) for n, s in shapes.items()]


def adapter_name(block: int, site: str) -> str:
    """Return the name under which an adapter's tensors travel."""
    return f"adapters.{block}.{site}"


def adapter_tensors(base: BaseShape, size: int) -> list[NamedShape]:
    """Return the tensors of all adapters: 2*D*M + D + M parameters each.

    Raises:
        InputError: If ``size`` is not between 1 and the width.
    """
    if not 1 <= size <= base.width:
        raise InputError(f"adapter size {size}; choose 1 to {base.width}, the width of the base")
    tensors = []
    for block, site in adapter_sites(base):
        name = adapter_name(block, site)
        tensors += [
            NamedShape(name=f"{name}.down.weight", shape=(size, base.width), bottleneck_axis=0),
            NamedShape(name=f"{name}.down.bias", shape=(size,), bottleneck_axis=None),
            NamedShape(name=f"{name}.up.weight", shape=(base.width, size), bottleneck_axis=1),
            NamedShape(name=f"{name}.up.bias", shape=(base.width,), bottleneck_axis=None),
        ]
    return tensors


def is_lora(name: str) -> bool:
    """Return whether a tensor is a factor of a LoRA module."""
    return name.endswith((".lora_A.weight", ".lora_B.weight"))


def lora_tensors(sites: list[LoraSite], rank: int) -> list[NamedShape]:
    """Return the two factors of every LoRA module: R*(in + out) parameters each."""
    tensors = []
    for site in sites:
        a, b = (rank, site.inputs), (site.outputs, rank)
        tensors += [
            NamedShape(name=f"{site.path}.lora_A.weight", shape=a, bottleneck_axis=0),
            NamedShape(name=f"{site.path}.lora_B.weight", shape=b, bottleneck_axis=1),
        ]
    return tensors


def initial_adapters(base: BaseShape, size: int, seed: int) -> dict[str, npt.NDArray[np.float32]]:
    """Return the adapters that every device of a run starts from.

    Down-projections are uniform within 1/sqrt(D), everything else is zero, so the untouched model
    computes what the bare base computes. The values belong to (seed, tensor name).
    """
    tensors = {}
    for tensor in adapter_tensors(base, size):
        if tensor.name.endswith(".down.weight"):
            bound = base.width**-0.5
            values = stream(seed, "adapter", tensor.name).uniform(-bound, bound, tensor.shape)
        else:
            values = np.zeros(tensor.shape)
        tensors[tensor.name] = values.astype(np.float32)
    return tensors


def initial_lora(sites: list[LoraSite], rank: int, seed: int) -> dict[str, npt.NDArray[np.float32]]:
    """Return LoRA modules before training: A uniform within 1/sqrt(in), B zero.

    A belongs to (seed, tensor name): it is the same on every device of a run.
    """
    tensors = {}
    for tensor in lora_tensors(sites, rank):
        if tensor.bottleneck_axis == 0:
            bound = tensor.shape[1] ** -0.5
            values = stream(seed, "lora", tensor.name).uniform(-bound, bound, tensor.shape)
        else:
            values = np.zeros(tensor.shape)
        tensors[tensor.name] = values.astype(np.float32)
    return tensors
