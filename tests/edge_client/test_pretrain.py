"""A base from text: the same seed gives the same bytes, however often it was interrupted."""

from __future__ import annotations

import contextlib
import hashlib
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.numpy import load_file

from device_profiles.errors import InputError
from edge_client.data.instructions import KIT, Dataset, kit_file, load_instructions
from edge_client.pretrain import (
    Recipe,
    checkpoint_step,
    encode_documents,
    learning_rate_at,
    load_recipe,
    pretrain,
    read_corpus,
    train_tokenizer,
)
from edge_client.pretrain_command import pretrain as pretrain_command
from quantization.base_model import load_base
from quantization.identity import identify

ROOT = Path(__file__).parents[2]
SPEECH = "Four score and seven years ago our fathers brought forth a new nation.\n" * 20
FIELDS: dict[str, Any] = {
    "layers": 2,
    "width": 16,
    "heads": 2,
    "positions": 32,
    "vocabulary": 300,
    "kit_passes": 1,
    "text_passes": 2,
    "steps": 5,
    "batch_size": 2,
    "learning_rate": 3e-3,
    "warmup_steps": 2,
    "weight_decay": 0.1,
    "seed": 0,
}


class PulledPlugError(Exception):
    """What ends a run in the middle."""


def recipe(**changes: Any) -> Recipe:
    """Return a recipe that trains in a second."""
    return Recipe(**{**FIELDS, **changes})


def toml(folder: Path, **changes: Any) -> Path:
    """Return the path of a recipe file."""
    path = folder / "recipe.toml"
    path.write_text("".join(f"{k} = {v!r}\n" for k, v in {**FIELDS, **changes}.items()))
    return path


def pass_on(_done: int, _loss: float) -> None:
    """Report nothing."""


def sha256(folder: Path) -> str:
    """Return the hash of a base's weights."""
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The bits depend on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@contextlib.contextmanager
def few_rows() -> Iterator[None]:
    """Let the trainer see a few rows of the kit: measuring on all of them takes seconds."""
    examples = load_instructions(KIT).examples
    train = [e for e in examples if e.split == "train"][:100]
    held_out = [e for e in examples if e.split == "held_out"][:5]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "edge_client.pretrain.load_instructions",
            lambda source: Dataset(source=source, examples=train + held_out),
        )
        yield


