"""An exported ONNX model on ONNX Runtime: next-token logits from tokens, with a cache.

Needs onnxruntime and numpy, no torch and no transformers.
Shape letters: T tokens, V vocabulary, H heads.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from quantization.errors import BaseModelError, MissingExtraError

FILE = "model.onnx"
_QUIET = 3  # errors only
_PAST, _PRESENT = "past_key_values.", "present."


class OnnxModel:
    """A causal language model that reads tokens one after the other; batch of one.

    Args:
        folder: With ``model.onnx`` and ``config.json``.
        threads: Processor threads; by default as many as ONNX Runtime chooses.

    Raises:
        BaseModelError: If the folder is damaged, or holds another kind of model.
        MissingExtraError: If onnxruntime is not installed.
    """

    name = "onnx"

    def __init__(self, folder: Path, threads: int | None = None) -> None:
        try:
            import onnxruntime
        except ImportError as err:
            raise MissingExtraError(
                f"{folder} runs on ONNX Runtime, which is not installed: "
                "`pip install 'pwff[onnx]'` (onnxruntime alone is enough to run it)"
            ) from err
        self.positions, self._cache_shape = _read_shape(folder)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = _QUIET
        if threads is not None:
            options.intra_op_num_threads = threads
        path = folder / FILE
        try:
            session = onnxruntime.InferenceSession(
                path, options, providers=["CPUExecutionProvider"]
            )
        except Exception as err:  # its errors have no class in common
            line = str(err).strip().splitlines()[0][:200]
            raise BaseModelError(f"{path} cannot be loaded: {line}; export it again") from err
        self._session: Any = session
        self._inputs = [entry.name for entry in session.get_inputs()]
        self._outputs = [entry.name for entry in session.get_outputs()]
        self._past = [name for name in self._inputs if name.startswith(_PAST)]
        if self._outputs[:1] != ["logits"] or not self._past:
            raise BaseModelError(
                f"{path} is no text generation with a cache; export one with pwff export"
            )
        self.reset()

    def reset(self) -> None:
        """Forget every token that was read."""
        self._read = 0
        empty = np.zeros(self._cache_shape, np.float32)
        self._cache: dict[str, Any] = dict.fromkeys(self._past, empty)

    def feed(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """Read more tokens and return the logits of the next one. Shape (T,) -> (V,)."""
        ids = np.array([tokens], dtype=np.int64)  # (1, T)
        end = self._read + len(tokens)
        given = {
            "input_ids": ids,
            "attention_mask": np.ones((1, end), np.int64),
            "position_ids": np.arange(self._read, end)[None],
        }
        logits, *present = self._session.run(
            None, {k: v for k, v in given.items() if k in self._inputs} | self._cache
        )
        kept = [name.replace(_PRESENT, _PAST) for name in self._outputs[1:]]
        self._cache = dict(zip(kept, present, strict=True))
        self._read = end
        last: npt.NDArray[np.float32] = logits[0, -1]
        return last


def _read_shape(folder: Path) -> tuple[int, tuple[int, int, int, int]]:
    """Return the number of positions, and the shape of an empty cache (1, H, 0, D / H)."""
    try:
        config = json.loads((folder / "config.json").read_text())
        heads, width = int(config["n_head"]), int(config["n_embd"])
        return int(config["n_positions"]), (1, heads, 0, width // heads)
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError) as err:
        raise BaseModelError(
            f"{folder} has no readable config.json of a GPT-2; export it again"
        ) from err
