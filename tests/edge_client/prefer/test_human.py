"""The page on the terminal: what it shows, which keys it takes, from a terminal and from a pipe."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
from rich.console import Console

from edge_client.data.prompt_files import Prompt
from edge_client.prefer.human import person, show
from edge_client.prefer.ranking import Question
from tests.edge_client.prefer.conftest import a_question


def shown(question: Question) -> str:
    page = io.StringIO()
    show(Console(file=page, width=60), question)
    return page.getvalue()


def keys(typed: str) -> Callable[[], str]:
    """Return a keyboard at which these keys are pressed, and then its end."""
    pressed = iter(typed)

    def read() -> str:
        for key in pressed:
            return key
        raise EOFError

    return read


def test_a_page_holds_the_prompt_both_responses_and_the_question() -> None:
    page = shown(a_question("It [bold]boils[/bold].", "No.", number=3))
    places = [page.index(t) for t in ("3 of 9", "kettle", "It [bold]boils[/bold].", "No.", "helps")]
    assert places == sorted(places)
    assert "less harm" in shown(a_question(objective="harmlessness"))
    asked = a_question(prompt=Prompt(instruction="Sum up.", input="A tale."))
    assert "A tale." in shown(asked)


def test_long_responses_are_whole() -> None:
    page = shown(a_question(" ".join(f"w{i}" for i in range(500))))
    assert all(f"w{i}" in page for i in range(500))


def test_a_response_cannot_steer_the_terminal() -> None:
    page = shown(a_question("a\x1b[2Jb\x07c\rd\u202ee\tf\ng", "\x9b31mred"))
    assert not set(page) & {"\x1b", "\x07", "\r", "\u202e", "\x9b", "\t"}
    assert "a\ufffd[2Jb\ufffdc\ufffdd\ufffde f" in page


@pytest.mark.parametrize(
    ("typed", "verdict"),
    [
        ("1", "first"),
        ("2", "second"),
        ("s", "passed"),
        ("q", "quit"),
        ("Q", "quit"),
        ("x3 2", "second"),
        ("", "quit"),
        ("xy", "quit"),
    ],
)
def test_only_the_keys_of_the_hint_are_a_verdict_and_the_end_quits(
    typed: str, verdict: str
) -> None:
    assert person(Console(file=io.StringIO()), keys(typed))(a_question()) == verdict


def test_ctrl_c_at_the_page_is_passed_on() -> None:
    def read() -> str:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        person(Console(file=io.StringIO()), read)(a_question())
