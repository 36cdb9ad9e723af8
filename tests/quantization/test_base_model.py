"""Loading a base, and its attention projection in three parts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.numpy import load_file, save_file

from quantization.base_model import Base, joined_state, load_base, set_threads, split_attention
from quantization.errors import BaseModelError
from quantization.identity import identify
from tests.conftest import END_OF_TEXT

TOKENS = torch.arange(33).reshape(3, 11) * 13 % 512


@pytest.fixture
def folder(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """Return a copy of the tiny checkpoint, for a test to damage."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "base"))


@pytest.fixture
def base(tiny_checkpoint: Path) -> Base:
    """Load the tiny base."""
    return load_base(identify(str(tiny_checkpoint)))


def logits_of(base: Base, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    """Return the logits of every place."""
    with torch.no_grad():
        logits: torch.Tensor = base.model(tokens).logits
    return logits


# -- loading ---------------------------------------------------------------------------------------


def test_a_base_is_frozen_in_fp32_with_the_weights_of_its_file(
    base: Base, tiny_checkpoint: Path
) -> None:
    held = dict(base.model.named_parameters())
    assert not any(p.requires_grad for p in held.values())
    assert {p.dtype for p in held.values()} == {torch.float32}
    assert not base.model.training
    stored = load_file(tiny_checkpoint / "model.safetensors")
    assert set(stored) == set(held)
    assert all(torch.equal(held[n], torch.from_numpy(stored[n])) for n in stored)


def test_the_parameters_of_the_identity_are_torchs(base: Base) -> None:
    assert base.identity.parameters == sum(p.numel() for p in base.model.parameters())


def test_a_base_in_half_precision_is_loaded_in_fp32(folder: Path) -> None:
    path = folder / "model.safetensors"
    halves = {n: t.astype("float16") for n, t in load_file(path).items()}
    save_file(halves, path, metadata={"format": "pt"})
    model = load_base(identify(str(folder))).model
    weight = model.transformer.wte.weight
    assert weight.dtype == torch.float32
    assert torch.equal(weight, torch.from_numpy(halves["transformer.wte.weight"]).float())


def test_dropout_is_off_though_the_configuration_has_it(base: Base) -> None:
    assert base.model.config.resid_pdrop > 0
    assert torch.equal(logits_of(base), logits_of(base))


def test_the_end_token_is_the_tokenizers(base: Base) -> None:
    assert base.end_token == base.tokenizer(END_OF_TEXT).input_ids[0] == 0


def test_threads_are_pinned() -> None:
    before = torch.get_num_threads()
    try:
        for threads in (2, 1):
            set_threads(threads)
            assert torch.get_num_threads() == threads
    finally:
        set_threads(before)


# -- what is refused -------------------------------------------------------------------------------


def without_a_tensor(folder: Path) -> None:
    """Take one tensor out of the weights."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["transformer.h.3.mlp.c_fc.weight"]
    save_file(tensors, path, metadata={"format": "pt"})


def with_another_shape(folder: Path) -> None:
    """Cut one tensor of the weights."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["transformer.wpe.weight"] = tensors["transformer.wpe.weight"][:64].copy()
    save_file(tensors, path, metadata={"format": "pt"})


def cut_short(folder: Path) -> None:
    """Leave a whole header and half of the data, as a broken download does."""
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def configured(**changes: object) -> Callable[[Path], None]:
    """Return what changes the configuration."""

    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def with_a_broken_tokenizer(text: str) -> Callable[[Path], None]:
    """Return what writes a tokenizer that is none."""

    def change(folder: Path) -> None:
        (folder / "tokenizer.json").write_text(text)

    return change


def without_an_end_token(folder: Path) -> None:
    """Take the end token out of the tokenizer's configuration."""
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["eos_token"]
    path.write_text(json.dumps(config))
    (folder / "special_tokens_map.json").unlink(missing_ok=True)


def with_more_words_than_rows(folder: Path) -> None:
    """Add tokens to the tokenizer that the embedding has no row for."""
    path = folder / "tokenizer.json"
    words = json.loads(path.read_text())
    vocabulary = words["model"]["vocab"]
    vocabulary |= {f"word{i}": len(vocabulary) + i for i in range(200)}
    path.write_text(json.dumps(words))


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (
            without_a_tensor,
            r"lacks 1 tensors of a GPT-2, 'transformer\.h\.3\.mlp\.c_fc\.weight' among them",
        ),
        (configured(n_layer=13), r"lacks 12 tensors of a GPT-2, 'transformer\.h\.12\."),
        (with_another_shape, "cannot be loaded: "),
        (cut_short, "cannot be loaded: "),
        (configured(n_head=3), "cannot be loaded: "),
        (configured(activation_function="no such thing"), "cannot be loaded: "),
        (with_a_broken_tokenizer("{}"), "the tokenizer of .* cannot be read: "),
        (with_a_broken_tokenizer('{"model": {"type": "BPE"}}'), "the tokenizer of .* cannot be re"),
        (with_a_broken_tokenizer("\0\0"), "the tokenizer of .* cannot be read: "),
        (without_an_end_token, r"names no end token; set eos_token in its tokenizer_config\.json"),
        (with_more_words_than_rows, "has 601 tokens and .* 512 embedding rows"),
    ],
)
def test_a_base_that_does_not_hold_together_is_refused_with_a_sentence(
    folder: Path, damage: Callable[[Path], None], sentence: str
) -> None:
    damage(folder)
    identity = identify(str(folder))
    with pytest.raises(BaseModelError, match=sentence) as raised:
        load_base(identity)
    assert str(folder) in str(raised.value)
    assert "\n" not in str(raised.value)


