"""Adapters and LoRA on a GPT-2, held against a GPT-2 written out in plain torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import gelu, layer_norm, linear

from device_profiles.errors import InputError
from device_profiles.modules import (
    BaseShape,
    adapter_tensors,
    initial_adapters,
    initial_lora,
    lora_sites,
    lora_tensors,
)
from edge_client.peft.tuned_model import TunedModel
from messaging.layout import Tensors
from quantization.base_model import Base, load_base, split_attention
from quantization.identity import BaseIdentity, identify
from tests.conftest import HEADS, LAYERS, VOCABULARY, WIDTH, write_checkpoint
from tests.edge_client.conftest import ADAPTER_SIZE, RANK, random_tensors

Make = Callable[..., TunedModel]

TOKENS = torch.arange(33).reshape(3, 11) * 13 % VOCABULARY


def logits_of(model: TunedModel, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    """Return the logits of every place, row by row."""
    with torch.no_grad():
        return model.logits_at(tokens, torch.ones(tokens.shape, dtype=torch.bool))


def plain_logits(base: Base, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    """Return what transformers computes on a bare base."""
    with torch.no_grad():
        return base.model(tokens).logits.reshape(-1, VOCABULARY)


# -- an untouched model ----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (3, 11)])
@pytest.mark.parametrize("start", ["as made", "as a run begins"])
def test_untouched_modules_change_no_bit_of_what_the_split_base_computes(
    tuned: Make, base: Base, identity: BaseIdentity, shape: tuple[int, int], start: str
) -> None:
    model = tuned(36)
    if start == "as a run begins":
        model.put(initial_adapters(identity.shape, ADAPTER_SIZE, seed=3))
        model.put(initial_lora(lora_sites(identity.shape, "qkv"), RANK, seed=3))
    split_attention(base.model)
    tokens = TOKENS[: shape[0], : shape[1]]
    assert torch.equal(logits_of(model, tokens), plain_logits(base, tokens))


def test_wide_placement_leaves_the_joint_projection_and_begins_as_the_plain_base(
    tuned: Make, base: Base
) -> None:
    assert torch.equal(logits_of(tuned(36, "wide")), plain_logits(base))


def test_without_modules_the_model_is_the_plain_base(tuned: Make, base: Base) -> None:
    model = tuned(0, size=0)
    assert model.trainable() == {}
    assert torch.equal(logits_of(model), plain_logits(base))


# -- where the modules act -------------------------------------------------------------------------


class _WrittenOut:
    """GPT-2 with adapters and LoRA, written out from its definition; nothing of transformers' runs.

    Adapters sit after attention output and MLP output, each before its residual sum, and after the
    block. LoRA changes a projection W (in -> out) to W + (alpha / r) (B A)^T with alpha = 2 r.
    """

    def __init__(self, base: Base, tensors: Tensors) -> None:
        self.base = {n: p.detach() for n, p in base.model.state_dict().items()}
        self.own = {n: torch.from_numpy(t) for n, t in tensors.items()}

    def adapter(self, block: int, site: str, x: torch.Tensor) -> torch.Tensor:
        name = f"adapters.{block}.{site}"
        if f"{name}.up.bias" not in self.own:
            return x
        narrow = gelu(linear(x, self.own[f"{name}.down.weight"], self.own[f"{name}.down.bias"]))
        return x + linear(narrow, self.own[f"{name}.up.weight"], self.own[f"{name}.up.bias"])

    def lora(self, path: str) -> torch.Tensor | float:
        if f"{path}.lora_A.weight" not in self.own:
            return 0.0
        return 2.0 * (self.own[f"{path}.lora_B.weight"] @ self.own[f"{path}.lora_A.weight"]).T

    def project(self, path: str, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.base[f"{path}.weight"] + self.lora(path)) + self.base[f"{path}.bias"]

    def query_key_value(self, path: str, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        weights = (self.base[f"{path}.weight"] + self.lora(path)).split(WIDTH, dim=1)
        biases = self.base[f"{path}.bias"].split(WIDTH)
        return tuple(
            x @ (weight + self.lora(f"{path}.{part}")) + bias
            for part, weight, bias in zip(("query", "key", "value"), weights, biases, strict=True)
        )

    def norm(self, path: str, x: torch.Tensor) -> torch.Tensor:
        return layer_norm(x, (WIDTH,), self.base[f"{path}.weight"], self.base[f"{path}.bias"], 1e-5)

    def attention(self, path: str, x: torch.Tensor) -> torch.Tensor:
        rows, length, _ = x.shape
        query, key, value = (
            part.reshape(rows, length, HEADS, WIDTH // HEADS).transpose(1, 2)
            for part in self.query_key_value(f"{path}.c_attn", x)
        )  # (B, H, T, D/H)
        scores = query @ key.transpose(2, 3) / math.sqrt(WIDTH // HEADS)
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        mixed = scores.masked_fill(future, -math.inf).softmax(-1) @ value
        return self.project(f"{path}.c_proj", mixed.transpose(1, 2).reshape(x.shape))

    def block(self, i: int, x: torch.Tensor) -> torch.Tensor:
        path = f"transformer.h.{i}"
        attended = self.attention(f"{path}.attn", self.norm(f"{path}.ln_1", x))
        x = x + self.adapter(i, "attention", attended)
        inner = gelu(
            self.project(f"{path}.mlp.c_fc", self.norm(f"{path}.ln_2", x)), approximate="tanh"
        )
        x = x + self.adapter(i, "mlp", self.project(f"{path}.mlp.c_proj", inner))
        return self.adapter(i, "block", x)

    def logits(self, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
        embedding = self.base["transformer.wte.weight"]
        x = embedding[tokens] + self.base["transformer.wpe.weight"][: tokens.shape[1]]
        for i in range(LAYERS):
            x = self.block(i, x)
        return (self.norm("transformer.ln_f", x) @ embedding.T).reshape(-1, VOCABULARY)


def assert_same_logits(one: torch.Tensor, other: torch.Tensor) -> None:
    """Compare to fp32 rounding over 12 blocks; logits here are of size 1 to 10."""
    torch.testing.assert_close(one, other, rtol=0, atol=2e-5 * float(other.abs().max()))


@pytest.mark.parametrize("count", [12, 25, 36])
@pytest.mark.parametrize("placement", ["qkv", "wide"])
def test_the_model_computes_what_a_gpt2_with_these_modules_is_defined_to(
    tuned: Make, base: Base, identity: BaseIdentity, placement: str, count: int
) -> None:
    model = tuned(count, placement)
    tensors = random_tensors(identity, count, placement)
    model.put(tensors)
    written_out = _WrittenOut(base, tensors).logits()
    assert_same_logits(logits_of(model), written_out)
    assert not torch.allclose(written_out, plain_logits(base), atol=0.1)


@pytest.mark.parametrize("site", ["attention", "mlp", "block"])
def test_each_adapter_acts_at_its_own_place(
    tuned: Make, base: Base, identity: BaseIdentity, site: str
) -> None:
    model = tuned(0)
    untouched = logits_of(model)
    begin = initial_adapters(identity.shape, ADAPTER_SIZE, seed=0)
    seen = []
    for block in range(LAYERS):
        name = f"adapters.{block}.{site}.up.bias"
        # slanted, because a constant shift is what a layer norm takes away
        moved = {**begin, name: np.linspace(-1, 1, WIDTH, dtype=np.float32)}
        model.put(moved)
        logits = logits_of(model)
        assert_same_logits(logits, _WrittenOut(base, moved).logits())
        assert not torch.allclose(logits, untouched, atol=1e-3)
        assert not any(torch.allclose(logits, other, atol=1e-3) for other in seen)
        seen.append(logits)
    model.put(begin)
    assert torch.equal(logits_of(model), untouched)


@pytest.mark.parametrize("placement", ["qkv", "wide"])
def test_each_lora_module_acts_on_its_own_projection(
    tuned: Make, base: Base, identity: BaseIdentity, placement: str
) -> None:
    model = tuned(36, placement, size=0)
    all_tensors = random_tensors(identity, 36, placement)
    begin = {
        n: np.zeros_like(t) if ".lora_B." in n else t
        for n, t in all_tensors.items()
        if n in model.trainable()
    }
    untouched = logits_of(model)
    for site in lora_sites(identity.shape, placement):
        name = f"{site.path}.lora_B.weight"
        moved = {**begin, name: all_tensors[name]}
        model.put(moved)
        logits = logits_of(model)
        assert_same_logits(logits, _WrittenOut(base, moved).logits())
        assert not torch.allclose(logits, untouched, atol=1e-4), site


# -- how many modules ------------------------------------------------------------------------------


def lora_paths(model: TunedModel) -> list[str]:
    """Return where the active LoRA modules sit, in order."""
    names = [n for n in model.trainable() if n.endswith(".lora_A.weight")]
    return [n.removesuffix(".lora_A.weight") for n in names]


def places(part: str, blocks: range) -> list[str]:
    """Return one projection's paths in some blocks."""
    return [f"transformer.h.{i}.attn.c_attn.{part}" for i in blocks]


