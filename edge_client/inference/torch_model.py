"""A transformers model as a runtime: next-token logits from tokens, with a cache.

Shape letters: T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from quantization.errors import BaseModelError

_ADAPTED = "pwff_gpt2"


class TorchModel:
    """A causal language model that reads tokens one after the other; batch of one.

    Args:
        model: A causal language model of transformers.
        positions: How many tokens it can read; by default what a GPT-2's configuration says.
    """

    name = "torch"

    def __init__(self, model: Any, positions: int | None = None) -> None:
        self._model = model.eval()
        self.positions = positions or int(model.config.n_positions)
        self.reset()

    def reset(self) -> None:
        """Forget every token that was read."""
        from transformers import DynamicCache

        self._cache = DynamicCache()

    def feed(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """Read more tokens and return the logits of the next one. Shape (T,) -> (V,)."""
        with torch.inference_mode():
            read = self._model(
                torch.tensor([list(tokens)]),  # (1, T)
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
            )
        last: npt.NDArray[np.float32] = read.logits[0, -1].numpy()
        return last


def load_torch_model(folder: Path, model_type: str) -> TorchModel:
    """Return the model of an exported folder; no code in the folder is run.

    Raises:
        BaseModelError: If the folder is damaged or lacks a tensor.
    """
    from safetensors import SafetensorError
    from transformers import GPT2LMHeadModel

    from quantization.hf.modeling_pwff import PwffGPT2LMHeadModel

    kind = PwffGPT2LMHeadModel if model_type == _ADAPTED else GPT2LMHeadModel
    try:
        model, notes = kind.from_pretrained(
            folder,
            dtype=torch.float32,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as err:
        line = f"{str(err).strip()}\n".splitlines()[0][:200]
        raise BaseModelError(f"{folder} cannot be loaded: {line}; export it again") from err
    missing = sorted(notes["missing_keys"])
    if missing:
        raise BaseModelError(f"{folder} lacks the tensor '{missing[0]}'; export it again")
    return TorchModel(model)
