"""What a base is: its shape, its size and its hashes, and what is refused."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from device_profiles.modules import BaseShape
from quantization import identity as identity_module
from quantization.errors import BaseModelError, HubUnavailableError
from quantization.identity import BaseIdentity, binding, file_sha256, identify, mini_folder
from tests.conftest import write_checkpoint, write_tokenizer

# Embeddings, final norm; and a block: 2 norms, c_attn, c_proj, c_fc, mlp.c_proj, with their biases.
EMBEDDED = 512 * 16 + 128 * 16 + 2 * 16
BLOCK = 2 * 2 * 16 + (16 * 48 + 48) + (16 * 16 + 16) + (16 * 64 + 64) + (64 * 16 + 16)


@pytest.fixture
def folder(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """Return a copy of the tiny checkpoint, for a test to damage."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "base"))


@pytest.fixture
def kit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put a small tokenizer in the place of the kit's; return its folder."""
    folder = tmp_path / "kit"
    folder.mkdir()
    write_tokenizer(folder)
    monkeypatch.setattr(identity_module, "mini_folder", lambda: folder)
    return folder


def configure(folder: Path, **changes: Any) -> None:
    """Change a checkpoint's configuration; a value of None becomes null."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# -- what is found ---------------------------------------------------------------------------------


def test_a_checkpoint_is_identified_by_shape_size_and_hashes(folder: Path) -> None:
    weights = (folder / "model.safetensors").read_bytes()
    tokenizer = (folder / "tokenizer.json").read_bytes()
    assert identify(str(folder)) == BaseIdentity(
        name="base",
        folder=folder,
        tokenizer_folder=folder,
        sha256=hashlib.sha256(weights).hexdigest(),
        tokenizer_sha256=hashlib.sha256(tokenizer).hexdigest(),
        parameters=EMBEDDED + 12 * BLOCK,
        positions=128,
        vocabulary=512,
        shape=BaseShape(layers=12, width=16, inner=64),
    )


def test_the_size_in_memory_is_four_bytes_a_parameter(folder: Path) -> None:
    assert identify(str(folder)).base_bytes == 4 * (EMBEDDED + 12 * BLOCK)


def test_the_name_says_where_the_base_is(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    monkeypatch.chdir(folder.parent)
    names = [str(folder), "base", "./base", "~/base"]
    assert len({(i.name, i.sha256) for i in map(identify, names)}) == 1


def test_an_inner_size_of_its_own_is_read(tmp_path: Path) -> None:
    found = identify(str(write_checkpoint(tmp_path, layers=1, inner=24)))
    assert found.shape == BaseShape(layers=1, width=16, inner=24)
    assert found.parameters == EMBEDDED + BLOCK - 2 * 16 * 40 - 40


def test_masks_and_the_tied_head_of_old_checkpoints_are_not_counted(folder: Path) -> None:
    path = folder / "model.safetensors"
    before = identify(str(folder)).parameters
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].copy()
    for i in range(12):
        mask = np.ones((1, 1, 128, 128), np.float32)
        tensors[f"transformer.h.{i}.attn.bias"] = mask
        tensors[f"transformer.h.{i}.attn.masked_bias"] = np.array(-1e4, np.float32)
    save_file(tensors, path, metadata={"format": "pt"})
    assert identify(str(folder)).parameters == before


def test_gpt2_smalls_parameters_are_counted_by_the_header_alone(folder: Path) -> None:
    # names without the first part, and masks, as the hub's checkpoint has them
    shapes = {"wte.weight": [50257, 768], "wpe.weight": [1024, 768]}
    shapes |= {"ln_f.weight": [768], "ln_f.bias": [768]}
    for i in range(12):
        block = f"h.{i}"
        for norm in ("ln_1", "ln_2"):
            shapes |= {f"{block}.{norm}.weight": [768], f"{block}.{norm}.bias": [768]}
        for name, inputs, outputs in (
            ("attn.c_attn", 768, 2304),
            ("attn.c_proj", 768, 768),
            ("mlp.c_fc", 768, 3072),
            ("mlp.c_proj", 3072, 768),
        ):
            shapes[f"{block}.{name}.weight"] = [inputs, outputs]
            shapes[f"{block}.{name}.bias"] = [outputs]
        shapes[f"{block}.attn.bias"] = [1, 1, 1024, 1024]
    entries = {n: {"dtype": "F32", "shape": s, "data_offsets": [0, 0]} for n, s in shapes.items()}
    header = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    assert identify(str(folder)).parameters == 124_439_808


def test_a_file_is_hashed_whole_however_long_it_is(tmp_path: Path) -> None:
    path = tmp_path / "file"
    content = np.random.default_rng(0).bytes((1 << 20) + 12_345)  # more than one piece
    path.write_bytes(content)
    assert file_sha256(path) == hashlib.sha256(content).hexdigest()


# -- the binding -----------------------------------------------------------------------------------


def test_a_binding_is_of_base_tokenizer_and_placement_and_of_nothing_else(folder: Path) -> None:
    base = identify(str(folder))
    moved = Path(shutil.copytree(folder, folder.parent / "elsewhere"))
    assert binding(identify(str(moved)), "qkv") == binding(base, "qkv")

    path = moved / "model.safetensors"
    tensors = load_file(path)
    tensors["transformer.wpe.weight"][0, 0] += 1
    save_file(tensors, path, metadata={"format": "pt"})
    other_weights = identify(str(moved))

    shutil.copy(folder / "model.safetensors", path)
    words = json.loads((moved / "tokenizer.json").read_text())
    words["model"]["merges"].pop()
    (moved / "tokenizer.json").write_text(json.dumps(words))
    other_tokenizer = identify(str(moved))

    bindings = [
        binding(base, "qkv"),
        binding(other_weights, "qkv"),
        binding(other_tokenizer, "qkv"),
        binding(base, "wide"),
    ]
    assert len(set(bindings)) == 4
    assert all(len(b) == 64 and int(b, 16) >= 0 for b in bindings)


# -- a folder without a tokenizer ------------------------------------------------------------------


def test_a_folder_without_a_tokenizer_gets_the_kits_where_it_fits(
    folder: Path, kit: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "tokenizer.json").unlink()
    with caplog.at_level(logging.WARNING):
        found = identify(str(folder))
    assert (found.folder, found.tokenizer_folder) == (folder, kit)
    assert found.tokenizer_sha256 == file_sha256(kit / "tokenizer.json")
    assert "has no tokenizer.json; the kit's tokenizer is used" in caplog.text


def test_a_tokenizer_of_its_own_is_never_replaced(
    folder: Path, kit: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert identify(str(folder)).tokenizer_folder == folder != kit
    assert caplog.text == ""


def test_the_kits_tokenizer_is_refused_where_the_base_has_fewer_rows(
    folder: Path, kit: Path
) -> None:
    (folder / "tokenizer.json").unlink()
    words = len(json.loads((kit / "tokenizer.json").read_text())["model"]["vocab"])
    configure(folder, vocab_size=words)
    assert identify(str(folder)).tokenizer_folder == kit
    configure(folder, vocab_size=words - 1)
    with pytest.raises(
        BaseModelError, match=f"only {words - 1} embedding rows; the kit's tokenizer needs {words}"
    ):
        identify(str(folder))


def test_a_kit_without_a_tokenizer_is_said(folder: Path, kit: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (kit / "tokenizer.json").unlink()
    with pytest.raises(BaseModelError, match=r"kit has no readable tokenizer\.json"):
        identify(str(folder))


def test_mini_is_the_bundled_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert mini_folder().parts[-3:] == ("quantization", "bases", "mini")
    monkeypatch.setattr(identity_module, "mini_folder", lambda: folder)
    assert identify("mini").folder == folder


# -- what is refused -------------------------------------------------------------------------------


def remove(name: str) -> Callable[[Path], None]:
    """Return what removes a file of a checkpoint."""
    return lambda folder: (folder / name).unlink()


def write(name: str, content: bytes) -> Callable[[Path], None]:
    """Return what writes a file of a checkpoint."""
    return lambda folder: (folder / name).write_bytes(content) and None


def header(entries: object) -> bytes:
    """Return the beginning of a weights file."""
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (remove("config.json"), r"has no readable config\.json; give a checkpoint"),
        (write("config.json", b"{"), r"has no readable config\.json"),
        (write("config.json", b"\xff\xfe\x00"), r"has no readable config\.json"),
        (write("config.json", b"7"), r"has no readable config\.json"),
        (write("config.json", b"[]"), "holds a 'None'"),
        (lambda f: configure(f, model_type="mamba"), "holds a 'mamba'; this version tunes GPT-2"),
        (lambda f: configure(f, n_layer=0), r"config\.json: n_layer = 0; a whole number"),
        (lambda f: configure(f, n_embd="16"), r"config\.json: n_embd = '16'; a whole number"),
        (lambda f: configure(f, n_positions=None), r"config\.json: n_positions = None"),
        (lambda f: configure(f, vocab_size=1.5), r"config\.json: vocab_size = 1\.5"),
        (lambda f: configure(f, n_inner="wide"), r"config\.json: n_inner = 'wide'"),
        (remove("model.safetensors"), r"model\.safetensors is missing or damaged"),
        (write("model.safetensors", b""), r"model\.safetensors is missing or damaged"),
        (write("model.safetensors", b"1234567"), r"model\.safetensors is missing or damaged"),
        (write("model.safetensors", b"\xff" * 64), r"model\.safetensors is missing or damaged"),
        (write("model.safetensors", header({})[:-1]), r"model\.safetensors is missing or damaged"),
        (write("model.safetensors", header([1])), r"model\.safetensors is missing or damaged"),
        (write("model.safetensors", header({"a": 1})), r"model\.safetensors is missing or damaged"),
        (write("model.safetensors", header({"a": {}})), r"model\.safetensors is missing or damag"),
        (
            write("model.safetensors", header({"a": {"shape": ["x", 2]}})),
            r"model\.safetensors is missing or damaged",
        ),
        (
            write("model.safetensors", header({"a": {"shape": None}})),
            r"model\.safetensors is missing or damaged",
        ),
    ],
)
def test_a_folder_that_is_no_usable_checkpoint_is_refused_with_a_sentence(
    folder: Path, damage: Callable[[Path], None], sentence: str
) -> None:
    damage(folder)
    with pytest.raises(BaseModelError, match=sentence) as raised:
        identify(str(folder))
    assert raised.value.exit_code == 2


@pytest.mark.parametrize("name", ["/nowhere/base", "./nowhere", "~/nowhere-at-all", "a/b/c", ".."])
def test_a_folder_that_is_not_there_is_not_looked_for_on_a_hub(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    monkeypatch.chdir(inside)
    with pytest.raises(BaseModelError, match=r"no such folder|has no readable config\.json"):
        identify(name)


@pytest.mark.parametrize("name", ["gpt2", "somebody/a-model"])
def test_a_hub_that_does_not_answer_is_a_failure_with_a_remedy(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    # the library reads HF_HUB_OFFLINE=1 when it is imported, which was perhaps long ago
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(
        HubUnavailableError, match=f"model '{name}' could not be fetched.*give a checkpoint folder"
    ) as raised:
        identify(name)
    assert raised.value.exit_code == 1


@pytest.mark.parametrize("name", ["two words", "a--b/..c", "-"])
def test_what_can_be_no_hub_id_is_bad_input(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BaseModelError, match="is neither a folder nor a hub id"):
        identify(name)
