"""The light tokenizer gives what transformers gives, and leaves to it what it cannot know."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

import quantization.tokenizer
from quantization.identity import identify
from quantization.tokenizer import Tokenizer, load_tokenizer
from tests.conftest import END_OF_TEXT

TEXTS = [
    "Name the number after three.",
    "",
    "  two spaces, a\ttab and\n\n### Response:\n",
    f"before{END_OF_TEXT} after {END_OF_TEXT}",
    "naïve café 北京 🙂 \0",
]


def change(folder: Path, **values: Any) -> None:
    """Set keys of a tokenizer's configuration; None takes one out."""
    path = folder / "tokenizer_config.json"
    config = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def as_it_is(_folder: Path) -> None:
    """Change nothing."""


def with_a_gpt2_class(folder: Path) -> None:
    """Say what the hub's GPT-2 says today."""
    change(folder, tokenizer_class="GPT2Tokenizer", add_prefix_space=False)


def with_no_class(folder: Path) -> None:
    """Leave the class to the model's configuration, as older checkpoints do."""
    change(folder, tokenizer_class=None)


def with_a_space_before(folder: Path) -> None:
    """Ask for what tokenizer.json does not do."""
    change(folder, tokenizer_class="GPT2Tokenizer", add_prefix_space=True)


def with_a_token_more(folder: Path) -> None:
    """Name a token that tokenizer.json does not have."""
    change(folder, **{"pad_token": "<pad>"})


def with_another_end_token(folder: Path) -> None:
    """Make the end token take the spaces before it."""
    token = {"content": END_OF_TEXT, "lstrip": True, "normalized": False, "rstrip": False,
             "single_word": False, "special": True}  # fmt: skip
    change(folder, added_tokens_decoder={"0": token})


LIGHT = [as_it_is, with_a_gpt2_class, with_no_class]
HEAVY = [with_a_space_before, with_a_token_more, with_another_end_token]


@pytest.fixture
def folder(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """Return a copy of the tiny checkpoint."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "base"))


def read(folder: Path) -> Tokenizer:
    """Return a folder's tokenizer."""
    return load_tokenizer(identify(str(folder)))


@pytest.mark.parametrize("changed", LIGHT + HEAVY)
def test_tokens_are_those_of_transformers(folder: Path, changed: Callable[[Path], None]) -> None:
    changed(folder)
    theirs, ours = AutoTokenizer.from_pretrained(folder), read(folder)
    assert [ours(t).input_ids for t in TEXTS] == [theirs(t).input_ids for t in TEXTS]
    assert (ours.eos_token, ours.eos_token_id) == (theirs.eos_token, theirs.eos_token_id)
    assert len(ours) == len(theirs)
    tokens = ours(TEXTS[-1]).input_ids
    assert ours.decode(tokens) == theirs.decode(tokens, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("changed", LIGHT + HEAVY)
def test_transformers_is_asked_where_the_file_does_not_say_everything(
    folder: Path, changed: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    changed(folder)
    asked: list[Path] = []
    real = quantization.tokenizer.transformers_tokenizer

    def note(place: Path) -> Any:
        asked.append(place)
        return real(place)

    monkeypatch.setattr(quantization.tokenizer, "transformers_tokenizer", note)
    read(folder)
    assert asked == ([folder] if changed in HEAVY else [])


def test_a_text_is_neither_cut_nor_padded_whatever_the_file_says(folder: Path) -> None:
    path = folder / "tokenizer.json"
    written = json.loads(path.read_text())
    written["truncation"] = {
        "direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0,
    }  # fmt: skip
    written["padding"] = {
        "strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None,
        "pad_id": 0, "pad_type_id": 0, "pad_token": END_OF_TEXT,
    }  # fmt: skip
    path.write_text(json.dumps(written))
    assert len(read(folder)(TEXTS[0]).input_ids) == len(
        AutoTokenizer.from_pretrained(folder)(TEXTS[0]).input_ids
    )


def test_a_device_learns_without_transformers_and_without_the_compiler(
    tiny_checkpoint: Path,
) -> None:
    """Either of them would be most of a worker's start."""
    script = f"""
import sys
from edge_client.data.prompts import encode_example
from edge_client.data.instructions import Example
from edge_client.peft.packed_model import PackedModel
from edge_client.state import ClientState
from edge_client.trainer import train
from quantization.frozen_gpt2 import load_frozen
from quantization.identity import identify
base = load_frozen(identify({str(tiny_checkpoint)!r}), "fp32")
model = PackedModel(base, adapter_size=4, placement="wide", lora_count=12, lora_rank=2)
example = encode_example(Example(instruction="Say two.", output="Two."), base.tokenizer, 64)
done = train(model, ClientState(round=0, personal={{}}), [example] * 2, steps=2, batch_size=2,
             learning_rate=1e-3, seed=0, words=("device",))
assert done.steps == 2
print([name for name in ("transformers", "torch._dynamo") if name in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    )
    assert done.stdout.strip() == "[]"
