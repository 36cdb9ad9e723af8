"""What a method shares, as the layout that both ends hold. The table is in ``device_profiles``."""

from __future__ import annotations

from device_profiles.methods import METHODS, Method, find_method, shared_tensors
from device_profiles.modules import BaseShape
from messaging.layout import Layout

__all__ = ["METHODS", "Method", "find_method", "shared_layout"]


def shared_layout(method: Method, base: BaseShape, adapter_size: int) -> Layout:
    """Return the allow-list of a run: the tensors that may travel, in order."""
    shared = shared_tensors(method, base, adapter_size)
    return Layout.of((t.name, t.shape, t.bottleneck_axis) for t in shared)