TOP_DOWN = range(LAYERS - 1, -1, -1)


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (12, places("query", TOP_DOWN)),
        (13, [*places("query", TOP_DOWN), *places("value", range(11, 10, -1))]),
        (24, [*places("query", TOP_DOWN), *places("value", TOP_DOWN)]),
        (
            36,
            [*places("query", TOP_DOWN), *places("value", TOP_DOWN), *places("key", TOP_DOWN)],
        ),
    ],
)
def test_lora_fills_queries_then_values_then_keys_from_the_top_block(
    tuned: Make, count: int, expected: list[str]
) -> None:
    assert lora_paths(tuned(count)) == expected


@pytest.mark.parametrize("placement", ["qkv", "wide"])
def test_every_count_from_12_to_36_trains_the_parameters_that_arithmetic_says(
    tuned: Make, identity: BaseIdentity, placement: str
) -> None:
    model = tuned(36, placement)
    sites = lora_sites(identity.shape, placement)
    adapters = 36 * (2 * WIDTH * ADAPTER_SIZE + WIDTH + ADAPTER_SIZE)
    planned = adapter_tensors(identity.shape, ADAPTER_SIZE)
    for count in range(12, 37):
        model.activate(count)
        trainable = model.trainable()
        lora = sum(RANK * (s.inputs + s.outputs) for s in sites[:count])
        assert sum(p.numel() for p in trainable.values()) == adapters + lora
        expected = {t.name: t.shape for t in [*planned, *lora_tensors(sites[:count], RANK)]}
        assert {n: tuple(p.shape) for n, p in trainable.items()} == expected
        flagged = {id(p) for p in model.model.parameters() if p.requires_grad}
        assert flagged == {id(p) for p in trainable.values()}


