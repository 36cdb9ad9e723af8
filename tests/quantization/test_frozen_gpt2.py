"""A frozen GPT-2 from its file: the same numbers, in less memory, or a sentence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from device_profiles.errors import InputError
from edge_client.peft.memory_count import MemoryCount
from quantization.backends import stored
from quantization.checkpoint import Checkpoint
from quantization.errors import BaseModelError
from quantization.frozen_gpt2 import (
    Block,
    FrozenBase,
    FrozenGPT2,
    Norm,
    Projection,
    distance_to_original,
    load_frozen,
)
from quantization.identity import identify
from quantization.precision import PRECISIONS, available, choose
from tests.conftest import HEADS, LAYERS, POSITIONS, VOCABULARY, WIDTH, write_checkpoint

TOKENS = torch.arange(33) * 13 % VOCABULARY
PROJECTIONS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")


@pytest.fixture
def folder(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """Return a copy of the tiny checkpoint, for a test to change."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "base"))


def configured(**changes: object) -> Callable[[Path], None]:
    """Return what changes the configuration."""

    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def rewritten(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    """Return what changes the tensors of the file, in place."""

    def rewrite(folder: Path) -> None:
        path = folder / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file({n: t.contiguous().clone() for n, t in tensors.items()}, path, {"format": "pt"})

    return rewrite


def without_prefix(tensors: dict[str, Tensor]) -> None:
    """Name tensors as the first GPT-2 checkpoints do."""
    for name in list(tensors):
        tensors[name.removeprefix("transformer.")] = tensors.pop(name)


def logits(weights: FrozenGPT2, tokens: Tensor) -> Tensor:
    """Return the logits of every place, written down from the definition. Shape (T,) -> (T, V)."""
    width = weights.positions.shape[1]

    def norm(x: Tensor, held: Norm) -> Tensor:
        centred = x - x.mean(1, keepdim=True)
        spread = (centred.square().mean(1, keepdim=True) + weights.epsilon).sqrt()
        return centred / spread * held.weight + held.bias

    def linear(x: Tensor, held: Projection) -> Tensor:
        return held.matrix.times(x, held.bias)

    x = weights.embedding.rows(tokens) + weights.positions[: len(tokens)]
    ahead = torch.ones(len(tokens), len(tokens)).triu(1).bool()
    for block in weights.blocks:
        query, key, value = linear(norm(x, block.ln_1), block.qkv).split(width, dim=1)
        heads = []
        for columns in torch.arange(width).chunk(weights.heads):
            score = query[:, columns] @ key[:, columns].T / len(columns) ** 0.5
            heads.append(score.masked_fill(ahead, -torch.inf).softmax(1) @ value[:, columns])
        x = x + linear(torch.cat(heads, dim=1), block.attention_out)
        inner = linear(norm(x, block.ln_2), block.mlp_in)
        inner = torch.nn.functional.gelu(inner, approximate=weights.gelu)
        x = x + linear(inner, block.mlp_out)
    return weights.embedding.times(norm(x, weights.ln_f))


def logits_of_transformers(folder: Path, tokens: Tensor) -> Tensor:
    """Return the logits that the library's model gives."""
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        found: Tensor = model.eval()(tokens[None]).logits[0]
    return found


# -- the same numbers ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        configured(),
        configured(activation_function="gelu"),
        configured(activation_function="gelu_pytorch_tanh"),
        configured(layer_norm_epsilon=0.1),
        configured(n_head=4),
        configured(attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5),
    ],
)
def test_the_weights_compute_what_transformers_does(
    folder: Path, change: Callable[[Path], None]
) -> None:
    change(folder)
    base = load_frozen(identify(str(folder)))
    expected = logits_of_transformers(folder, TOKENS)
    # fp32 sums in another order through 12 blocks; 1e-5 is some hundred units in the last place
    largest = float(expected.abs().max())
    torch.testing.assert_close(logits(base.weights, TOKENS), expected, rtol=0, atol=1e-5 * largest)


def test_an_inner_width_of_its_own_is_read(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, layers=2, inner=24)
    base = load_frozen(identify(str(tmp_path)))
    assert base.weights.blocks[1].mlp_in.matrix.dense().shape == (24, WIDTH)
    expected = logits_of_transformers(tmp_path, TOKENS)
    largest = float(expected.abs().max())
    torch.testing.assert_close(logits(base.weights, TOKENS), expected, rtol=0, atol=1e-5 * largest)


