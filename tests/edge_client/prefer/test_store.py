"""The file of ranked pairs: whole lines only, taken up again, never somebody else's."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from device_profiles.errors import InputError
from edge_client.data.preferences import Pair, load_preferences
from edge_client.prefer.store import PairStore, StoreError

PAIR = Pair(
    instruction="Na\u00efve?",
    input="in green",
    chosen="Yes\u2028so.",
    rejected="No.",
    split="train",
)


def numbered(number: int) -> Pair:
    return PAIR.model_copy(update={"instruction": f"Ask {number}."})


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "new" / "folder" / "pairs.jsonl"


def filled(out: Path, count: int = 2) -> bytes:
    """Write pairs and return the file's content."""
    with PairStore(out, "helpfulness") as store:
        for number in range(count):
            store.add(numbered(number))
    return out.read_bytes()


def test_a_pair_is_read_back_as_it_was_with_its_notes_beside_it(out: Path) -> None:
    with PairStore(out, "harmlessness") as store:
        store.add(PAIR, judge="human", model="m")
        assert load_preferences(str(out), "harmlessness").pairs == [PAIR]  # before it is closed
    row = json.loads(out.read_text(encoding="utf-8"))
    assert (row["objective"], row["judge"], row["model"]) == ("harmlessness", "human", "m")


def test_what_is_there_counts_and_more_is_appended(out: Path) -> None:
    before = filled(out)
    with PairStore(out, "helpfulness") as store:
        assert (store.count, store.mended) == (2, False)
        assert store.judged == {numbered(0).prompt, numbered(1).prompt}
        store.add(numbered(2))
    assert out.read_bytes().startswith(before)
    assert len(load_preferences(str(out), "helpfulness").pairs) == 3


def test_wherever_a_crash_cut_the_last_line_only_that_pair_is_lost(out: Path) -> None:
    with PairStore(out, "helpfulness") as store:
        store.add(numbered(0))
        end = out.stat().st_size
        store.add(PAIR)
    whole = out.read_bytes()
    for cut in range(end, len(whole)):
        out.write_bytes(whole[:cut])
        with PairStore(out, "helpfulness") as store:
            # Without its line break alone, the pair is whole.
            assert store.count == (2 if cut == len(whole) - 1 else 1)
            assert store.mended == (end < cut < len(whole) - 1)
            store.add(numbered(2))
        assert load_preferences(str(out), "helpfulness").broken == []


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"A diary.\nOf mine", "is no JSONL file of pairs"),
        (b"A diary.\n", "line 1: no valid JSON"),
        (b'[{"instruction": "a"}]', "line 1: a list in place of an object"),
        (b'{"instruction": "a", "output": "b"}', "line 1: the fields instruction, output are of"),
        (b'{"instruction": "a", "chosen": "b", "rejected": ""}\n', "line 1: rejected"),
        (b"caf\xe9\n", "not UTF-8"),
    ],
)
def test_a_file_of_something_else_is_refused_and_left_as_it_is(
    tmp_path: Path, content: bytes, words: str
) -> None:
    path = tmp_path / "mine.txt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=words):
        PairStore(path, "helpfulness")
    assert path.read_bytes() == content


def test_pairs_of_the_other_objective_are_refused(out: Path) -> None:
    filled(out)
    with pytest.raises(InputError, match=r"line 1: .*ranked for helpfulness, and harmlessness is"):
        PairStore(out, "harmlessness")


def test_a_file_in_use_is_refused_until_it_is_closed(out: Path) -> None:
    with PairStore(out, "helpfulness"), pytest.raises(InputError, match="in use by another"):
        PairStore(out, "helpfulness")
    PairStore(out, "helpfulness").close()


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file" / "pairs.jsonl"):
        with pytest.raises(InputError, match=r"--out .*name a file that can be written"):
            PairStore(path, "helpfulness")


def test_a_full_disk_leaves_the_pairs_that_were_there(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = filled(out)
    with PairStore(out, "helpfulness") as store, monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StoreError, match=r"No space left on device; its 2 pairs are kept"):
            store.add(PAIR)
        assert PAIR.prompt not in store.judged
    assert out.read_bytes() == before


def full(_file: int) -> None:
    raise OSError(28, "No space left on device")
