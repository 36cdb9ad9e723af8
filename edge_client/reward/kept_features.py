"""Features of a frozen trunk on disk: who reads the same examples again need not go through it.

A file is found by what its numbers depend on: base, precision, versions, threads, and all examples
of the list in their order, because the bits of a batch depend on what else is in it. What is
damaged is computed anew.
Shape letters: N examples, F features.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from edge_client.data.prompts import Encoded
from edge_client.disk import replace_file
from quantization.frozen_gpt2 import FrozenBase

_NAME = "features"


class KeptFeatures:
    """A folder of features; it is made when the first are kept."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def of(
        self,
        base: FrozenBase,
        examples: Sequence[Encoded],
        read: Callable[[], Tensor],
        *,
        encoder: str = "",
    ) -> Tensor:
        """Return what is kept of these examples under a bare base, or read and keep it.

        Args:
            base: The trunk, without modules.
            examples: N of them.
            read: Goes through the trunk. Shape (N, F), fp32.
            encoder: Hash of the encoder that is the trunk instead; the base's tokens are its texts.

        Raises:
            DiskError: If the disk does not take it.
        """
        path = self._folder / f"{_key(base, encoder, examples)}.safetensors"
        found = _load(path)
        if found is None or len(found) != len(examples):
            found = read()
            kept = {_NAME: found.cpu().contiguous()}
            replace_file(path, lambda new: save_file(kept, new))
        return found if encoder else found.to(base.weights.positions.device)


def _key(base: FrozenBase, encoder: str, examples: Sequence[Encoded]) -> str:
    where = (torch.__version__, torch.get_num_threads(), str(base.weights.positions.device))
    said = (base.identity.sha256, base.precision, base.backend, encoder, *where)
    digest = hashlib.sha256("\n".join(map(str, said)).encode())
    for example in examples:
        tokens = example.tokens
        digest.update(f"\n{example.response_start} {len(tokens)} {tokens.dtype}\n".encode())
        digest.update(tokens.tobytes())
    return digest.hexdigest()


def _load(path: Path) -> Tensor | None:
    try:
        found = load_file(path).get(_NAME)
    except (OSError, SafetensorError):
        return None
    whole = found is not None and found.ndim == 2 and found.dtype == torch.float32
    return found if whole and bool(torch.isfinite(found).all()) else None