def test_a_square_base_has_as_many_parameters_in_each_of_its_36_lora_modules(tuned: Make) -> None:
    model = tuned(36, size=0)
    assert sum(p.numel() for p in model.trainable().values()) == 36 * RANK * (WIDTH + WIDTH)


def test_clients_with_12_and_36_modules_take_turns_on_one_model(
    tuned: Make, identity: BaseIdentity
) -> None:
    shared = tuned(36)
    few = random_tensors(identity, 12, seed=1)
    many = random_tensors(identity, 36, seed=2)
    alone: dict[int, torch.Tensor] = {}
    for count, tensors in ((12, few), (36, many)):
        model = tuned(count)
        model.put(tensors)
        alone[count] = logits_of(model)
    assert not torch.allclose(alone[12], alone[36], atol=1e-2)
    for count, tensors in ((12, few), (36, many), (12, few), (36, many)):
        shared.activate(count)
        shared.put(tensors)
        assert torch.equal(logits_of(shared), alone[count])


def test_taken_tensors_are_copies_of_what_was_put(tuned: Make, identity: BaseIdentity) -> None:
    model = tuned(36)
    model.activate(13)
    tensors = random_tensors(identity, 13)
    model.put(tensors)
    taken = model.take()
    assert list(taken) == list(model.trainable())
    assert all(np.array_equal(taken[name], tensors[name]) for name in tensors)
    model.put({n: np.zeros_like(t) for n, t in tensors.items()})
    assert all(np.array_equal(taken[name], tensors[name]) for name in tensors)