def test_a_base_is_what_its_file_and_tokenizer_say(tiny_checkpoint: Path) -> None:
    identity = identify(str(tiny_checkpoint))
    base = load_frozen(identity)
    weights = base.weights
    assert base.identity == identity
    assert (base.precision, base.backend) == ("fp32", "torch")
    assert base.end_token == 0
    assert len(weights.blocks) == LAYERS
    assert weights.heads == HEADS
    assert weights.positions.shape == (POSITIONS, WIDTH)
    assert weights.embedding.dense().shape == (VOCABULARY, WIDTH)
    assert weights.nbytes == identity.base_bytes
    held = load_file(tiny_checkpoint / "model.safetensors")
    block = weights.blocks[3]
    assert torch.equal(block.qkv.matrix.dense(), held["transformer.h.3.attn.c_attn.weight"].T)
    assert torch.equal(block.mlp_out.bias, held["transformer.h.3.mlp.c_proj.bias"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_a_file_in_half_precision_is_read(folder: Path, dtype: torch.dtype, precision: str) -> None:
    rewritten(lambda tensors: tensors.update({n: t.to(dtype) for n, t in tensors.items()}))(folder)
    halves = load_file(folder / "model.safetensors")
    weights = load_frozen(identify(str(folder)), precision).weights
    assert torch.equal(weights.ln_f.weight, halves["transformer.ln_f.weight"].float())
    assert weights.positions.dtype == torch.float32
    for matrix, name in (
        (weights.embedding, "transformer.wte.weight"),
        (weights.blocks[5].mlp_in.matrix, "transformer.h.5.mlp.c_fc.weight"),
    ):
        tensor = halves[name].float()
        weight = tensor if name.endswith("wte.weight") else tensor.T
        assert torch.equal(matrix.dense(), choose(precision).hold(weight, "cpu").dense())


def with_masks(tensors: dict[str, Tensor]) -> None:
    """Add the constants that old checkpoints have."""
    for i in range(LAYERS):
        tensors[f"transformer.h.{i}.attn.bias"] = torch.ones(1, 1, POSITIONS, POSITIONS).tril()
        tensors[f"transformer.h.{i}.attn.masked_bias"] = torch.tensor(-1e4)


def with_a_tied_head(tensors: dict[str, Tensor]) -> None:
    """Write the embedding a second time, as its head."""
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()


@pytest.mark.parametrize("change", [without_prefix, with_masks, with_a_tied_head])
def test_other_ways_of_writing_the_same_file_give_the_same_base(
    folder: Path, change: Callable[[dict[str, Tensor]], Any]
) -> None:
    expected = logits(load_frozen(identify(str(folder))).weights, TOKENS)
    rewritten(change)(folder)
    base = load_frozen(identify(str(folder)))
    assert torch.equal(logits(base.weights, TOKENS), expected)
    assert distance_to_original(base)["overall"] == 0


# -- at a precision --------------------------------------------------------------------------------


def at(precision: str, identity: Any) -> FrozenBase:
    """Load a base at a precision, or skip where this processor has no kernel for it."""
    processors = PRECISIONS[precision].backends[-1].processors
    if processors and torch.backends.cpu.get_cpu_capability() not in processors:
        pytest.skip(f"{precision} is for {' or '.join(processors)}")
    return load_frozen(identity, precision)


@pytest.mark.parametrize("precision", list(PRECISIONS))
def test_a_base_is_held_at_its_precision_and_says_so(tiny_checkpoint: Path, precision: str) -> None:
    base = at(precision, identify(str(tiny_checkpoint)))
    assert (base.precision, base.backend) == (precision, available()[precision].backend)
    original = load_file(tiny_checkpoint / "model.safetensors")
    hold = choose(precision).hold
    for name, matrix in (
        ("h.7.attn.c_attn", base.weights.blocks[7].qkv.matrix),
        ("h.7.attn.c_proj", base.weights.blocks[7].attention_out.matrix),
        ("h.7.mlp.c_fc", base.weights.blocks[7].mlp_in.matrix),
        ("h.7.mlp.c_proj", base.weights.blocks[7].mlp_out.matrix),
    ):
        weight = original[f"transformer.{name}.weight"].T
        assert torch.equal(matrix.dense(), hold(weight, "cpu").dense())
    embedding = hold(original["transformer.wte.weight"], "cpu").dense()
    assert torch.equal(base.weights.embedding.dense(), embedding)
    assert torch.equal(base.weights.positions, original["transformer.wpe.weight"])


def test_the_head_of_a_dynamic_base_takes_gradients_unrounded(tiny_checkpoint: Path) -> None:
    weights = at("int8-dynamic", identify(str(tiny_checkpoint))).weights
    one_hot = torch.zeros(1, VOCABULARY)
    one_hot[0, :2] = torch.tensor([1000.0, 0.5])  # int8 has no 0.5 beside 1000
    expected = one_hot @ weights.embedding.dense()
    # two products and a sum in fp32
    torch.testing.assert_close(
        weights.embedding.times_transposed(one_hot), expected, rtol=1e-6, atol=1e-4
    )


def test_a_backend_can_be_named(tiny_checkpoint: Path) -> None:
    identity = identify(str(tiny_checkpoint))
    assert load_frozen(identity, "nf4", backend="torch").backend == "torch"
    with pytest.raises(InputError, match="unknown backend 'peft' of precision 'nf4'"):
        load_frozen(identity, "nf4", backend="peft")
    with pytest.raises(InputError, match="unknown precision 'int3'"):
        load_frozen(identity, "int3")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "nf4"])
