"""Where prompts come from, and in which order they are asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from device_profiles.errors import InputError
from device_profiles.methods import OBJECTIVES
from edge_client.data.preferences import load_preferences
from edge_client.data.prompt_files import Prompt, load_prompts


def write(folder: Path, text: str, name: str) -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def asked(source: str, seed: int = 0) -> list[str]:
    return [prompt.instruction for prompt in load_prompts(source, "helpfulness", seed).prompts]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_kit_gives_the_prompts_of_its_pairs_with_their_split(objective: str) -> None:
    read = load_prompts("kit", objective, 0)
    pairs = load_preferences("kit", objective).pairs
    assert {(p.instruction, p.split) for p in read.prompts} == {
        (pair.instruction, pair.split) for pair in pairs
    }
    assert (len(read.prompts), read.broken) == (440, [])


def test_a_text_file_has_a_prompt_on_each_line_that_is_not_empty(tmp_path: Path) -> None:
    source = write(tmp_path, "Name a river.\r\n\n  [Name] a lake. \n{x", "prompts.txt")
    assert sorted(asked(source)) == ["Name a river.", "[Name] a lake.", "{x"]


@pytest.mark.parametrize("listed", [True, False])
def test_rows_need_an_instruction_alone_and_broken_ones_are_listed(
    tmp_path: Path, listed: bool
) -> None:
    rows = [
        {"instruction": "a", "output": "x", "category": "c"},
        {"instruction": "b", "input": "of it", "split": "held_out"},
        {"output": "x"},
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    text = json.dumps(rows) if listed else lines
    read = load_prompts(write(tmp_path, text, "rows.json" + "l" * (not listed)), "helpfulness", 0)
    assert sorted(read.prompts, key=lambda prompt: prompt.instruction) == [
        Prompt(instruction="a"),
        Prompt(instruction="b", input="of it", split="held_out"),
    ]
    assert read.broken == [(3, "instruction: Field required")]


def test_a_prompt_comes_once_whatever_its_case_and_spacing(tmp_path: Path) -> None:
    assert asked(write(tmp_path, "Name it.\nname  IT.\nName it.\n", "p.txt")) == ["Name it."]


def test_the_order_belongs_to_the_seed(tmp_path: Path) -> None:
    source = write(tmp_path, "\n".join(map(str, range(50))), "p.txt")
    assert asked(source, 1) == asked(source, 1)
    assert asked(source, 1) != asked(source, 2)
    assert sorted(asked(source, 1)) == sorted(asked(source, 2))


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("p.txt", "\n", "holds no row"),
        ("p.jsonl", '{"output": "x"}\n', "1 of 1 rows are broken.*line 1: instruction"),
        ("p.json", "[", "no valid JSON"),
    ],
)
def test_a_file_without_prompts_is_refused(
    tmp_path: Path, name: str, text: str, words: str
) -> None:
    with pytest.raises(InputError, match=words):
        asked(write(tmp_path, text, name))


@pytest.mark.parametrize("name", ["nowhere.txt", "nowhere.jsonl"])
def test_a_file_that_is_not_there_is_told_with_the_choices(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=rf"{name}: No such file.*'kit'"):
        asked(str(tmp_path / name))
