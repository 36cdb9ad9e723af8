"""Which base a run is built on: its folder, its shape and its hashes. Needs no torch.

A base is named ``mini`` (it comes with the project), by a folder, or by a hub id. Its identity is
the SHA-256 of its weights file and of its tokenizer; devices on another base are refused by it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import struct
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from device_profiles.families import FAMILIES, GPT2
from device_profiles.modules import BaseShape
from quantization.errors import BaseModelError, HubUnavailableError, MissingExtraError

log = logging.getLogger(__name__)

MINI = "mini"
_WEIGHTS = "model.safetensors"
_TOKENIZER = "tokenizer.json"
_MOST_HEADER_BYTES = 50_000_000
_TIED = ("lm_head.", "embed_out.")
_MASKS = (".attn.bias", ".attn.masked_bias")  # in old checkpoints: constants, not weights
_HUB_FILES = ["config.json", _WEIGHTS, "tokenizer*", "vocab.json", "merges.txt", "special_tokens*"]


@dataclass(frozen=True, kw_only=True)
class BaseIdentity:
    """A base on disk.

    Attributes:
        name: As the user wrote it; of a folder, its last part.
        folder: Where config and weights are.
        tokenizer_folder: Where the tokenizer is (the kit's, for a folder without one).
        sha256: Of the weights file.
        tokenizer_sha256: Of ``tokenizer.json``.
        parameters: Number of weights in the file, the tied head counted once.
        base_bytes: Size of the weights in fp32.
        positions: Longest sequence, tokens.
        vocabulary: Number of rows of the embedding.
    """

    name: str
    folder: Path
    tokenizer_folder: Path
    sha256: str
    tokenizer_sha256: str
    parameters: int
    positions: int
    vocabulary: int
    shape: BaseShape

    @property
    def base_bytes(self) -> int:
        """Size of the base in fp32, bytes."""
        return 4 * self.parameters


def mini_folder() -> Path:
    """Return the folder of the bundled base."""
    return Path(str(resources.files("quantization") / "bases" / MINI))


def identify(name: str) -> BaseIdentity:
    """Return the identity of a base.

    Raises:
        BaseModelError: If the folder is missing or damaged, or holds a model of no known family.
        HubUnavailableError: If ``name`` is a hub id and the hub does not answer.
    """
    folder = locate(name)
    config = _read_config(folder)
    weights = folder / _WEIGHTS
    shape = _shape(config, folder)
    parameters = count_parameters(weights, tied=_is_tied(config))
    family = FAMILIES[config["model_type"]]
    tokenizer = folder if (folder / _TOKENIZER).is_file() else mini_folder()
    vocabulary = int(config["vocab_size"])
    if tokenizer != folder:
        _check_fits(tokenizer, vocabulary, folder)
        log.warning("%s has no tokenizer.json; the kit's tokenizer is used", folder)
    return BaseIdentity(
        name=folder.resolve().name if Path(name).expanduser().is_dir() else name,
        folder=folder,
        tokenizer_folder=tokenizer,
        sha256=file_sha256(weights),
        tokenizer_sha256=file_sha256(tokenizer / _TOKENIZER),
        parameters=parameters,
        positions=int(config[family.positions]),
        vocabulary=vocabulary,
        shape=shape,
    )


def binding(identity: BaseIdentity, placement: str) -> str:
    """Return the hash that ties an update to base, tokenizer and placement."""
    words = [identity.sha256, identity.tokenizer_sha256, placement]
    return hashlib.sha256(json.dumps(words).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def locate(name: str, *, what: str = "model") -> Path:
    """Return the folder of a model: its own, the bundled one's, or where the hub's is fetched to.

    Args:
        name: ``mini``, a folder or a hub id.
        what: It is, for whoever reads that it is not there.

    Raises:
        BaseModelError: If there is no such folder, and it is no hub id either.
        HubUnavailableError: If it is a hub id and the hub does not answer.
    """
    if name == MINI:
        return mini_folder()
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise BaseModelError(f"{what} '{name}': no such folder; give {_instead(what)}")
    return _fetch(name, what)


def _instead(what: str) -> str:
    return "a checkpoint folder or 'mini'" if what == "model" else "a checkpoint folder"


def _fetch(hub_id: str, what: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    except ImportError as err:
        raise MissingExtraError(
            f"{what} '{hub_id}' is on the hub, and huggingface_hub is not installed: "
            "`pip install 'pwff[edge]'`, or give a checkpoint folder"
        ) from err
    try:
        return Path(snapshot_download(hub_id, allow_patterns=_HUB_FILES))
    except HFValidationError as err:
        raise BaseModelError(f"{what} '{hub_id}' is neither a folder nor a hub id") from err
    except (OSError, HfHubHTTPError) as err:
        raise HubUnavailableError(
            f"{what} '{hub_id}' could not be fetched from the hub ({type(err).__name__}); "
            f"connect to it, or give {_instead(what)}"
        ) from err


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = dict(json.loads((folder / "config.json").read_text()))
    except (OSError, ValueError, TypeError) as err:
        raise BaseModelError(f"{folder} has no readable config.json; give a checkpoint") from err
    kind = config.get("model_type")
    if kind not in FAMILIES:
        others = ", ".join(f"{f.title} ('{name}')" for name, f in FAMILIES.items() if name != GPT2)
        raise BaseModelError(
            f"{folder} holds a '{kind}'; this version tunes GPT-2 ('gpt2'), and on padded batches "
            f"{others}"
        )
    family = FAMILIES[kind]
    inner = config.get(family.inner)
    if inner is not None and (not isinstance(inner, int) or inner < 1):
        raise BaseModelError(
            f"{folder}/config.json: {family.inner} = {inner!r}; a whole number or null"
        )
    needed = [family.layers, family.width, family.positions, "vocab_size"]
    needed += [] if kind == GPT2 else [family.heads, family.inner]
    for key in needed:
        if not isinstance(config.get(key), int) or config[key] < 1:
            raise BaseModelError(
                f"{folder}/config.json: {key} = {config.get(key)!r}; a whole number"
            )
    return config


def _shape(config: dict[str, Any], folder: Path) -> BaseShape:
    kind = config["model_type"]
    family, width = FAMILIES[kind], int(config[FAMILIES[kind].width])
    keys = None
    if kind != GPT2:
        heads = int(config[family.heads])
        size = config.get("head_dim") or width // heads
        if size * heads != width:
            raise BaseModelError(
                f"{folder}/config.json: {heads} heads of {size} make {size * heads}, and the width "
                f"is {width}; this version tunes models where the two are the same"
            )
        keys = int(config.get("num_key_value_heads") or heads) * int(size)
    return BaseShape(
        layers=int(config[family.layers]),
        width=width,
        inner=int(config.get(family.inner) or 4 * width),
        family=kind,
        keys=keys,
        vocabulary=int(config["vocab_size"]),
        positions=int(config[family.positions]),
    )


def _is_tied(config: dict[str, Any]) -> bool:
    """Return whether the head is the embedding: always so where the packed step is."""
    return config["model_type"] == GPT2 or bool(config.get("tie_word_embeddings", False))


def require_gpt2(identity: BaseIdentity, what: str) -> None:
    """Refuse what only a GPT-2 has.

    Args:
        identity: Of the base.
        what: That needs it, as the beginning of a sentence.

    Raises:
        BaseModelError: If the base is of another family.
    """
    if identity.shape.family != GPT2:
        raise BaseModelError(
            f"{what} needs a GPT-2, and {identity.name} is a "
            f"{FAMILIES[identity.shape.family].title}, which is tuned by instructions in fp32 and "
            "generates, and no more"
        )


def count_parameters(weights: Path, *, tied: bool = False) -> int:
    """Return the number of weights in a safetensors file, from its header; no masks.

    Args:
        weights: The file.
        tied: Whether a head is the embedding, and is not counted.

    Raises:
        BaseModelError: If it is missing or damaged.
    """
    try:
        with weights.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(length, _MOST_HEADER_BYTES)))
        return sum(
            math.prod(entry["shape"])
            for name, entry in header.items()
            if name != "__metadata__"
            and not (tied and name.startswith(_TIED))
            and not name.endswith(_MASKS)
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as err:
        raise BaseModelError(f"{weights} is missing or damaged; give another checkpoint") from err


def _check_fits(tokenizer: Path, vocabulary: int, folder: Path) -> None:
    try:
        words = json.loads((tokenizer / _TOKENIZER).read_text())["model"]["vocab"]
    except (OSError, ValueError, KeyError, TypeError) as err:
        raise BaseModelError(f"{tokenizer} has no readable tokenizer.json") from err
    if len(words) > vocabulary:
        raise BaseModelError(
            f"{folder} has no tokenizer.json and only {vocabulary} embedding rows; "
            f"the kit's tokenizer needs {len(words)}; put the checkpoint's own tokenizer there"
        )
