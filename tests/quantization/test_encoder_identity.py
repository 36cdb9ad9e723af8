"""An encoder on disk: what tells one from another, and what is none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from quantization.encoder_identity import identify_encoder
from quantization.errors import BaseModelError, HubUnavailableError
from tests.edge_client.reward.encoders import write_encoder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("encoders") / "bert")


def test_it_is_known_by_its_width_its_weights_and_its_tokenizer(
    folder: Path, tmp_path: Path
) -> None:
    found = identify_encoder(str(folder))
    assert found is not None
    weights = load_file(folder / "model.safetensors")
    assert (found.name, found.folder, found.width) == ("bert", folder, 8)
    assert found.parameters == sum(t.size for t in weights.values())
    again = identify_encoder(str(write_encoder(tmp_path / "same")))
    other = identify_encoder(str(write_encoder(tmp_path / "weights", seed=3)))
    words = identify_encoder(str(write_encoder(tmp_path / "words")))
    assert again is not None
    assert other is not None
    assert words is not None
    assert again.sha256 == found.sha256 == words.sha256 != other.sha256
    for name in ("tokenizer.json", "config.json", "tokenizer_config.json"):
        path = tmp_path / "words" / name
        before = path.read_text()
        path.write_text(before + " ")
        changed = identify_encoder(str(tmp_path / "words"))
        assert changed is not None
        assert changed.sha256 != found.sha256
        path.write_text(before)


def test_distilbert_says_its_width_by_another_name(tmp_path: Path) -> None:
    folder = write_encoder(tmp_path / "bert")
    config = json.loads((folder / "config.json").read_text())
    config["dim"] = config.pop("hidden_size")
    (folder / "config.json").write_text(json.dumps(config))
    found = identify_encoder(str(folder))
    assert found is not None
    assert found.width == 8


def test_the_base_is_no_encoder() -> None:
    assert identify_encoder("base") is None


@pytest.mark.parametrize("absent", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_folder_that_lacks_a_file_is_told_what_belongs_there(absent: str, tmp_path: Path) -> None:
    folder = write_encoder(tmp_path / "bert")
    (folder / absent).unlink()
    with pytest.raises(BaseModelError, match=r"give the folder of one with config\.json"):
        identify_encoder(str(folder))


@pytest.mark.parametrize("width", [0, "8", None, 8.5])
def test_a_width_that_is_none_is_refused(width: object, tmp_path: Path) -> None:
    folder = write_encoder(tmp_path / "bert")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": width}))
    with pytest.raises(BaseModelError, match="a width of"):
        identify_encoder(str(folder))


def test_what_is_no_folder_here_is_asked_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(HubUnavailableError, match="encoder 'distilbert-base-uncased' could not"):
        identify_encoder("distilbert-base-uncased")
    with pytest.raises(BaseModelError, match=r"encoder '\./nowhere': no such folder"):
        identify_encoder("./nowhere")
