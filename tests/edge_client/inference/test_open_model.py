"""What a person names is opened, or it is said why not."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from device_profiles.errors import InputError
from edge_client.inference.generation import answer
from edge_client.inference.open_model import open_speaker
from edge_client.inference.sampling import Sampling
from quantization.errors import BaseModelError, MissingExtraError


@pytest.fixture
def folder(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """Return a copy of the tiny checkpoint, which looks like an export without adapters."""
    return shutil.copytree(tiny_checkpoint, tmp_path / "model")


def test_a_checkpoint_folder_answers_on_torch(folder: Path) -> None:
    speaker = open_speaker(folder)
    said = answer(speaker, "Name a river.", Sampling(temperature=0, max_tokens=5))
    assert speaker.model.name == "torch"
    assert speaker.end_tokens == frozenset([0])
    assert said.tokens == 5 or said.stopped == "end"


def test_an_empty_folder_is_told_with_how_to_make_a_model(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="pwff export"):
        open_speaker(tmp_path)


def test_a_model_for_one_runtime_is_not_opened_on_the_other(folder: Path) -> None:
    with pytest.raises(InputError, match="--format onnx"):
        open_speaker(folder, runtime="onnx")


def test_an_unknown_runtime_is_told_with_the_nearest(folder: Path) -> None:
    with pytest.raises(InputError, match="'torsh'; did you mean 'torch'"):
        open_speaker(folder, runtime="torsh")


def test_a_client_of_an_exported_folder_makes_no_sense(folder: Path) -> None:
    with pytest.raises(InputError, match="--client"):
        open_speaker(folder, client="pi5-01")


def test_of_a_run_a_client_must_be_named(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(InputError, match="--client ID"):
        open_speaker(tmp_path)


def test_a_run_is_not_opened_on_onnx(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(InputError, match="export it first"):
        open_speaker(tmp_path, client="pi5-01", runtime="onnx")


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_damaged_file_is_named(folder: Path, file: str) -> None:
    (folder / file).write_bytes(b"\x08")
    with pytest.raises(BaseModelError, match=str(folder)):
        open_speaker(folder)


def test_a_missing_tensor_is_named(folder: Path) -> None:
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["transformer.h.3.mlp.c_fc.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BaseModelError, match=r"h\.3\.mlp\.c_fc\.weight"):
        open_speaker(folder)


def test_a_folder_without_an_end_token_is_told(folder: Path) -> None:
    for name in ("config.json", "generation_config.json"):
        kept = json.loads((folder / name).read_text())
        kept.pop("eos_token_id")
        (folder / name).write_text(json.dumps(kept))
    with pytest.raises(BaseModelError, match="eos_token_id"):
        open_speaker(folder)


def test_a_missing_runtime_is_told_with_its_extra(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingExtraError, match=r"pwff\[edge\]"):
        open_speaker(folder)


def test_onnx_without_onnxruntime_is_told_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model.onnx").write_bytes(b"")
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError, match=r"pwff\[onnx\]"):
        open_speaker(tmp_path)
