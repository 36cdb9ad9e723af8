"""Reading instruction data: formats, broken rows, the kit's quality, the hub's absence."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest

from device_profiles.errors import InputError
from edge_client.data.instructions import Example, kit_file, load_instructions
from quantization.errors import HubUnavailableError, MissingExtraError

GOOD = {"instruction": "Name a river.", "input": "", "output": "The Severn."}
PREFERENCES = ("helpfulness_preferences.jsonl", "harmlessness_preferences.jsonl")


def write(folder: Path, text: str, name: str = "data.jsonl") -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def lines(rows: Sequence[object]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def kit_rows(name: str) -> list[dict[str, str]]:
    text = kit_file(name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def trigrams(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + 3]) for i in range(len(words) - 2)}


def near_duplicate_rate(texts: Sequence[str]) -> float:
    """Return the share of texts with another whose trigrams have a Jaccard index >= 0.5."""
    sets = [trigrams(text) for text in texts]
    shared: Counter[tuple[int, int]] = Counter()
    holders: defaultdict[tuple[str, ...], list[int]] = defaultdict(list)
    for i, own in enumerate(sets):
        for trigram in own:
            shared.update((j, i) for j in holders[trigram])
            holders[trigram].append(i)
    near = {
        i
        for pair, count in shared.items()
        if count >= 0.5 * len(sets[pair[0]] | sets[pair[1]])
        for i in pair
    }
    return len(near) / len(texts)


def test_json_and_jsonl_hold_the_same_examples(tmp_path: Path) -> None:
    rows = [GOOD, {**GOOD, "input": "in Wales", "category": "facts", "split": "held_out"}]
    as_lines = load_instructions(write(tmp_path, lines(rows)))
    as_list = load_instructions(write(tmp_path, json.dumps(rows, indent=2), "data.json"))
    assert as_lines.examples == as_list.examples
    assert as_lines.examples[1] == Example(
        instruction="Name a river.",
        input="in Wales",
        output="The Severn.",
        category="facts",
        split="held_out",
    )
    assert as_lines.sha256 == as_list.sha256
    assert as_lines.broken == []


def test_input_may_be_left_out_and_unknown_fields_are_ignored(tmp_path: Path) -> None:
    source = write(tmp_path, lines([{"instruction": "Go.", "output": "Gone.", "text": "whole"}]))
    assert load_instructions(source).examples == [Example(instruction="Go.", output="Gone.")]


def test_the_hash_depends_on_content_and_order(tmp_path: Path) -> None:
    other = {**GOOD, "output": "The Taff."}
    hashes = {
        load_instructions(write(tmp_path, lines(rows))).sha256
        for rows in ([GOOD, other], [other, GOOD], [GOOD, GOOD])
    }
    assert len(hashes) == 3


def test_a_byte_order_mark_breaks_nothing(tmp_path: Path) -> None:
    for text in (lines([GOOD]), json.dumps([GOOD])):
        data = load_instructions(write(tmp_path, "\ufeff" + text))
        assert len(data.examples) == 1
        assert data.broken == []


def test_a_unicode_line_separator_inside_a_text_ends_no_line(tmp_path: Path) -> None:
    row = {**GOOD, "output": "one\u2028two"}
    data = load_instructions(write(tmp_path, json.dumps(row, ensure_ascii=False)))
    assert data.examples[0].output == "one\u2028two"


def test_broken_rows_are_reported_with_their_line_and_skipped(tmp_path: Path) -> None:
    text = (
        lines([GOOD])
        + "\n"  # line 2 is empty and counts
        + '{"instruction": "half a r\n'
        + lines([{"instruction": "Name a lake."}, GOOD, {**GOOD, "output": " "}])
    )
    data = load_instructions(write(tmp_path, text))
    assert data.examples == [Example.model_validate(GOOD)] * 2
    assert [line for line, _ in data.broken] == [3, 4, 6]
    reasons = [reason for _, reason in data.broken]
    assert reasons[0].startswith("no valid JSON: Unterminated string")
    assert reasons[1] == "output: Field required"
    assert reasons[2].startswith("output: ")


def test_a_broken_row_of_a_list_is_reported_with_its_place(tmp_path: Path) -> None:
    text = json.dumps([GOOD, "a string", {**GOOD, "split": "test"}, {**GOOD, "output": 5}])
    data = load_instructions(write(tmp_path, text))
    assert len(data.examples) == 1
    assert [row for row, _ in data.broken] == [2, 3, 4]
    assert data.broken[1][1] == "split: Input should be 'train' or 'held_out'"


@pytest.mark.parametrize("nested", ["[", '{"instruction":'])
def test_absurd_nesting_is_a_broken_row_and_no_crash(tmp_path: Path, nested: str) -> None:
    data = load_instructions(write(tmp_path, lines([GOOD]) + nested * 100_000))
    assert [line for line, _ in data.broken] == [2]
    with pytest.raises(InputError, match="no valid JSON"):
        load_instructions(write(tmp_path, nested * 100_000))


def test_one_row_in_twenty_may_be_broken_and_not_more(tmp_path: Path) -> None:
    # 5 % of 100 rows are 5.
    bad = {"instruction": "Name a lake."}
    data = load_instructions(write(tmp_path, lines([GOOD] * 95 + [bad] * 5)))
    assert (len(data.examples), len(data.broken)) == (95, 5)
    with pytest.raises(
        InputError,
        match=r"6 of 100 rows are broken, .*first: line 95: output: Field required.*mend",
    ):
        load_instructions(write(tmp_path, lines([GOOD] * 94 + [bad] * 6)))
    with pytest.raises(InputError, match=r"6 of 100 rows are broken, .*first: row 95: output"):
        load_instructions(write(tmp_path, json.dumps([GOOD] * 94 + [bad] * 6)))


def test_a_file_of_broken_rows_only_is_refused_and_told_the_format(tmp_path: Path) -> None:
    source = write(tmp_path, json.dumps({"data": [GOOD]}, indent=1))
    with pytest.raises(InputError, match=r"line 1: no valid JSON.* JSON list of objects, or JSONL"):
        load_instructions(source)


@pytest.mark.parametrize("text", ["", "\n\n", "[]"])
def test_an_empty_file_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(InputError, match="holds no row; give at least one example"):
        load_instructions(write(tmp_path, text))


def test_a_list_that_is_no_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data\.json is no valid JSON: .*line 1 column"):
        load_instructions(write(tmp_path, '[{"instruction": "a"', "data.json"))


@pytest.mark.parametrize("name", ["missing.jsonl", ""])
def test_a_file_that_cannot_be_read_is_named_with_the_choices(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    with pytest.raises(InputError, match=rf"{re.escape(str(path))}: .*'kit' or 'alpaca'"):
        load_instructions(str(path))


def test_the_home_of_an_unknown_user_is_bad_input() -> None:
    with pytest.raises(InputError, match="data file ~nobody-of-this-name"):
        load_instructions("~nobody-of-this-name/data.json")


def test_a_file_in_another_encoding_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "latin.jsonl"
    path.write_bytes('{"instruction": "café"'.encode("latin-1"))
    # {"instruction": "caf is 20 bytes long.
    with pytest.raises(InputError, match=r"not UTF-8 text \(byte 20\)"):
        load_instructions(str(path))


def test_the_kit_has_eight_categories_of_135_with_one_in_five_held_out() -> None:
    data = load_instructions("kit")
    assert data.broken == []
    assert len(data.examples) == 1080
    categories = Counter(example.category for example in data.examples)
    assert list(categories.values()) == [135] * 8
    assert Counter(e.split for e in data.examples) == {"train": 864, "held_out": 216}
    held_out = Counter(e.category for e in data.examples if e.split == "held_out")
    assert list(held_out.values()) == [27] * 8


def test_the_near_duplicate_measure_finds_a_changed_word() -> None:
    # Nine words, the last one changed: 6 of 8 trigrams shared. The third text is alone.
    texts = ["a b c d e f g h i", "a b c d e f g h z", "quite another text than these two are"]
    assert near_duplicate_rate(texts) == pytest.approx(2 / 3)


def test_the_kit_repeats_itself_in_less_than_one_row_of_twenty() -> None:
    examples = load_instructions("kit").examples
    assert near_duplicate_rate([f"{e.instruction} {e.input}" for e in examples]) < 0.05
    assert near_duplicate_rate([e.output for e in examples]) < 0.05


def test_no_prompt_of_the_kit_is_in_both_splits() -> None:
    splits = defaultdict(set)
    for example in load_instructions("kit").examples:
        splits[example.instruction, example.input].add(example.split)
    assert all(len(split) == 1 for split in splits.values())


@pytest.mark.parametrize("name", PREFERENCES)
def test_preferences_have_two_different_sides_and_prompts_of_one_split(name: str) -> None:
    rows = kit_rows(name)
    assert len(rows) == 440
    splits = defaultdict(set)
    for row in rows:
        assert set(row) == {"instruction", "chosen", "rejected", "split"}
        assert all(row[side].strip() for side in ("instruction", "chosen", "rejected"))
        assert row["chosen"].strip() != row["rejected"].strip()
        assert row["split"] in {"train", "held_out"}
        splits[" ".join(row["instruction"].lower().split())].add(row["split"])
    assert all(len(split) == 1 for split in splits.values())
    assert {row["split"] for row in rows} == {"train", "held_out"}


@pytest.mark.parametrize("side", ["instruction", "chosen", "rejected"])
@pytest.mark.parametrize("name", PREFERENCES)
def test_preferences_repeat_themselves_in_less_than_one_row_of_twenty(name: str, side: str) -> None:
    assert near_duplicate_rate([row[side] for row in kit_rows(name)]) < 0.05


def hub(monkeypatch: pytest.MonkeyPatch, answer: list[object] | Exception) -> None:
    """Let the package ``datasets`` give one answer to one question."""

    def load_dataset(name: str, *, split: str) -> list[object]:
        assert (name, split) == ("tatsu-lab/alpaca", "train")
        if isinstance(answer, Exception):
            raise answer
        return answer

    package = ModuleType("datasets")
    package.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", package)


def test_rows_of_the_hub_are_checked_like_any_others(monkeypatch: pytest.MonkeyPatch) -> None:
    hub(monkeypatch, [GOOD, {**GOOD, "output": ""}, {**GOOD, "text": "whole"}])
    data = load_instructions("alpaca")
    assert data.examples == [Example.model_validate(GOOD)] * 2
    assert [row for row, _ in data.broken] == [2]


@pytest.mark.parametrize("error", [ConnectionError("no route"), Exception("of the hub's own kind")])
def test_a_hub_that_fails_is_told_with_the_other_sources(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    hub(monkeypatch, error)
    with pytest.raises(HubUnavailableError, match=r"tatsu-lab/alpaca .*--data FILE.*kit") as told:
        load_instructions("alpaca")
    assert told.value.__cause__ is error
    assert told.value.exit_code == 1


def test_a_missing_package_for_the_hub_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'pwff\[hub\]'"):
        load_instructions("alpaca")


@pytest.mark.skipif(importlib.util.find_spec("datasets") is None, reason="needs the extra hub")
def test_the_real_hub_client_offline_fails_at_once_with_our_error(tmp_path: Path) -> None:
    program = (
        "from edge_client.data.instructions import load_instructions\n"
        "from quantization.errors import HubUnavailableError\n"
        "try:\n    load_instructions('alpaca')\n"
        "except HubUnavailableError:\n    print('unavailable')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(tmp_path),
            "PYTHONPATH": os.pathsep.join(sys.path),
        },
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout == "unavailable\n"