def test_a_base_on_a_gpu_holds_the_weights_of_one_on_the_cpu(
    tiny_checkpoint: Path, precision: str
) -> None:
    identity = identify(str(tiny_checkpoint))
    here, there = load_frozen(identity, precision), load_frozen(identity, precision, "cuda")
    assert there.weights.positions.is_cuda
    assert torch.equal(there.weights.embedding.dense().cpu(), here.weights.embedding.dense())
    assert distance_to_original(there) == distance_to_original(here)


@pytest.mark.parametrize(
    ("precision", "least", "most"),
    # The tiny base's weights are normal, of mean 0. bf16 rounds to 8 bits: at most 2**-9 of each.
    # int8 of 16 or 64 numbers a row: a step is the largest (1.8 to 2.4 deviations) / 127, the error
    # a step / sqrt(12). nf4 of normal numbers is 0.09 in blocks of 64, less in shorter ones.
    [("fp32", 0, 0), ("bf16", 1e-3, 2**-9), ("int8", 3e-3, 7e-3), ("nf4", 0.05, 0.1)],
)
def test_the_distance_to_the_original_is_that_of_the_rounding(
    tiny_checkpoint: Path, precision: str, least: float, most: float
) -> None:
    base = load_frozen(identify(str(tiny_checkpoint)), precision)
    found = distance_to_original(base)
    names = ["wte", *(f"h.{i}.{name}" for i in range(LAYERS) for name in PROJECTIONS)]
    assert list(found) == [*names, "overall"]
    assert all(least <= distance <= most for distance in found.values())


def test_the_distance_is_relative_and_over_all_matrices(tiny_checkpoint: Path) -> None:
    base = load_frozen(identify(str(tiny_checkpoint)))
    hold = choose("fp32").hold
    double = hold(2 * base.weights.blocks[1].mlp_in.matrix.dense(), "cpu")
    block = replace(
        base.weights.blocks[1], mlp_in=replace(base.weights.blocks[1].mlp_in, matrix=double)
    )
    blocks = (base.weights.blocks[0], block, *base.weights.blocks[2:])
    found = distance_to_original(replace(base, weights=replace(base.weights, blocks=blocks)))
    assert found["h.1.mlp.c_fc"] == 1
    assert found["h.2.mlp.c_fc"] == 0
    original = load_file(tiny_checkpoint / "model.safetensors")
    squares = {n: float((t.numpy().astype(np.float64) ** 2).sum()) for n, t in original.items()}
    matrices = [n for n in squares if n.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))]
    whole = squares["transformer.wte.weight"] + sum(squares[n] for n in matrices)
    expected = (squares["transformer.h.1.mlp.c_fc.weight"] / whole) ** 0.5
    assert found["overall"] == pytest.approx(expected, rel=1e-12)


# -- in less memory --------------------------------------------------------------------------------


