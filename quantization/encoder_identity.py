"""Which encoder a run's reward models read, where they do not read the base. Needs no torch."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from device_profiles.reward_heads import BASE_TRUNK
from quantization.errors import BaseModelError
from quantization.identity import count_parameters, file_sha256, locate

_WEIGHTS, _TOKENIZER = "model.safetensors", "tokenizer.json"
_NEEDED = ("config.json", _WEIGHTS, _TOKENIZER)
_BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt")
_WIDTHS = ("hidden_size", "dim")  # of BERT and its like, and of DistilBERT


@dataclass(frozen=True, kw_only=True)
class EncoderIdentity:
    """An encoder on disk.

    Attributes:
        name: As the user wrote it; of a folder, its last part.
        folder: Where configuration, weights and tokenizer are.
        sha256: Of all that says what it computes: configuration, weights and tokenizer.
        width: Of its hidden states.
        parameters: Number of its weights.
    """

    name: str
    folder: Path
    sha256: str
    width: int
    parameters: int


def identify_encoder(name: str) -> EncoderIdentity | None:
    """Return the identity of an encoder; none of ``base``.

    Args:
        name: ``base``, a folder, or a hub id such as ``distilbert-base-uncased``.

    Raises:
        BaseModelError: If the folder is missing or damaged.
        HubUnavailableError: If it is a hub id and the hub does not answer.
    """
    if name == BASE_TRUNK:
        return None
    folder = locate(name, what="encoder")
    try:
        config = json.loads((folder / "config.json").read_text())
        width = next(config[key] for key in _WIDTHS if key in config)
        files = {file: file_sha256(folder / file) for file in _NEEDED}
        there = [file for file in _BESIDE if (folder / file).is_file()]
        files |= {file: file_sha256(folder / file) for file in there}
    except (OSError, ValueError, TypeError, StopIteration) as err:
        raise BaseModelError(
            f"encoder '{name}': no encoder can be read there; give the folder of one with "
            f"config.json, {_WEIGHTS} and {_TOKENIZER}, or '{BASE_TRUNK}'"
        ) from err
    if not isinstance(width, int) or width < 1:
        raise BaseModelError(
            f"encoder '{name}': a width of {width!r} in its config.json; give a whole number"
        )
    return EncoderIdentity(
        name=folder.resolve().name if Path(name).expanduser().is_dir() else name,
        folder=folder,
        sha256=hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest(),
        width=width,
        parameters=count_parameters(folder / _WEIGHTS),
    )
