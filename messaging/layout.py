"""The agreed order of the tensors that may travel: the allow-list, and the plan of packing.

Both ends hold the same layout and name it by its hash. A tensor whose name is not in it cannot be
packed on the device, and nothing but the packed vector is read by the aggregator.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import numpy.typing as npt

from messaging.errors import PrivateTensorError, ProtocolError

Tensors = dict[str, npt.NDArray[np.float32]]
Vector = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One tensor: its name, its shape, and the axis with a scale for each entry in int8 and int4.

    ``scale_axis`` is the bottleneck axis of an adapter or LoRA factor; ``None`` (a bias) means one
    scale for the tensor.
    """

    name: str
    shape: tuple[int, ...]
    scale_axis: int | None = None

    @property
    def size(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    @property
    def scales(self) -> int:
        """Number of scales of int8 and int4."""
        return 1 if self.scale_axis is None else self.shape[self.scale_axis]


class NamedTensor(Protocol):
    """What a layout is made of."""

    @property
    def name(self) -> str:
        """Under which it travels."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of its entries."""

    @property
    def bottleneck_axis(self) -> int | None:
        """The axis with a scale for each entry; none for one scale."""


@dataclass(frozen=True)
class Layout:
    """The shared tensors in their order."""

    specs: tuple[TensorSpec, ...]

    @classmethod
    def of(cls, tensors: Iterable[NamedTensor]) -> Layout:
        """Return the layout of tensors in the order given, scaled along their bottlenecks."""
        return cls(
            tuple(
                TensorSpec(name=t.name, shape=t.shape, scale_axis=t.bottleneck_axis)
                for t in tensors
            )
        )

    def first(self, count: int) -> Layout:
        """Return the layout of the first ``count`` tensors."""
        return self if count == len(self.specs) else Layout(self.specs[:count])

    @cached_property
    def sha256(self) -> str:
        """Hash of names, shapes and scale axes."""
        plan = [[s.name, list(s.shape), s.scale_axis] for s in self.specs]
        return hashlib.sha256(json.dumps(plan).encode()).hexdigest()

    @cached_property
    def size(self) -> int:
        """Number of entries of the packed vector."""
        return sum(s.size for s in self.specs)

    @cached_property
    def scales(self) -> int:
        """Number of scales of int8 and int4 of the packed vector."""
        return sum(s.scales for s in self.specs)

    @cached_property
    def names(self) -> frozenset[str]:
        """The allow-list."""
        return frozenset(s.name for s in self.specs)

    def pack(self, tensors: Tensors) -> Vector:
        """Return the tensors as one vector. Shape (size,).

        Raises:
            PrivateTensorError: If a tensor is not on the allow-list.
            ProtocolError: If one is absent or has another shape.
        """
        strangers = sorted(set(tensors) - self.names)
        if strangers:
            raise PrivateTensorError(
                f"tensor '{strangers[0]}' is personal and never leaves the device; "
                f"{len(self.names)} shared names are allowed"
            )
        absent = sorted(self.names - set(tensors))
        if absent:
            raise ProtocolError("name", f"tensor '{absent[0]}' is absent from the update")
        for spec in self.specs:
            if tensors[spec.name].shape != spec.shape:
                raise ProtocolError(
                    "shape",
                    f"tensor '{spec.name}' has shape {tensors[spec.name].shape}; "
                    f"the layout says {spec.shape}",
                )
        flat = [np.asarray(tensors[s.name], dtype=np.float32).reshape(-1) for s in self.specs]
        return np.concatenate(flat) if flat else np.zeros(0, np.float32)

    def unpack(self, vector: Vector) -> Tensors:
        """Return the named tensors of a packed vector (views into it).

        Raises:
            ProtocolError: If the vector has another length than the layout.
        """
        if vector.shape != (self.size,):
            raise ProtocolError("shape", f"packed shape {vector.shape}; expected ({self.size},)")
        tensors: Tensors = {}
        start = 0
        for spec in self.specs:
            tensors[spec.name] = vector[start : start + spec.size].reshape(spec.shape)
            start += spec.size
        return tensors


def joint_sha256(layouts: Iterable[Layout]) -> str:
    """Return the hash of what a run shares in its stages: of one layout, that layout's own."""
    hashes = [layout.sha256 for layout in layouts]
    if len(set(hashes)) == 1:
        return hashes[0]
    return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()
