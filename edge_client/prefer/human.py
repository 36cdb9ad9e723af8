"""The person as judge: a page on the terminal with two responses, answered by one key."""

from __future__ import annotations

import sys
from collections.abc import Callable

import click
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from edge_client.prefer.ranking import Question, Ranker, Verdict

QUESTIONS = {
    "helpfulness": "Which response helps more?",
    "harmlessness": "Which response does less harm?",
}
KEYS: dict[str, Verdict] = {"1": "first", "2": "second", "s": "passed", "q": "quit"}
_HINT = "1 the first  2 the second  s skip  q quit"
_SHOWN_AS = "\ufffd"


def read_key() -> str:
    """Return the next key, without Enter on a terminal; elsewhere a line's first character.

    What was typed before the terminal was asked is not taken for an answer.

    Raises:
        EOFError: At the end of the input.
        KeyboardInterrupt: At Ctrl-C.
    """
    if sys.stdin.isatty():
        return click.getchar()
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.strip()[:1]


def person(console: Console, read: Callable[[], str] = read_key) -> Ranker:
    """Return the person at the terminal as a judge; the end of the input quits."""

    def rank(question: Question) -> Verdict:
        show(console, question)
        while True:
            console.print(_HINT, style="dim")
            try:
                key = read().lower()
            except EOFError:
                return "quit"
            if key in KEYS:
                return KEYS[key]

    return rank


def show(console: Console, question: Question) -> None:
    """Print the page of one question; on a terminal it takes the place of the one before."""
    if console.is_terminal:
        console.clear()
    asked = question.prompt.instruction
    if question.prompt.input.strip():
        asked = f"{asked}\n\n{question.prompt.input}"
    title = f"{question.number} of {question.total}"
    for name, text in ((title, asked), ("1", question.first), ("2", question.second)):
        console.print(Panel(Text(_visible(text)), title=name, title_align="left"))
    console.print(QUESTIONS[question.objective], style="bold")


def _visible(text: str) -> str:
    """Return a text without characters that would steer the terminal."""
    return "".join(
        c if c.isprintable() or c == "\n" else " " if c == "\t" else _SHOWN_AS for c in text
    )
