"""A chat's memory and commands."""

from __future__ import annotations

import pytest

from device_profiles.errors import InputError
from edge_client.data.prompts import prompt
from edge_client.inference.chat import COMMANDS, Chat, ChatSettings
from edge_client.inference.generation import Speaker
from tests.edge_client.inference.conftest import Parrot


def said_to(speaker: Speaker) -> list[str]:
    """Return the prompts that a parrot heard."""
    assert isinstance(speaker.model, Parrot)
    return [speaker.tokenizer.decode(tokens) for tokens in speaker.model.heard]


def ask(chat: Chat, *questions: str) -> None:
    for question in questions:
        chat.ask(question, lambda _piece: None)


def test_a_question_is_asked_alone_in_the_template_of_training(parrot: Speaker) -> None:
    ask(Chat(parrot, ChatSettings()), "One?", "Two?")
    assert said_to(parrot) == [prompt("One?"), prompt("Two?")]


def test_with_history_the_last_turns_stand_before_it(parrot: Speaker) -> None:
    ask(Chat(parrot, ChatSettings(history=1)), "One?", "Two?", "Three?")
    assert said_to(parrot)[2] == prompt("Two?") + "yes\n\n" + prompt("Three?")


def test_reset_forgets_the_turns(parrot: Speaker) -> None:
    chat = Chat(parrot, ChatSettings(history=5))
    ask(chat, "One?")
    chat.command("/reset")
    ask(chat, "Two?")
    assert said_to(parrot)[1] == prompt("Two?")


def test_set_changes_one_setting_and_says_so(parrot: Speaker) -> None:
    chat = Chat(parrot, ChatSettings())
    assert chat.command("/set temperature 0.25") == "temperature 0.25"
    assert chat.command("/set max-tokens 7") == "max_tokens 7"
    assert chat.settings == ChatSettings(temperature=0.25, max_tokens=7)


def test_set_alone_shows_every_setting(parrot: Speaker) -> None:
    shown = Chat(parrot, ChatSettings(top_k=3)).command("/set")
    assert "top_k 3" in shown
    assert all(name in shown for name in ChatSettings.model_fields)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/set temperature -1", "temperature = '-1'"),
        ("/set temperatur 1", "did you mean 'temperature'"),
        ("/set temperature", "/set temperature 0.7"),
        ("/quid", "did you mean '/quit'"),
    ],
)
def test_a_mistake_is_told_and_changes_nothing(parrot: Speaker, line: str, words: str) -> None:
    chat = Chat(parrot, ChatSettings())
    with pytest.raises(InputError, match=words):
        chat.command(line)
    assert chat.settings == ChatSettings()
    assert not chat.over


def test_quit_ends_it_and_help_names_every_command(parrot: Speaker) -> None:
    chat = Chat(parrot, ChatSettings())
    assert all(command in chat.command("/help") for command in COMMANDS)
    assert not chat.over
    chat.command("/quit")
    assert chat.over
