"""A base with its small modules on, of whichever kind trains it."""

from __future__ import annotations

import logging
from typing import Any

from device_profiles.families import FAMILIES, GPT2
from edge_client.peft.packed_model import PackedModel
from edge_client.peft.tuned_model import TunedModel
from quantization.base_model import load_base
from quantization.frozen_gpt2 import FrozenBase, load_frozen
from quantization.identity import BaseIdentity, require_gpt2

log = logging.getLogger(__name__)

#: A model that one client at a time is lent.
Tunable = PackedModel | TunedModel


def build_model(
    identity: BaseIdentity, precision: str, base: FrozenBase | None = None, **modules: Any
) -> Tunable:
    """Return a model: packed for a GPT-2; plain, padded and in fp32 for another family.

    Args:
        identity: Of the base.
        precision: That it is held in.
        base: A GPT-2 in that precision, if it is loaded already.
        modules: What is on it: ``adapter_size``, ``placement``, ``lora_count``, ``lora_rank``.

    Raises:
        InputError: If base, precision and modules do not fit each other.
        BaseModelError: If the base is not usable.
    """
    if identity.shape.family == GPT2:
        return PackedModel(base or load_frozen(identity, precision), **modules)
    if precision != "fp32":
        require_gpt2(identity, f"precision '{precision}'")
    log.warning(
        "%s is a %s: it trains on padded batches by transformers and peft, in fp32, slower and in "
        "more memory than a GPT-2 of its size",
        identity.name,
        FAMILIES[identity.shape.family].title,
    )
    return TunedModel(load_base(identity), **modules)
