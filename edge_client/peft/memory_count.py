"""Counting what torch holds, from the operations that make it: the same on every machine."""

from __future__ import annotations

from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_MAPPED = 32 << 20  # glibc's largest threshold on 64 bits, which it has once such a block was freed


class MemoryCount(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch has no types here
    """Counts the storages that operations make while it is entered, in bytes.

    What was there before, views of it, and what a library makes inside an operation do not count.

    Attributes:
        peak_bytes: The most that were alive at once.
        largest_bytes: The largest of them.
        heap_bytes: The most at once of those that glibc takes from its heap, where freed ones leave
            holes; larger ones it takes from the system, and gives back.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak_bytes = self.largest_bytes = self.heap_bytes = 0
        self._given: dict[int, Any] = {}
        self._made: dict[int, tuple[Any, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and look at what it was given and what it made."""
        kwargs = kwargs or {}
        self._forget()
        for storage in _storages((args, kwargs)):
            if storage._cdata not in self._made:
                self._given[storage._cdata] = _weak(storage)
        out = func(*args, **kwargs)
        self._forget()
        for storage in _storages(out):
            if storage._cdata not in self._given:
                self._made[storage._cdata] = (_weak(storage), storage.nbytes())
                self.largest_bytes = max(self.largest_bytes, storage.nbytes())
        sizes = [size for _, size in self._made.values()]
        self.peak_bytes = max(self.peak_bytes, sum(sizes))
        self.heap_bytes = max(self.heap_bytes, sum(size for size in sizes if size < _MAPPED))
        return out

    def _forget(self) -> None:
        """Drop what is gone; its address may be another's now."""
        self._given = {k: ref for k, ref in self._given.items() if not ref.expired()}
        self._made = {k: (ref, n) for k, (ref, n) in self._made.items() if not ref.expired()}


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    tensors = (leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))
    return [tensor.untyped_storage() for tensor in tensors]


def _weak(storage: torch.UntypedStorage) -> Any:
    """Return a reference to a storage that does not keep it."""
    reference: Any = StorageWeakRef
    return reference(storage)
