"""A GPT-2's checkpoint on disk: what it computes, and whether its tensors are all there.

Tensors are called as in ``h.0.ln_1.weight``, whether the file says ``transformer.`` before or not.
Who only looks through one, as the process does that starts the workers of a fleet, loads no torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from device_profiles.modules import base_tensors
from quantization.errors import BaseModelError
from quantization.identity import BaseIdentity, require_gpt2

if TYPE_CHECKING:
    from torch import Tensor

#: ``approximate`` of ``torch.nn.functional.gelu`` for each activation that is computed here.
GELU: dict[str, Literal["tanh", "none"]] = {
    "gelu_new": "tanh",
    "gelu_pytorch_tanh": "tanh",
    "gelu": "none",
}
_FIXED = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
}
_FLOATS = ("F32", "F16", "BF16")
_PREFIX = "transformer."
_EMBEDDING, _HEAD = "wte.weight", "lm_head.weight"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint that was looked through and holds together.

    Attributes:
        prefix: What the file puts before the names here.
        heads: Attention heads; divides the width.
        epsilon: Of every layer norm, > 0.
    """

    identity: BaseIdentity
    prefix: str
    heads: int
    epsilon: float
    gelu: Literal["tanh", "none"]

    @contextmanager
    def opened(self) -> Iterator[Callable[[str], Tensor]]:
        """Map the file once, and give what reads tensors from the map; it stays while one does."""
        with _open(self.identity) as file:
            yield lambda name: file.get_tensor(self.prefix + name)

    def read(self, name: str) -> Tensor:
        """Map the file for one tensor; its pages leave memory with the tensor."""
        with self.opened() as read:
            return read(name)


def look_through(identity: BaseIdentity) -> Checkpoint:
    """Check a checkpoint's configuration, and name, shape and type of its tensors.

    Raises:
        BaseModelError: If something is missing, does not fit or is damaged, or it is a GPT-2 that
            this version does not compute.
    """
    require_gpt2(identity, "a packed step on frozen weights")
    path = identity.folder / "config.json"
    config: dict[str, Any] = json.loads(path.read_text())
    heads, epsilon, gelu = _read_config(path, config, identity.shape.width)
    with _open(identity, "np") as file:  # names and shapes need no torch
        names = set(file.keys())
        prefix = _PREFIX if any(name.startswith(_PREFIX) for name in names) else ""
        _check_tensors(identity, file, names, prefix)
        _check_head(identity, config, names, prefix)
    return Checkpoint(identity=identity, prefix=prefix, heads=heads, epsilon=epsilon, gelu=gelu)


def _open(identity: BaseIdentity, framework: str = "pt") -> Any:
    from safetensors import SafetensorError, safe_open

    path = identity.folder / "model.safetensors"
    try:
        return safe_open(path, framework=framework)
    except (OSError, SafetensorError) as err:
        words = f"{str(err).strip()}\n".splitlines()[0][:200]
        raise BaseModelError(f"{path} cannot be read: {words}; give another checkpoint") from err


def _read_config(
    path: Path, config: dict[str, Any], width: int
) -> tuple[int, float, Literal["tanh", "none"]]:
    for key, wanted in _FIXED.items():
        if config.get(key, wanted) != wanted:
            raise BaseModelError(
                f"{path}: {key} = {json.dumps(config[key])}; this version computes "
                f"{json.dumps(wanted)} only, give another checkpoint"
            )
    heads = config.get("n_head", 12)
    if type(heads) is not int or heads < 1 or width % heads:
        raise BaseModelError(
            f"{path}: n_head = {heads!r}; a whole number that divides n_embd = {width}"
        )
    activation = config.get("activation_function", "gelu_new")
    if activation not in GELU:
        raise BaseModelError(
            f"{path}: activation_function = {activation!r}; this version computes "
            f"{', '.join(GELU)} only, give another checkpoint"
        )
    epsilon = config.get("layer_norm_epsilon", 1e-5)
    if type(epsilon) not in {int, float} or not 0 < epsilon < math.inf:
        raise BaseModelError(f"{path}: layer_norm_epsilon = {epsilon!r}; a number above 0")
    return heads, float(epsilon), GELU[activation]


def _check_tensors(identity: BaseIdentity, file: Any, names: set[str], prefix: str) -> None:
    shapes = {t.name: list(t.shape) for t in base_tensors(identity.shape)}
    missing = [prefix + name for name in shapes if prefix + name not in names]
    if missing:
        raise BaseModelError(
            f"{identity.folder} lacks {len(missing)} tensors of a GPT-2, '{missing[0]}' among "
            "them; give a whole checkpoint"
        )
    for name, shape in shapes.items():
        held = file.get_slice(prefix + name)
        if held.get_shape() != shape:
            raise BaseModelError(
                f"{identity.folder}: '{prefix}{name}' has shape {held.get_shape()} where its "
                f"config.json says {shape}; give the two of one checkpoint"
            )
        if held.get_dtype() not in _FLOATS:
            raise BaseModelError(
                f"{identity.folder}: '{prefix}{name}' is of type {held.get_dtype()}; this version "
                f"reads {', '.join(_FLOATS)}"
            )
    layers = identity.shape.layers
    if any(name.startswith(f"{prefix}h.{layers}.") for name in names):
        raise BaseModelError(
            f"{identity.folder} has more blocks than n_layer = {layers} of its config.json; "
            "give the two of one checkpoint"
        )


def _check_head(
    identity: BaseIdentity, config: dict[str, Any], names: set[str], prefix: str
) -> None:
    """The head must be the embedding, since one matrix is held for both."""
    tied = config.get("tie_word_embeddings", True)
    if _HEAD in names:
        with _open(identity) as file:
            head, embedding = file.get_tensor(_HEAD), file.get_tensor(prefix + _EMBEDDING)
        tied = head.shape == embedding.shape and bool(head.equal(embedding))
    if not tied:
        raise BaseModelError(
            f"{identity.folder} has a head of its own ('{_HEAD}' is not '{prefix}{_EMBEDDING}'); "
            "this version computes a GPT-2 whose head is its embedding, give another checkpoint"
        )
