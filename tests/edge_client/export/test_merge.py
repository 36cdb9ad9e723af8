"""The merged model computes what the trained one computes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edge_client.export.merge import merge_lora, merged_model
from edge_client.export.personal import find_in_run
from edge_client.peft.tuned_model import TunedModel
from quantization.base_model import load_base
from quantization.identity import BaseIdentity
from tests.edge_client.export.conftest import CLIENT, MakeRun

TOKENS = torch.tensor([[0, 17, 3, 88, 41, 2, 60, 200, 7]])


@pytest.mark.parametrize("placement", ["qkv", "wide"])
@pytest.mark.parametrize("method", ["pwff", "fedlora", "fedada"])
def test_it_is_the_model_of_adapters_and_lora_modules_apart(
    make_run: MakeRun, identity: BaseIdentity, method: str, placement: str
) -> None:
    personal = find_in_run(make_run(method, placement), CLIENT)
    apart = TunedModel(
        load_base(identity),
        adapter_size=personal.adapter_size,
        placement=placement,
        lora_count=personal.lora_count,
        lora_rank=personal.lora_rank,
    )
    apart.put(personal.tensors)
    with torch.inference_mode():
        expected = apart.logits_at(TOKENS, torch.ones_like(TOKENS, dtype=torch.bool))
        bare = load_base(identity).model(TOKENS).logits[0]
        found = merged_model(personal, load_base(identity))(TOKENS).logits[0]
    assert (expected - bare).abs().max() > 0.02  # the modules matter
    # twelve blocks in fp32 on logits of about 1: a rounding is 1e-7
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_only_the_named_third_of_the_joint_projection_changes(identity: BaseIdentity) -> None:
    base = load_base(identity).model
    weight = base.transformer.h[3].attn.c_attn.weight
    before = weight.detach().clone()
    place = "transformer.h.3.attn.c_attn.key"
    a = np.zeros((1, 16), np.float32)
    b = np.zeros((16, 1), np.float32)
    a[0, 2], b[5, 0] = 3.0, 0.5
    merge_lora(base, {f"{place}.lora_A.weight": a, f"{place}.lora_B.weight": b})
    change = (weight - before).detach()
    # input 2 reaches output 5 of the key, column 16 + 5, by 2 * 0.5 * 3
    assert change.nonzero().tolist() == [[2, 21]]
    assert change[2, 21].item() == pytest.approx(3.0, abs=1e-6)


def test_the_end_token_of_training_ends_what_it_generates(
    make_run: MakeRun, identity: BaseIdentity
) -> None:
    base = load_base(identity)
    base.model.generation_config.eos_token_id = 77  # as of a base with other habits
    model = merged_model(find_in_run(make_run(), CLIENT), base)
    ends = (model.config.eos_token_id, model.generation_config.eos_token_id)
    assert ends == (base.tokenizer.eos_token_id,) * 2