@pytest.fixture
def small_kit() -> Iterator[None]:
    """``few_rows`` for one test."""
    with few_rows():
        yield


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Let Ctrl-C do what it does in a terminal, also where the tests run in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text file."""
    path = tmp_path_factory.mktemp("text") / "speech.txt"
    path.write_text(SPEECH)
    return path


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, speech: Path) -> Path:
    """The base of ``recipe()``, made in one go."""
    out = tmp_path_factory.mktemp("undisturbed")
    with few_rows():
        pretrain(recipe(), [speech], out, pass_on)
    return out


def test_what_is_written_is_a_base(undisturbed: Path) -> None:
    identity = identify(str(undisturbed))
    assert (identity.shape.layers, identity.shape.width, identity.shape.inner) == (2, 16, 64)
    assert (identity.vocabulary, identity.positions) == (300, 32)
    # embeddings 300*16 + 32*16; a block: two norms 2*2*16, c_attn 16*48 + 48, c_proj 16*16 + 16,
    # c_fc 16*64 + 64, c_proj 64*16 + 16; the last norm 2*16; the head is tied
    block = 64 + 816 + 272 + 1088 + 1040
    assert identity.parameters == 4800 + 512 + 2 * block + 32
    base = load_base(identity)
    assert base.tokenizer.decode(base.tokenizer("Four score, né.").input_ids) == "Four score, né."
    assert base.end_token == base.tokenizer("<|endoftext|>").input_ids[0]


def test_nothing_but_the_base_is_left(undisturbed: Path) -> None:
    assert {path.name for path in undisturbed.iterdir()} >= {"config.json", "tokenizer.json"}
    assert not (undisturbed / "unfinished").exists()


def test_weights_are_rounded_to_half_precision(undisturbed: Path) -> None:
    tensors = load_file(undisturbed / "model.safetensors")
    assert {str(tensor.dtype) for tensor in tensors.values()} == {"float16"}


def test_figures_say_what_was_trained_on_what(undisturbed: Path) -> None:
    figures = json.loads((undisturbed / "training.json").read_text())
    assert figures["recipe"] == FIELDS
    assert figures["tokens_seen"] == 5 * 2 * 32
    assert figures["parameters"] == identify(str(undisturbed)).parameters
    names = {source["name"]: source["sha256"] for source in figures["corpus"]}
    assert names["speech.txt"] == hashlib.sha256(SPEECH.encode()).hexdigest()
    assert set(names) == {"kit, training part", "speech.txt"}
    # 300 tokens guessed blindly cost ln 300 = 5.7 nats; five steps leave it near that
    assert 4.5 < figures["held_out_loss"] < 5.8
    assert 0 <= figures["held_out_accuracy"] < 0.5


@pytest.mark.usefixtures("small_kit")
def test_training_lowers_the_loss(tmp_path: Path, speech: Path) -> None:
    losses: list[float] = []
    pretrain(
        recipe(kit_passes=0, steps=40, learning_rate=1e-2),
        [speech],
        tmp_path,
        lambda _done, loss: losses.append(loss),
    )
    # the text is one sentence again and again
    assert losses[-1] < losses[0] - 1


@pytest.mark.usefixtures("small_kit")
def test_same_seed_gives_the_same_bytes(undisturbed: Path, tmp_path: Path, speech: Path) -> None:
    pretrain(recipe(), [speech], tmp_path / "again", pass_on)
    pretrain(recipe(seed=1), [speech], tmp_path / "other", pass_on)
    assert sha256(tmp_path / "again") == sha256(undisturbed)
    assert sha256(tmp_path / "other") != sha256(undisturbed)


@pytest.mark.usefixtures("small_kit")
def test_interrupted_and_continued_gives_the_bytes_of_an_undisturbed_run(
    undisturbed: Path, tmp_path: Path, speech: Path
) -> None:
    def pull_plug(done: int, _loss: float) -> None:
        if done == 4:
            raise PulledPlugError

    with pytest.raises(PulledPlugError):
        pretrain(recipe(), [speech], tmp_path, pull_plug, checkpoint_steps=3)
    assert not (tmp_path / "model.safetensors").exists()
    assert checkpoint_step(tmp_path) == 3
    steps: list[int] = []
    pretrain(recipe(), [speech], tmp_path, lambda done, _loss: steps.append(done))
    assert steps == [4, 5]
    assert sha256(tmp_path) == sha256(undisturbed)
    assert not (tmp_path / "unfinished").exists()
    assert checkpoint_step(tmp_path) == 0


@pytest.mark.usefixtures("small_kit")
@pytest.mark.parametrize("changes", [{"seed": 1}, {"learning_rate": 1e-3}, {"text_passes": 1}])
def test_checkpoint_of_another_recipe_is_refused(
    tmp_path: Path, speech: Path, changes: dict[str, Any]
) -> None:
    def pull_plug(done: int, _loss: float) -> None:
        if done == 2:
            raise PulledPlugError

    with pytest.raises(PulledPlugError):
        pretrain(recipe(), [speech], tmp_path, pull_plug, checkpoint_steps=1)
    before = (tmp_path / "unfinished" / "state.safetensors").read_bytes()
    with pytest.raises(InputError, match="another recipe or other texts"):
        pretrain(recipe(**changes), [speech], tmp_path, pass_on)
    assert (tmp_path / "unfinished" / "state.safetensors").read_bytes() == before


def test_damaged_checkpoint_is_refused(tmp_path: Path, speech: Path) -> None:
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "state.safetensors").write_bytes(b"half a")
    with pytest.raises(InputError, match="damaged; remove it"):
        pretrain(recipe(), [speech], tmp_path, pass_on)


def test_folder_that_holds_a_base_is_refused(undisturbed: Path, speech: Path) -> None:
    before = sha256(undisturbed)
    with pytest.raises(InputError, match=r"already holds a model\.safetensors; give another --out"):
        pretrain(recipe(seed=1), [speech], undisturbed, pass_on)
    assert sha256(undisturbed) == before


def kit_rows(split: str) -> list[str]:
    """Return the prose of one part of the kit, read without the project's reader."""
    rows = [json.loads(line) for line in kit_file("instructions.jsonl").read_text().splitlines()]
    return [
        "\n".join(row[k] for k in ("instruction", "input", "output") if row[k])
        for row in rows
        if row["split"] == split
    ]


