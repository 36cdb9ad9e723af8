"""An encoder as trunk, against the library's model on one text at a time; and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from edge_client.reward.encoder import Encoder
from quantization.errors import BaseModelError, HubUnavailableError
from tests.edge_client.reward.encoders import write_encoder

TEXTS = [
    ("name a river", "the river"),
    ("name a number of the bridge", "three is a good number"),
    ("name the four", "four"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("encoders") / "bert")


def test_which_side_its_tokenizer_pads_on_does_not_matter(folder: Path, tmp_path: Path) -> None:
    left = tmp_path / "left"
    shutil.copytree(folder, left)
    path = left / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "padding_side": "left"}))
    assert torch.equal(
        Encoder(str(left)).response_features(TEXTS), Encoder(str(folder)).response_features(TEXTS)
    )


def test_features_are_first_token_mean_of_the_response_and_its_length(folder: Path) -> None:
    from transformers import AutoTokenizer, BertModel

    encoder = Encoder(str(folder))
    found = encoder.response_features(TEXTS)
    assert (encoder.name, encoder.kind, encoder.width) == ("bert", "bert", 8)
    assert found.shape == (3, 17)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), BertModel.from_pretrained(folder)
    for row, (prompt, response) in zip(found, TEXTS, strict=True):
        ids = tokenizer(prompt, response, return_tensors="pt")
        with torch.no_grad():
            states = model.eval()(**ids).last_hidden_state[0].double().numpy()
        count = len(response.split())  # a word, a token; the last one is [SEP]
        parts = [states[0], states[-1 - count : -1].mean(0)]
        expected = np.concatenate(
            [*((p - p.mean()) / np.sqrt(p.var() + 1e-5) for p in parts), [np.log(count + 1)]]
        )
        assert row.numpy() == pytest.approx(expected, abs=1e-5)  # fp32 through two blocks


def test_features_do_not_depend_on_who_else_is_in_the_batch(folder: Path) -> None:
    encoder = Encoder(str(folder))
    together = encoder.response_features(TEXTS)
    for row, text in zip(together, TEXTS, strict=True):
        alone = encoder.response_features([text])[0]
        assert alone.numpy() == pytest.approx(row.numpy(), abs=1e-5)  # padding is masked; fp32
    assert encoder.response_features([]).shape == (0, 17)


def test_texts_that_are_too_long_lose_their_end_and_are_read(folder: Path) -> None:
    encoder = Encoder(str(folder))
    # 3 marks and 13 words fit; the response keeps what the prompt leaves of 16 positions
    found = encoder.response_features([("name a river", "four " * 100)])
    assert found[0, -1].item() == pytest.approx(np.log(10 + 1), abs=1e-6)


def test_a_decoder_is_refused(tiny_checkpoint: Path) -> None:
    with pytest.raises(BaseModelError, match="a 'gpt2' is no encoder; give one"):
        Encoder(str(tiny_checkpoint))


@pytest.mark.parametrize(
    ("gone", "sentence"),
    [
        (("config.json",), "has no config.json"),
        (("tokenizer.json", "vocab.txt", "tokenizer_config.json"), "its tokenizer cannot be read"),
        (("model.safetensors",), "its weights cannot be read"),
    ],
)
def test_a_folder_that_lacks_a_part_is_refused(
    folder: Path, tmp_path: Path, gone: tuple[str, ...], sentence: str
) -> None:
    copy = tmp_path / "bert"
    shutil.copytree(folder, copy)
    for name in gone:
        (copy / name).unlink()
    with pytest.raises(BaseModelError, match=sentence):
        Encoder(str(copy))


def test_a_checkpoint_that_lacks_a_tensor_is_refused(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    copy = tmp_path / "bert"
    shutil.copytree(folder, copy)
    state = load_file(copy / "model.safetensors")
    name = "encoder.layer.1.output.dense.weight"
    save_file(
        {n: t for n, t in state.items() if n != name and not n.startswith("pooler.")},
        copy / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(BaseModelError, match=f"lacks 1 of its tensors, '{name}' among them"):
        Encoder(str(copy))


def test_a_hub_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HubUnavailableError, match=r"'nobody/an-encoder' .*give the folder of an"):
        Encoder("nobody/an-encoder")