def test_a_base_of_three_blocks_has_nine_sites_of_each_kind(tmp_path: Path) -> None:
    identity = identify(str(write_checkpoint(tmp_path, layers=3)))
    model = TunedModel(
        load_base(identity), adapter_size=ADAPTER_SIZE, placement="qkv", lora_count=9, lora_rank=1
    )
    down = [n for n in model.trainable() if n.endswith(".down.weight")]
    assert down == [
        f"adapters.{i}.{site}.down.weight"
        for i in range(3)
        for site in ("attention", "mlp", "block")
    ]
    top_down = range(2, -1, -1)
    assert lora_paths(model) == [
        path for part in ("query", "value", "key") for path in places(part, top_down)
    ]
    with pytest.raises(InputError, match=r"LoRA count 10 on a base of 3 blocks.* has 9 sites"):
        TunedModel(load_base(identity), adapter_size=0, placement="qkv", lora_count=10, lora_rank=1)


def test_gpt2_small_gets_580968_adapter_and_5308416_lora_parameters() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.device("meta"):
        bare = GPT2LMHeadModel(GPT2Config()).requires_grad_(False)
        assert sum(p.numel() for p in bare.parameters()) == 124_439_808
        identity = BaseIdentity(
            name="gpt2",
            folder=Path(),
            tokenizer_folder=Path(),
            sha256="",
            tokenizer_sha256="",
            parameters=124_439_808,
            positions=1024,
            vocabulary=50_257,
            shape=BaseShape(layers=12, width=768, inner=3072),
        )
        model = TunedModel(
            Base(identity=identity, model=bare, tokenizer=None),
            adapter_size=10,
            placement="qkv",
            lora_count=36,
            lora_rank=96,
        )
    sizes = {n: p.numel() for n, p in model.trainable().items()}
    assert sum(s for n, s in sizes.items() if n.startswith("adapters.")) == 580_968
    assert sum(s for n, s in sizes.items() if ".lora_" in n) == 5_308_416
    assert {s for n, s in sizes.items() if ".lora_" in n} == {96 * 768}


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"adapter_size": -1}, "adapter size -1; choose 1 to 16"),
        ({"adapter_size": 17}, "adapter size 17; choose 1 to 16"),
        ({"lora_count": 37}, "LoRA count 37 on a base of 12 blocks"),
        ({"lora_count": -1}, "LoRA count -1 on a base of 12 blocks"),
        ({"lora_rank": 0}, "LoRA rank 0; choose 1 to 16"),
        ({"lora_rank": 17}, "LoRA rank 17; choose 1 to 16"),
        ({"placement": "qkw"}, "unknown LoRA placement 'qkw'; did you mean 'qkv'"),
    ],
)
def test_modules_that_do_not_fit_are_refused_before_the_base_is_changed(
    base: Base, changes: dict[str, int | str], sentence: str
) -> None:
    before = plain_logits(base)
    names = set(base.model.state_dict())
    wanted = {"adapter_size": 4, "placement": "qkv", "lora_count": 12, "lora_rank": 2, **changes}
    with pytest.raises(InputError, match=sentence):
        TunedModel(base, **wanted)  # type: ignore[arg-type]
    assert set(base.model.state_dict()) == names
    assert torch.equal(plain_logits(base), before)


@pytest.mark.parametrize("count", [-1, 14])
def test_more_modules_than_the_model_was_made_with_are_not_switched_on(
    tuned: Make, count: int
) -> None:
    with pytest.raises(InputError, match=f"LoRA count {count} on a model that was given 13"):
        tuned(13).activate(count)


def test_a_tensor_of_a_module_that_is_off_is_not_put(tuned: Make) -> None:
    model = tuned(36)
    model.activate(12)
    name = "transformer.h.11.attn.c_attn.key.lora_A.weight"
    with pytest.raises(KeyError, match=r"key\.lora_A"):
        model.put({name: np.zeros((RANK, WIDTH), np.float32)})
