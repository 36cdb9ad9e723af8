"""Features of a frozen trunk on disk: who reads the same examples again need not go through it.

A file is found by what its numbers depend on: base, precision, versions, threads, and all examples
of the list in their order, because the bits of a batch depend on what else is in it. What is
damaged is computed anew. A folder holds a gibibyte: what was not asked for the longest goes first.
Shape letters: N examples, F features.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import secrets
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from edge_client.data.prompts import Encoded
from quantization.frozen_gpt2 import FrozenBase

log = logging.getLogger(__name__)

_NAME = "features"
_MOST_BYTES = 1 << 30
_OWN = re.compile("[0-9a-f]{64}")  # the folder is the user's
_VERSION = 1  # of what is computed: one more wherever features of the same examples change


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

        A disk that does not take them is told in the log: they are read again another time.
        """
        path = self._folder / f"{_key(base, encoder, examples)}.safetensors"
        found = _load(path)
        if found is None or len(found) != len(examples):
            found = read()
            _keep(path, found)
            _drop_oldest(self._folder, path)
        return found if encoder else found.to(base.weights.positions.device)


def _keep(path: Path, found: Tensor) -> None:
    """Put features at ``path``, whole or not at all; other processes may do the same."""
    new = path.with_name(f".{path.stem}.{os.getpid()}-{secrets.token_hex(4)}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({_NAME: found.cpu().contiguous()}, new)
        new.replace(path)
    except (OSError, SafetensorError) as err:
        log.warning("what the trunk says of pairs is not kept in %s: %s", path.parent, err)
    finally:
        with contextlib.suppress(OSError):
            new.unlink()


def _drop_oldest(folder: Path, newest: Path) -> None:
    """Drop files until a folder holds no more than it may; other processes may do the same."""
    with contextlib.suppress(OSError):  # one that another process dropped
        own = (p for p in folder.glob("*.safetensors") if _OWN.fullmatch(p.stem))
        there = [(p.stat(), p) for p in own if p != newest]
        held = newest.stat().st_size
        for found, path in sorted(there, key=lambda each: -each[0].st_mtime_ns):
            held += found.st_size
            if held > _MOST_BYTES:
                path.unlink(missing_ok=True)


def _key(base: FrozenBase, encoder: str, examples: Sequence[Encoded]) -> str:
    where = (torch.__version__, torch.get_num_threads(), str(base.weights.positions.device))
    weights = base.weights
    held = (base.precision, base.backend, weights.heads, weights.epsilon, weights.gelu)
    read = (base.identity.sha256, base.identity.tokenizer_sha256, encoder)
    library = version("transformers") if encoder else ""
    said = (_VERSION, *read, *held, library, *where)
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
    with contextlib.suppress(OSError):
        os.utime(path)  # it was asked for
    whole = found is not None and found.ndim == 2 and found.dtype == torch.float32
    return found if whole and bool(torch.isfinite(found).all()) else None
