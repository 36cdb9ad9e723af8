"""The commands ``generate`` and ``chat``, as a person calls them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from device_profiles.errors import InputError
from edge_client.data.prompts import prompt
from edge_client.inference.generation import Speaker
from edge_client.talk_command import chat, generate
from tests.edge_client.inference.conftest import Parrot, a_speaker


@pytest.fixture
def speaker(monkeypatch: pytest.MonkeyPatch) -> Speaker:
    """Let a parrot answer instead of a model in a folder."""
    made = a_speaker("the \u00e4ther")
    monkeypatch.setattr("edge_client.talk_command.open_speaker", lambda *_, **__: made)
    return made


def call(command: click.Command, *arguments: str, said: str = "") -> Result:
    return CliRunner().invoke(
        command, list(arguments), input=said, standalone_mode=False, catch_exceptions=False
    )


def heard(speaker: Speaker) -> list[str]:
    assert isinstance(speaker.model, Parrot)
    return [speaker.tokenizer.decode(tokens) for tokens in speaker.model.heard]


def test_generate_puts_the_instruction_into_the_template(speaker: Speaker) -> None:
    done = call(generate, "M", "--prompt", "Say it. ", "--input", "In green.")
    assert (done.return_value, done.stdout) == (0, "the \u00e4ther\n")
    assert heard(speaker) == [prompt("Say it.", "In green.")]


def test_generate_reads_the_instruction_from_a_file(speaker: Speaker, tmp_path: Path) -> None:
    path = tmp_path / "asked.txt"
    path.write_text("Say it\nin two lines.\n", encoding="utf-8")
    call(generate, "M", "--file", str(path))
    assert heard(speaker) == [prompt("Say it\nin two lines.")]


def test_generate_as_json_is_one_object(speaker: Speaker) -> None:
    done = call(generate, "M", "--prompt", "Say it.", "--json", "--temperature", "0", "--seed", "3")
    given: dict[str, Any] = json.loads(done.stdout)
    assert (given["text"], given["tokens"], given["stopped"]) == ("the \u00e4ther", 10, "end")
    assert (given["runtime"], given["sampling"]["seed"]) == ("parrot", 3)
    assert heard(speaker)


def test_generate_says_that_an_answer_was_cut(speaker: Speaker) -> None:
    done = call(generate, "M", "--prompt", "Say it.", "--max-tokens", "3")
    assert done.stdout == "the [the answer is longer: --max-tokens]\n"
    assert heard(speaker)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--prompt TEXT or by --file FILE"),
        (["--prompt", "a", "--file", "b"], "--prompt TEXT or by --file FILE"),
        (["--prompt", " "], "empty"),
        (["--file", "nowhere.txt"], "nowhere.txt"),
        (["--prompt", "a", "--temperature", "-1"], "temperature = -1"),
        (["--prompt", "a", "--top-p", "2"], "top_p = 2"),
    ],
)
def test_a_mistake_is_told_before_a_model_is_opened(arguments: list[str], words: str) -> None:
    with pytest.raises(InputError, match=words):
        call(generate, "./nowhere", *arguments)


def test_ctrl_c_keeps_what_was_generated_and_ends_with_130(
    speaker: Speaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    feed = speaker.model.feed

    def interrupted(tokens: list[int]) -> Any:
        if isinstance(speaker.model, Parrot) and len(speaker.model.fed) == 3:
            raise KeyboardInterrupt
        return feed(tokens)

    monkeypatch.setattr(speaker.model, "feed", interrupted)
    done = call(generate, "M", "--prompt", "Say it.")
    assert (done.return_value, done.stdout) == (130, "the [interrupted]\n")


def test_a_chat_answers_obeys_and_ends(speaker: Speaker) -> None:
    said = "One?\n/set max_tokens 3\n\nTwo?\n/nonsense\n/quit\nThree?\n"
    done = call(chat, "M", said=said)
    assert done.return_value == 0
    assert "tuned on single turns" in done.stdout
    assert heard(speaker) == [prompt("One?"), prompt("Two?")]
    assert "the \u00e4ther\n" in done.stdout
    assert "the [the answer is longer" in done.stdout
    assert "unknown command '/nonsense'" in done.stderr


def test_the_end_of_the_input_ends_a_chat(speaker: Speaker) -> None:
    assert call(chat, "M", said="One?\n").return_value == 0
    assert heard(speaker) == [prompt("One?")]


def test_ctrl_c_ends_an_answer_and_not_the_chat_and_at_the_prompt_the_chat(
    speaker: Speaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = iter(["One?", "Two?", KeyboardInterrupt()])
    feed, calls = speaker.model.feed, iter(range(100))

    def once(tokens: list[int]) -> Any:
        if next(calls) == 2:
            raise KeyboardInterrupt
        return feed(tokens)

    def read(_prompt: str) -> str:
        line = next(lines)
        if isinstance(line, KeyboardInterrupt):
            raise line
        return line

    monkeypatch.setattr(speaker.model, "feed", once)
    monkeypatch.setattr("builtins.input", read)
    done = call(chat, "M")
    assert done.return_value == 130
    assert "th [interrupted]\n" in done.stdout
    assert heard(speaker) == [prompt("One?"), prompt("Two?")]
    assert "the \u00e4ther\n" in done.stdout