def gpt2_small(precision: str) -> FrozenGPT2:
    """Hold GPT-2 small's shape; its twelve blocks are one, which counts twelve times."""
    width, inner, vocabulary, positions = 768, 3072, 50257, 1024
    hold = choose(precision).hold

    def norm() -> Norm:
        return Norm(weight=torch.ones(width), bias=torch.zeros(width))

    def projection(inputs: int, outputs: int) -> Projection:
        weight = torch.full((outputs, inputs), 0.02)
        return Projection(matrix=hold(weight, "cpu"), bias=torch.zeros(outputs))

    block = Block(
        ln_1=norm(),
        qkv=projection(width, 3 * width),
        attention_out=projection(width, width),
        ln_2=norm(),
        mlp_in=projection(width, inner),
        mlp_out=projection(inner, width),
    )
    return FrozenGPT2(
        embedding=hold(torch.full((vocabulary, width), 0.02), "cpu"),
        positions=torch.zeros(positions, width),
        blocks=(block,) * 12,
        ln_f=norm(),
        heads=12,
        epsilon=1e-5,
        gelu="tanh",
    )


@pytest.mark.parametrize(
    ("precision", "most"), [("fp32", 498e6), ("bf16", 251e6), ("int8", 135e6), ("nf4", 95e6)]
)
def test_gpt2_small_takes_its_bytes_and_no_more_than_a_small_device_has(
    precision: str, most: float
) -> None:
    block_weights, block_rows = 12 * 768**2, 768 * (3 + 1 + 4 + 1)
    weights = 50257 * 768 + 12 * block_weights
    rows = 50257 + 12 * block_rows
    fp32 = 4 * (1024 * 768 + 2 * 768 + 12 * (4 * 768 + block_rows))  # positions, norms, biases
    expected = {
        "fp32": 4 * weights,
        "bf16": 2 * weights,
        "int8": weights + 4 * rows,
        "nf4": weights // 2 + 4 * weights // 64,
    }
    held = gpt2_small(precision).nbytes
    assert held == expected[precision] + fp32
    assert held <= most


@pytest.mark.parametrize("precision", ["bf16", "int8", "nf4"])
def test_loading_takes_the_base_and_one_tensor(
    tmp_path: Path, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored, "ROUNDED_ELEMENTS", 2_000)
    identity = identify(str(write_checkpoint(tmp_path, width=64)))
    choose(precision)  # trials take memory of their own
    with MemoryCount() as count:
        base = load_frozen(identity, precision)
    largest = 4 * VOCABULARY * 64  # the embedding as it is mapped
    # Pieces of 2,000 numbers are rounded in at most eight steps of at most 8 bytes a number.
    assert base.weights.nbytes <= count.peak_bytes
    assert count.peak_bytes <= base.weights.nbytes + largest + 8 * 8 * 2_000


