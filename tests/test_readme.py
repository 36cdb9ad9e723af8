"""What the documents say is true of the project as it is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pwff import COMMANDS, command

ROOT = Path(__file__).parents[1]
DOCUMENTS = ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "docs/results.md"]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_file_that_a_document_links_to_exists(name: str) -> None:
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", (ROOT / name).read_text())
    missing = [link for link in links if not (ROOT / name).parent.joinpath(link).exists()]
    assert not missing


def test_every_command_that_a_document_names_exists() -> None:
    text = "\n".join((ROOT / name).read_text() for name in DOCUMENTS)
    named = set(re.findall(r"(?:^ *|`)pwff ([a-z]+)", text, flags=re.MULTILINE))
    assert named
    assert named <= set(COMMANDS)


def test_every_option_that_a_document_gives_emulate_exists() -> None:
    text = "\n".join((ROOT / name).read_text() for name in DOCUMENTS)
    emulate = command.get_command(None, "emulate")  # type: ignore[arg-type]
    assert emulate is not None
    known = {option for parameter in emulate.params for option in parameter.opts}
    given = {
        option
        for line in re.findall(r"pwff emulate[^\n`|#]*", text)
        for option in re.findall(r"--[a-z-]+", line)
    }
    assert given
    assert given <= known | {"--help"}


def test_every_make_target_that_a_document_names_exists() -> None:
    targets = set(re.findall(r"(?m)^([a-z-]+):", (ROOT / "Makefile").read_text()))
    text = "\n".join((ROOT / name).read_text() for name in DOCUMENTS)
    named = set(re.findall(r"(?:^ *|`)make ([a-z-]+)", text, flags=re.MULTILINE))
    assert "demo" in named
    assert named <= targets


def test_the_architecture_fits_on_a_few_screens() -> None:
    assert len((ROOT / "ARCHITECTURE.md").read_text().splitlines()) <= 150
