"""A base's tokenizer: text to token ids, read without transformers where its file says everything.

Importing transformers' tokenizers takes a process 1.2 s and 60 MB, about as long as importing torch
(transformers 4.57, torch 2.13, an AMD EPYC).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from device_profiles.families import GPT2
from quantization.errors import BaseModelError
from quantization.identity import BaseIdentity

#: Classes that add nothing to what ``tokenizer.json`` does, with their own end token.
_PLAIN: dict[str, str | None] = {
    "PreTrainedTokenizerFast": None,
    "GPT2Tokenizer": "<|endoftext|>",
    "GPT2TokenizerFast": "<|endoftext|>",
}


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """A text as tokens."""

    input_ids: list[int]


class Tokenizer:
    """Text to tokens as transformers' tokenizers do it, by the same names; nothing is cut.

    Args:
        backend: A ``tokenizers.Tokenizer``; it is made to neither cut nor pad.
        end: Text of the token that ends a response, one of its tokens.
    """

    def __init__(self, backend: Any, end: str) -> None:
        backend.no_truncation()
        backend.no_padding()
        self.backend_tokenizer = backend
        self.eos_token = end
        self.eos_token_id = int(backend.token_to_id(end))

    def __len__(self) -> int:
        return int(self.backend_tokenizer.get_vocab_size())

    def __call__(self, text: str) -> Encoded:
        """Return a text's tokens, those that the tokenizer itself puts around it included."""
        return Encoded(input_ids=self.backend_tokenizer.encode(text).ids)

    def decode(self, tokens: list[int]) -> str:
        """Return the text of tokens."""
        return str(self.backend_tokenizer.decode(tokens, skip_special_tokens=False))


def load_tokenizer(identity: BaseIdentity) -> Tokenizer:
    """Return a base's tokenizer.

    Raises:
        BaseModelError: If it is damaged, names no end token, or does not fit the weights.
    """
    folder = identity.tokenizer_folder
    tokenizer = _read_plain(identity)
    if tokenizer is None:
        read = transformers_tokenizer(folder)
        if read.eos_token_id is None:
            raise BaseModelError(
                f"the tokenizer of {folder} names no end token; set eos_token in its "
                "tokenizer_config.json"
            )
        tokenizer = Tokenizer(read.backend_tokenizer, read.eos_token)
    if len(tokenizer) > identity.vocabulary:
        raise BaseModelError(
            f"the tokenizer of {folder} has {len(tokenizer)} tokens and "
            f"{identity.folder} {identity.vocabulary} embedding rows; give the tokenizer that the "
            "checkpoint was trained with"
        )
    return tokenizer


def transformers_tokenizer(folder: Path) -> Any:
    """Return a folder's tokenizer as transformers reads it.

    Raises:
        BaseModelError: If it is damaged, or none that the package tokenizers runs.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as err:  # the library raises a bare one for a damaged file
        line = f"{str(err).strip()}\n".splitlines()[0][:200]
        raise BaseModelError(f"the tokenizer of {folder} cannot be read: {line}") from err
    if not tokenizer.is_fast:
        raise BaseModelError(
            f"the tokenizer of {folder} is a {type(tokenizer).__name__}, which the package "
            "tokenizers does not run; give a folder with a tokenizer.json"
        )
    return tokenizer


def _read_plain(identity: BaseIdentity) -> Tokenizer | None:
    """Return the tokenizer of a folder whose ``tokenizer.json`` says everything, else nothing."""
    from tokenizers import Tokenizer as Backend  # type: ignore[import-untyped]

    folder = identity.tokenizer_folder
    try:
        config = _json(folder / "tokenizer_config.json")
        config = {**_json(folder / "special_tokens_map.json"), **config}
        if "tokenizer_class" not in config and identity.shape.family == GPT2:
            config["tokenizer_class"] = "GPT2Tokenizer"
        end = _text(config.setdefault("eos_token", _PLAIN[config["tokenizer_class"]]))
        backend = Backend.from_file(str(folder / "tokenizer.json"))
        plain = _adds_nothing(config, backend.get_added_tokens_decoder())
    except Exception:  # whatever is odd about it, transformers says what
        return None
    if not plain or end is None or (folder / "added_tokens.json").exists():
        return None
    return Tokenizer(backend, end)


def _json(path: Path) -> dict[str, Any]:
    """Return a file's object; none is one that says nothing."""
    return dict(json.loads(path.read_bytes())) if path.exists() else {}


def _adds_nothing(config: Mapping[str, Any], known: Mapping[int, Any]) -> bool:
    """Return whether the tokens that a configuration names are all there, just as it has them."""
    if any(config.get(key) for key in ("auto_map", "add_prefix_space", "add_bos_token")):
        return False
    for number, token in config.get("added_tokens_decoder", {}).items():
        there = known.get(int(number))
        if there is None or any(getattr(there, key) != value for key, value in token.items()):
            return False
    if config.get("additional_special_tokens") or config.get("extra_special_tokens"):
        return False
    named = {_text(config[key]) for key in config if key.endswith("_token")} - {None}
    return named <= {token.content for token in known.values()}


def _text(token: Any) -> str | None:
    """Return the text of a token as a configuration writes it: itself, or in an object."""
    return None if token is None else str(token["content"] if isinstance(token, dict) else token)
