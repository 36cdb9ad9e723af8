"""A chat's memory and its commands, without a terminal.

By default a question is asked alone: the models here are tuned on single turns, and what was said
before only confuses them. ``/set history 2`` puts the last two turns before a question anyway.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import Field

from device_profiles.config_files import check, nearest
from device_profiles.errors import InputError
from edge_client.data.prompts import prompt
from edge_client.inference.generation import Answer, Speaker, answer
from edge_client.inference.sampling import Sampling

COMMANDS = {
    "/help": "this list",
    "/set": "/set temperature 0.7 changes a setting; /set alone shows them all",
    "/reset": "forget the turns so far, and begin the draws anew",
    "/quit": "leave (so do Ctrl-D, and Ctrl-C at the prompt)",
}


class ChatSettings(Sampling):
    """How answers are drawn, and how many earlier turns stand before a question."""

    history: Annotated[int, Field(ge=0, le=100)] = 0


class Chat:
    """One conversation.

    Attributes:
        settings: Changed by ``/set``.
        over: Whether ``/quit`` was said.
    """

    def __init__(self, speaker: Speaker, settings: ChatSettings) -> None:
        self.settings = settings
        self.over = False
        self._speaker = speaker
        self._turns: list[tuple[str, str]] = []
        self._asked = 0

    def command(self, line: str) -> str:
        """Do what a line that begins with ``/`` says, and return what to show.

        Raises:
            InputError: If the command, the setting or its value is not known.
        """
        name, *words = line.split()
        if name not in COMMANDS:
            raise InputError(
                f"unknown command '{name}'{nearest(name, COMMANDS)} (/help lists them; a question "
                "does not begin with /)"
            )
        if name == "/quit":
            self.over = True
        elif name == "/reset":
            self._turns, self._asked = [], 0
            return "forgotten"
        elif name == "/set":
            return self._set(words)
        else:
            return "\n".join(f"{command:8} {text}" for command, text in COMMANDS.items())
        return ""

    def _set(self, words: list[str]) -> str:
        values: dict[str, Any] = self.settings.model_dump()
        if words:
            if len(words) != 2:
                raise InputError("/set takes a setting and its value: /set temperature 0.7")
            key = words[0].replace("-", "_")
            self.settings = check(ChatSettings, {**values, key: words[1]}, "/set")
            values = {key: getattr(self.settings, key)}
        return ", ".join(f"{key} {value}" for key, value in values.items())

    def ask(self, question: str, show: Callable[[str], None]) -> Answer:
        """Return the answer to a question; Ctrl-C ends it early.

        Raises:
            InputError: If question and history leave no room for an answer.
        """
        history = self._turns[-self.settings.history :] if self.settings.history else []
        before = "".join(f"{prompt(q)}{a}\n\n" for q, a in history)
        sampling = Sampling(**self.settings.model_dump(exclude={"history"}))
        words = ("chat", self._asked)
        given = answer(self._speaker, before + prompt(question), sampling, words=words, show=show)
        self._asked += 1
        self._turns.append((question, given.text))
        return given
