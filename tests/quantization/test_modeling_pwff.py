"""The modelling file that goes with an exported folder."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import torch

from quantization.hf import modeling_pwff
from quantization.hf.modeling_pwff import PwffGPT2Config, PwffGPT2LMHeadModel

SHAPE = {
    "n_layer": 2, "n_embd": 16, "n_head": 2, "n_positions": 64, "vocab_size": 90,
    "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
TOKENS = torch.tensor([[5, 17, 3, 88, 41, 2, 60]])


@pytest.fixture
def model() -> Any:
    """Return a model none of whose weights is zero."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(3)
        made = PwffGPT2LMHeadModel(PwffGPT2Config(**SHAPE, adapter_size=4)).eval()
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return made


def test_adapters_that_add_nothing_leave_a_plain_gpt2(model: Any) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    plain = GPT2LMHeadModel(GPT2Config(**SHAPE)).eval()
    own = model.state_dict()
    plain.load_state_dict({n: own[n] for n in plain.state_dict()})
    with torch.inference_mode():
        expected = plain(TOKENS).logits
        assert not torch.allclose(model(TOKENS).logits, expected, atol=0.1)
        for name, parameter in model.named_parameters():
            if ".up." in name:
                parameter.zero_()
        torch.testing.assert_close(model(TOKENS).logits, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("adapter", "bias"),
    [
        ("attn.adapter", "attn.c_proj.bias"),
        ("mlp.adapter", "mlp.c_proj.bias"),
        ("adapter", "mlp.c_proj.bias"),  # what the block gives out is the sum that ends with it
    ],
)
def test_an_adapter_sits_after_its_site(model: Any, adapter: str, bias: str) -> None:
    """An adapter that adds a constant is a bias of the layer before it."""
    constant = torch.linspace(-1, 1, 16)
    with torch.inference_mode():
        for name, parameter in model.named_parameters():
            if ".up." in name:
                parameter.zero_()
        model.get_parameter(f"transformer.h.0.{adapter}.up.bias").copy_(constant)
        found = model(TOKENS).logits
        model.get_parameter(f"transformer.h.0.{adapter}.up.bias").zero_()
        unchanged = model(TOKENS).logits
        model.get_parameter(f"transformer.h.0.{bias}").add_(constant)
        expected = model(TOKENS).logits
    assert (expected - unchanged).abs().max() > 0.01
    # the sums are rounded in another order; logits are of order 1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_it_holds_three_adapters_a_block(model: Any) -> None:
    # an adapter: 2*16*4 + 16 + 4 = 148
    adapters = [p.numel() for n, p in model.named_parameters() if "adapter" in n]
    assert sum(adapters) == 2 * 3 * 148


def test_what_it_generates_does_not_depend_on_the_cache(model: Any) -> None:
    asked: dict[str, Any] = {
        "attention_mask": torch.ones_like(TOKENS),
        "max_new_tokens": 20,
        "min_new_tokens": 20,
        "do_sample": False,
        "pad_token_id": 0,
    }
    cached = model.generate(TOKENS, **asked, use_cache=True)
    assert cached.shape == (1, 27)
    assert torch.equal(cached, model.generate(TOKENS, **asked, use_cache=False))


def test_it_gives_the_hidden_states_that_it_is_asked_for(model: Any) -> None:
    with torch.inference_mode():
        read = model(TOKENS, output_hidden_states=True)
        last = model.lm_head(read.hidden_states[-1])
    assert len(read.hidden_states) == 1 + 2
    torch.testing.assert_close(last, read.logits, rtol=0, atol=0)


def test_the_file_stands_alone() -> None:
    # it is copied into folders that are read where the project is not installed
    tree = ast.parse(Path(modeling_pwff.__file__).read_text())
    roots = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            roots.add((node.module or "").split(".")[0])
    assert roots == {"__future__", "typing", "torch", "transformers"}