def test_held_out_part_of_the_kit_never_enters_the_corpus(speech: Path) -> None:
    corpus = read_corpus(recipe(kit_passes=3), [speech])
    train, held_out = kit_rows("train"), kit_rows("held_out")
    assert sorted(corpus.documents) == sorted(3 * train + 2 * [SPEECH])
    assert sorted(corpus.held_out) == sorted(held_out)
    together = "\n\n".join(corpus.documents)
    assert not [document for document in held_out if document in together]


def test_text_is_in_the_corpus_as_often_as_the_recipe_says(speech: Path) -> None:
    corpus = read_corpus(recipe(kit_passes=0, text_passes=3), [speech, speech])
    assert corpus.documents == 6 * [SPEECH]
    assert [source["name"] for source in corpus.sources] == ["speech.txt", "speech.txt"]


def test_documents_are_encoded_one_after_the_other_each_with_its_end(speech: Path) -> None:
    tokenizer = train_tokenizer(read_corpus(recipe(), [speech]), 300)
    tokens = encode_documents(tokenizer, ["a fox", "no", "a fox"])
    end = tokenizer.eos_token
    assert tokenizer.decode(tokens) == f"a fox{end}no{end}a fox{end}"


@pytest.mark.parametrize(
    ("step", "rate"),
    [
        # a warm-up of 4 steps to 0.01, then a cosine over 8 steps down to 0.001
        (0, 0.0025),
        (1, 0.005),
        (3, 0.01),
        (4, 0.01),  # 0.55 + 0.45 * cos 0
        (8, 0.0055),  # cos(pi / 2) = 0
        (10, 0.01 * (0.55 - 0.45 * 0.5**0.5)),  # cos(3 pi / 4)
        (12, 0.001),  # where it would end
    ],
)
def test_learning_rate_warms_up_and_falls_to_a_tenth(step: int, rate: float) -> None:
    chosen = recipe(learning_rate=0.01, warmup_steps=4, steps=12)
    assert learning_rate_at(step, chosen) == pytest.approx(rate, rel=1e-12)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"heads": 3}, "width 16 is no multiple of heads 3"),
        ({"vocabulary": 256}, r"vocabulary = 256: .* greater than or equal to 300"),
        ({"steps": 0}, "steps = 0: "),
        ({"lerning_rate": 0.1}, "unknown key 'lerning_rate'; did you mean 'learning_rate'"),
    ],
)
def test_bad_recipe_is_told_by_field_and_value(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        load_recipe(toml(tmp_path, **changes))


def test_recipe_file_holds_what_is_written_in_it(tmp_path: Path) -> None:
    assert load_recipe(toml(tmp_path, steps=7)) == recipe(steps=7)


def test_bundled_recipe_is_sound() -> None:
    assert load_recipe(ROOT / "quantization" / "bases" / "mini.toml").layers == 12


@pytest.mark.parametrize("changes", [{"kit_passes": 0}, {"kit_passes": 0, "text_passes": 0}])
def test_recipe_that_leaves_nothing_to_train_on_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="the corpus is empty"):
        read_corpus(recipe(**changes), [])


