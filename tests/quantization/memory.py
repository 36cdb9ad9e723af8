"""Counting what torch holds, from the operations that make it: the same on every machine."""

from __future__ import annotations

from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class MemoryCount(TorchDispatchMode):
    """Counts the storages that operations make while it is entered, in bytes.

    What was there before, views of it, and what a library makes inside an operation do not count.

    Attributes:
        peak_bytes: The most that were alive at once.
        largest_bytes: The largest of them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak_bytes = self.largest_bytes = 0
        self._given: dict[int, StorageWeakRef] = {}
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._forget()
        for storage in _storages((args, kwargs)):
            if storage._cdata not in self._made:
                self._given[storage._cdata] = StorageWeakRef(storage)
        out = func(*args, **kwargs)
        self._forget()
        for storage in _storages(out):
            if storage._cdata not in self._given:
                self._made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
                self.largest_bytes = max(self.largest_bytes, storage.nbytes())
        self.peak_bytes = max(self.peak_bytes, sum(size for _, size in self._made.values()))
        return out

    def _forget(self) -> None:
        """Drop what is gone; its address may be another's now."""
        self._given = {k: ref for k, ref in self._given.items() if not ref.expired()}
        self._made = {k: (ref, n) for k, (ref, n) in self._made.items() if not ref.expired()}


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    tensors = (leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))
    return [tensor.untyped_storage() for tensor in tensors]