def mapped(folder: Path) -> list[tuple[int, int]]:
    """Return from where to where the weights of a checkpoint are mapped in this process."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("this system does not list the maps of a process")
    path = str((folder / "model.safetensors").resolve())
    rows = [row for row in maps.read_text().splitlines() if row.endswith(path)]
    ends = [row.split()[0].split("-") for row in rows]
    return [(int(start, 16), int(stop, 16)) for start, stop in ends]


def test_matrices_of_an_fp32_file_at_fp32_stay_in_the_file(folder: Path) -> None:
    weights = load_frozen(identify(str(folder))).weights
    places = mapped(folder)

    def in_file(tensor: Tensor) -> bool:
        return any(start <= tensor.data_ptr() < stop for start, stop in places)

    block = weights.blocks[5]
    held = [block.qkv, block.attention_out, block.mlp_in, block.mlp_out]
    assert all(in_file(matrix.dense()) for matrix in (weights.embedding, *(p.matrix for p in held)))
    assert not any(in_file(tensor) for tensor in (weights.positions, block.qkv.bias))


@pytest.mark.parametrize("precision", ["bf16", "int8", "nf4"])
def test_the_file_of_a_rounded_base_is_mapped_for_one_tensor_at_a_time(
    folder: Path, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[int] = []
    read = Checkpoint.read

    def count(self: Checkpoint, name: str) -> Tensor:
        left.append(len(mapped(folder)))
        return read(self, name)

    monkeypatch.setattr(Checkpoint, "read", count)
    base = load_frozen(identify(str(folder)), precision)
    assert left == [0] * (2 + LAYERS * 12 + 2)
    assert not mapped(folder)
    assert len(base.weights.blocks) == LAYERS


# -- what is refused -------------------------------------------------------------------------------


def with_another_head(tensors: dict[str, Tensor]) -> None:
    """Give the model a head that is not its embedding."""
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"] + 0.01


def with_whole_numbers(tensors: dict[str, Tensor]) -> None:
    """Write a tensor in a type that is no float."""
    tensors["transformer.h.0.ln_1.bias"] = tensors["transformer.h.0.ln_1.bias"].to(torch.int32)


def with_another_shape(tensors: dict[str, Tensor]) -> None:
    """Cut one tensor."""
    tensors["transformer.wpe.weight"] = tensors["transformer.wpe.weight"][:64]


def cut_short(folder: Path) -> None:
    """Leave a whole header and half of the data, as a broken download does."""
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (
            rewritten(lambda t: t.pop("transformer.h.3.mlp.c_fc.weight")),
            r"lacks 1 tensors of a GPT-2, 'transformer\.h\.3\.mlp\.c_fc\.weight' among them; give",
        ),
        (
            rewritten(lambda t: t.pop("transformer.wte.weight")),
            r"lacks 1 tensors of a GPT-2, 'transformer\.wte\.weight' among them",
        ),
        (configured(n_layer=13), r"lacks 12 tensors of a GPT-2, 'transformer\.h\.12\."),
        (configured(n_layer=11), "has more blocks than n_layer = 11 of its config.json"),
        (
            rewritten(with_another_shape),
            r"'transformer.wpe.weight' has shape \[64, 16\] where its config.json says \[128, 16\]",
        ),
        (configured(n_inner=32), r"c_fc.weight' has shape \[16, 64\] where .* says \[16, 32\]"),
        (rewritten(with_whole_numbers), "ln_1.bias' is of type I32; this version reads F32, F16"),
        (cut_short, "cannot be read: .*; give another checkpoint"),
        (configured(n_head=3), "n_head = 3; a whole number that divides n_embd = 16"),
        (configured(n_head=0), "n_head = 0; a whole number"),
        (configured(n_head="2"), "n_head = '2'; a whole number"),
        (configured(layer_norm_epsilon=0), "layer_norm_epsilon = 0; a number above 0"),
        (
            configured(activation_function="relu"),
            "activation_function = 'relu'; this version computes gelu_new, gelu_pytorch_tanh, gelu",
        ),
        (
            configured(scale_attn_by_inverse_layer_idx=True),
            "scale_attn_by_inverse_layer_idx = true; this version computes false only",
        ),
        (configured(reorder_and_upcast_attn=True), "reorder_and_upcast_attn = true"),
        (configured(scale_attn_weights=False), "scale_attn_weights = false; this version comp"),
        (
            rewritten(with_another_head),
            "has a head of its own .'lm_head.weight' is not 'transformer.wte.weight'.; this vers",
        ),
        (configured(tie_word_embeddings=False), "has a head of its own"),
    ],
)
def test_a_base_that_does_not_hold_together_is_refused_with_a_sentence(
    folder: Path, damage: Callable[[Path], None], sentence: str
) -> None:
    damage(folder)
    identity = identify(str(folder))
    with pytest.raises(BaseModelError, match=sentence) as raised:
        load_frozen(identity)
    assert str(folder) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_tokenizer_that_does_not_fit_is_refused(folder: Path) -> None:
    path = folder / "tokenizer.json"
    words = json.loads(path.read_text())
    vocabulary = words["model"]["vocab"]
    vocabulary |= {f"word{i}": len(vocabulary) + i for i in range(200)}
    path.write_text(json.dumps(words))
    identity = identify(str(folder))
    with pytest.raises(BaseModelError, match="embedding rows; give the tokenizer that"):
        load_frozen(identity)


@pytest.mark.parametrize("precision", ["int8", "nf4"])
def test_a_weight_that_is_no_number_is_named_where_rounding_would_hide_it(
    folder: Path, precision: str
) -> None:
    def damage(tensors: dict[str, Tensor]) -> None:
        tensors["transformer.h.4.mlp.c_proj.weight"][3, 2] = float("nan")

    rewritten(damage)(folder)
    identity = identify(str(folder))
    with pytest.raises(BaseModelError, match=r"'h\.4\.mlp\.c_proj': a weight is not a finite num"):
        load_frozen(identity, precision)