def test_corpus_shorter_than_a_window_is_refused(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("Hi.")
    with pytest.raises(InputError, match="one window is 32"):
        pretrain(recipe(kit_passes=0), [tmp_path / "short.txt"], tmp_path / "out", pass_on)


@pytest.mark.parametrize("content", [None, b"caf\xe9 noir"])
def test_unreadable_text_is_refused_by_name(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "latin.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"latin\.txt cannot be read as UTF-8"):
        read_corpus(recipe(), [path])


def command(*arguments: str | Path) -> Result:
    """Return what `pwff pretrain` gives; its exit code is the return value."""
    runner = CliRunner(env={"COLUMNS": "200"})
    given = [*map(str, arguments), "--threads", "1"]
    return runner.invoke(pretrain_command, given, standalone_mode=False)


@pytest.mark.usefixtures("small_kit")
def test_command_makes_the_base_and_names_it(
    undisturbed: Path, tmp_path: Path, speech: Path
) -> None:
    out = tmp_path / "base"
    result = command(toml(tmp_path), "--text", speech, "--out", out)
    assert result.exception is None
    assert result.return_value == 0
    assert sha256(out) == sha256(undisturbed)
    figures = json.loads((undisturbed / "training.json").read_text())
    loss, accuracy = figures["held_out_loss"], 100 * figures["held_out_accuracy"]
    words = f"held-out loss {loss:.4f} nats a token, accuracy {accuracy:.1f}%, "
    assert words in result.stdout
    assert f"Base: {out} " in result.stdout
    again = command(toml(tmp_path), "--text", speech, "--out", out).exception
    assert isinstance(again, InputError)
    assert "already holds a model.safetensors" in str(again)


@pytest.mark.usefixtures("small_kit", "ctrl_c")
def test_ctrl_c_keeps_the_last_checkpoint_and_the_same_call_goes_on_from_it(
    tmp_path: Path, speech: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def press_ctrl_c(step: int, recipe: Recipe) -> float:
        if step == 230:
            signal.raise_signal(signal.SIGINT)
        return learning_rate_at(step, recipe)

    arguments = [toml(tmp_path, steps=250, batch_size=1), "--text", speech, "--out", tmp_path / "o"]
    with monkeypatch.context() as patch:
        patch.setattr("edge_client.pretrain.learning_rate_at", press_ctrl_c)
        result = command(*arguments)
    assert result.return_value == 130
    assert "interrupted; called again, it goes on from step 200" in result.stderr
    lines = result.stdout.splitlines()
    assert [line.partition(",")[0] for line in lines] == ["100 of 250 steps", "200 of 250 steps"]
    assert all(line.endswith(" left") for line in lines)
    assert not (tmp_path / "o" / "model.safetensors").exists()
    result = command(*arguments)
    assert result.return_value == 0
    assert "going on from step 200 of 250" in result.stdout
    assert json.loads((tmp_path / "o" / "training.json").read_text())["steps"] == 250


@pytest.mark.usefixtures("small_kit", "ctrl_c")
def test_ctrl_c_before_the_first_checkpoint_says_that_it_begins_anew(
    tmp_path: Path, speech: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def press_ctrl_c(_step: int, _recipe: Recipe) -> float:
        signal.raise_signal(signal.SIGINT)
        return 0.0

    monkeypatch.setattr("edge_client.pretrain.learning_rate_at", press_ctrl_c)
    result = command(toml(tmp_path), "--text", speech, "--out", tmp_path / "o")
    assert result.return_value == 130
    assert "called again, it begins anew (no checkpoint yet)" in result.stderr


def test_command_tells_bad_input_with_its_exit_code(tmp_path: Path) -> None:
    error = command(tmp_path / "none.toml", "--out", tmp_path / "base").exception
    assert getattr(error, "exit_code", None) == 2
    assert "none.toml" in str(error)


def test_command_without_torch_says_what_to_install(tmp_path: Path) -> None:
    script = """
import sys
class Without:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Without())
import pwff
pwff.main()
"""
    done = subprocess.run(
        [sys.executable, "-c", script, "pretrain", "recipe.toml", "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 1
    assert done.stderr == (
        "error: pretrain needs torch, which is not installed: `pip install 'pwff[edge]'`\n"
    )
