"""A personal model in one piece: LoRA in the base's weights, adapters as modules.

Shape letters: D model width, R rank.
"""

from __future__ import annotations

from typing import Any

import torch

from device_profiles.modules import ADAPTER_SITES
from edge_client.export.personal import Personal
from edge_client.peft.tuned_model import TunedModel
from messaging.layout import Tensors
from quantization.base_model import Base

#: What the product of a module's factors counts: peft's alpha / rank as it is trained.
LORA_SCALE = 2.0

_A, _B = ".lora_A.weight", ".lora_B.weight"
_THIRDS = {"query": 0, "key": 1, "value": 2}
_ADAPTERS = {"attention": "attn.adapter", "mlp": "mlp.adapter", "block": "adapter"}


def plain_model(personal: Personal, base: Base) -> Any:
    """Return the model of a family that is trained by peft: its modules on it, nothing merged.

    Args:
        personal: The parts.
        base: The client's, in fp32; it is changed.
    """
    tuned = TunedModel(
        base,
        adapter_size=personal.adapter_size,
        placement=personal.placement,
        lora_count=personal.lora_count,
        lora_rank=personal.lora_rank,
    )
    tuned.put(personal.tensors)
    base.model.config.use_cache = True
    return tuned.model


def merged_model(personal: Personal, base: Base) -> Any:
    """Return the model as transformers knows it: plain, or with adapters where there are any.

    Args:
        personal: The parts.
        base: The client's, in fp32; it is changed.

    Returns:
        A ``GPT2LMHeadModel`` or ``PwffGPT2LMHeadModel`` with its generation configuration.
    """
    from transformers import GenerationConfig

    merge_lora(base.model, personal.tensors)
    ends = {"bos_token_id": base.end_token, "eos_token_id": base.end_token}
    base.model.config.update({**ends, "use_cache": True})
    base.model.config.dtype = torch.float32
    model = _with_adapters(base.model, personal) if personal.adapter_size else base.model
    model.generation_config = GenerationConfig(**ends, pad_token_id=base.end_token)
    return model.eval()


def merge_lora(model: Any, tensors: Tensors) -> None:
    """Add ``LORA_SCALE * B A`` to the weight of every projection that has a LoRA module (in place).

    GPT-2 keeps weights as (inputs, outputs), and query, key and value in one of shape (D, 3 D).
    """
    for name, a in tensors.items():
        if not name.endswith(_A):
            continue
        path = name.removesuffix(_A)
        b = tensors[path + _B]
        added = LORA_SCALE * torch.from_numpy(b).double() @ torch.from_numpy(a).double()
        parent, _, part = path.rpartition(".")
        if part in _THIRDS:
            weight = model.get_submodule(parent).weight.data
            width = weight.shape[0]
            weight = weight[:, _THIRDS[part] * width : (_THIRDS[part] + 1) * width]
        else:
            weight = model.get_submodule(path).weight.data
        weight.copy_(weight.double() + added.T)


def _with_adapters(plain: Any, personal: Personal) -> Any:
    from quantization.hf.modeling_pwff import PwffGPT2Config, PwffGPT2LMHeadModel

    shape = plain.config.to_dict()
    for key in ("model_type", "architectures", "transformers_version"):
        shape.pop(key, None)
    config = PwffGPT2Config(**shape, adapter_size=personal.adapter_size)
    model = PwffGPT2LMHeadModel(config)
    state = dict(plain.state_dict())
    for block in range(personal.identity.shape.layers):
        for site in ADAPTER_SITES:
            for part in ("down.weight", "down.bias", "up.weight", "up.bias"):
                values = personal.tensors[f"adapters.{block}.{site}.{part}"]
                state[f"transformer.h.{block}.{_ADAPTERS[site]}.{part}"] = torch.from_numpy(values)
    model.load_state_dict(state)
    return model
