"""A log of lines with a bound."""

from __future__ import annotations

from pathlib import Path

import pytest

from cloud_aggregator.event_log import append_line


def test_the_newest_lines_stay_within_twice_the_limit_and_none_is_split(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for number in range(100):  # ten bytes each: nine fit in 99
        append_line(path, f"line {number:04}", limit_bytes=99)
        assert path.stat().st_size <= 99
    older = tmp_path / "metrics.jsonl.1"
    assert sorted(p.name for p in tmp_path.iterdir()) == [path.name, older.name]
    assert older.stat().st_size <= 99
    lines = (older.read_text() + path.read_text()).splitlines()
    assert lines == [f"line {number:04}" for number in range(90, 100)]  # 99 begins a file anew


def test_a_line_beyond_the_limit_has_a_file_for_itself(tmp_path: Path) -> None:
    path = tmp_path / "log"
    for line in ("short", "x" * 50, "end"):
        append_line(path, line, limit_bytes=10)
    assert path.read_text() == "end\n"
    assert (tmp_path / "log.1").read_text() == "x" * 50 + "\n"


def test_the_first_line_makes_the_file(tmp_path: Path) -> None:
    append_line(tmp_path / "log", "é", limit_bytes=1)
    assert (tmp_path / "log").read_bytes() == "é\n".encode()
    assert not (tmp_path / "log.1").exists()


def test_a_folder_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        append_line(tmp_path / "nowhere" / "log", "x")