# -- the split projection --------------------------------------------------------------------------


def test_a_split_projection_holds_the_columns_of_the_joint_one(base: Base) -> None:
    before = {n: t.clone() for n, t in base.model.state_dict().items()}
    split_attention(base.model)
    for i in range(12):
        place = f"transformer.h.{i}.attn.c_attn"
        for part, start in (("query", 0), ("key", 16), ("value", 32)):
            module = base.model.get_submodule(f"{place}.{part}")
            columns = slice(start, start + 16)
            assert torch.equal(module.weight, before[f"{place}.weight"][:, columns].T)
            assert torch.equal(module.bias, before[f"{place}.bias"][columns])
    assert not any(p.requires_grad for p in base.model.parameters())
    assert base.identity.parameters == sum(p.numel() for p in base.model.parameters())


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (3, 11)])
def test_a_split_base_computes_what_the_plain_one_does(base: Base, shape: tuple[int, int]) -> None:
    tokens = TOKENS[: shape[0], : shape[1]]
    plain = logits_of(base, tokens)
    split_attention(base.model)
    # The same products are summed in another order where a kernel for few rows is taken: three
    # square matrices instead of one wide. On the bundled base that was below 7 tokens, and at most
    # 5e-7 of the largest logit; from 7 to 256 tokens it was no bit.
    torch.testing.assert_close(
        logits_of(base, tokens), plain, rtol=0, atol=5e-6 * float(plain.abs().max())
    )


def test_splitting_twice_is_splitting_once(base: Base) -> None:
    split_attention(base.model)
    once, modules = logits_of(base), [m for _, m in base.model.named_modules()]
    split_attention(base.model)
    assert torch.equal(logits_of(base), once)
    assert [m for _, m in base.model.named_modules()] == modules


def test_a_joined_state_is_the_original_in_every_bit(base: Base, tiny_checkpoint: Path) -> None:
    original = load_base(identify(str(tiny_checkpoint)))
    split_attention(base.model)
    joined = joined_state(base.model)
    expected = original.model.state_dict()
    assert set(joined) == set(expected)
    assert all(joined[n].shape == expected[n].shape for n in expected)
    assert all(torch.equal(joined[n], expected[n]) for n in expected)
    logits = logits_of(original)
    with torch.no_grad():
        for parameter in original.model.parameters():
            parameter.zero_()
    original.model.load_state_dict(joined)
    assert torch.equal(logits_of(original), logits)


def test_the_joined_state_of_a_plain_base_is_its_own(base: Base) -> None:
    expected = base.model.state_dict()
    joined = joined_state(base.model)
    assert set(joined) == set(expected)
    assert all(torch.equal(joined[n], expected[n]) for n in expected)
