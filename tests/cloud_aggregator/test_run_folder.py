"""A run's folder: a reader sees an old file or a new one, and what is wrong is told in words."""

from __future__ import annotations

import errno
import json
import os
import threading
from pathlib import Path

import pytest

from cloud_aggregator import event_log
from cloud_aggregator.run_folder import DiskFullError, RunFolder, read_record, write_atomically
from device_profiles.config_files import read_toml
from device_profiles.errors import InputError
from tests.cloud_aggregator.conftest import join, record_of


def test_a_write_that_fails_half_way_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.json"
    write_atomically(path, b"old")

    def no_room(_handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_room)
    with pytest.raises(DiskFullError, match=r"full at .*run\.json .*resume the run") as told:
        write_atomically(path, b"new")
    assert told.value.exit_code == 1
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_crash_in_the_middle_of_a_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.json"
    write_atomically(path, b"old")

    def interrupt(_handle: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_reader_never_sees_a_part_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "run.json"
    contents = [b"a" * 100_000, b"b" * 200_000]
    write_atomically(path, contents[0])
    seen: list[bytes] = []
    over = threading.Event()

    def read() -> None:
        while not over.is_set():
            seen.append(path.read_bytes())

    reader = threading.Thread(target=read)
    reader.start()
    for turn in range(20):
        write_atomically(path, contents[turn % 2])
    over.set()
    join(reader)
    assert seen
    assert {len(content) for content in seen} <= {100_000, 200_000}


def test_a_file_has_the_rights_that_the_user_gives_new_files(tmp_path: Path) -> None:
    """A dashboard of another user may read what the user's umask lets it read."""
    mask = os.umask(0o022)
    try:
        write_atomically(tmp_path / "run.json", b"{}")
    finally:
        os.umask(mask)
    assert (tmp_path / "run.json").stat().st_mode & 0o777 == 0o644


def test_a_folder_that_cannot_be_is_bad_input(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(InputError, match="choose a folder that can be written") as told:
        write_atomically(tmp_path / "file" / "run.json", b"{}")
    assert str(tmp_path / "file" / "run.json") in str(told.value)
    with pytest.raises(InputError, match="cannot write"):
        RunFolder(tmp_path / "file").append_event("round")


def test_events_are_one_a_line_in_their_order(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.append_event("task", round=1, clients=["a"])
    folder.append_event("refused", reason="two\nlines \u2028 and 'quotes'")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"event": "task", "round": 1, "clients": ["a"]},
        {"event": "refused", "reason": "two\nlines \u2028 and 'quotes'"},
    ]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_an_event_that_finds_no_room_is_told_as_a_full_disk(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(DiskFullError, match="No space left"):
        RunFolder(tmp_path).append_event("round", round=1)


def test_config_holds_what_was_asked_and_on_what_it_ran(tmp_path: Path) -> None:
    RunFolder(tmp_path).write_config({"experiment": {"seed": 3, "alpha": 0.5, "fleet": "mixed"}})
    config = read_toml(tmp_path / "config.toml")
    assert config["experiment"] == {"seed": 3, "alpha": 0.5, "fleet": "mixed"}
    assert set(config["machine"]) == {"python", "cpu", "system"}
    assert all(config["machine"].values())
    assert {"numpy", "safetensors"} <= set(config["packages"])


def test_a_record_is_read_by_its_folder_or_by_its_file(tmp_path: Path) -> None:
    record = record_of(stop_reason="rounds")
    RunFolder(tmp_path).write_record(record)
    assert read_record(tmp_path) == record
    assert read_record(tmp_path / "run.json") == record


def test_a_folder_without_a_run_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no run: .*run\.json.*give a run's folder"):
        read_record(tmp_path)
    with pytest.raises(InputError, match="holds no run"):
        read_record(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda text: text[: len(text) // 2], "is damaged: Invalid JSON"),
        (lambda text: "\xff" + text, "is damaged: Invalid JSON"),
        (lambda text: text.replace('"seed": 7', '"seed": "seven"'), "is damaged at 'seed'"),
        (lambda text: text.replace('"width": 8', '"width": null'), "is damaged at 'model.width'"),
        (lambda text: text.replace('"seed"', '"sead"'), "is damaged at '"),
    ],
    ids=["cut", "no JSON", "value", "deep value", "key"],
)
def test_a_damaged_record_is_told_by_its_place(damage: object, words: str, tmp_path: Path) -> None:
    assert callable(damage)
    RunFolder(tmp_path).write_record(record_of())
    path = tmp_path / "run.json"
    text = path.read_text()
    path.write_text(damage(text), encoding="latin-1")
    assert path.read_text(encoding="latin-1") != text
    with pytest.raises(InputError) as told:
        read_record(tmp_path)
    assert words in str(told.value)
    assert str(path) in str(told.value)


def test_a_run_keeps_each_thing_at_its_place(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.record_path == tmp_path / "run.json"
    assert folder.report_path == tmp_path / "report.html"
    assert folder.global_path(3).parent == tmp_path / "global" / "3"
    assert folder.client_path("pi5-07") == tmp_path / "clients" / "pi5-07"


def test_the_events_of_a_long_deployment_are_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each line is 21 bytes with its end; a limit of 50 holds two of them."""
    monkeypatch.setattr(event_log.append_line, "__kwdefaults__", {"limit_bytes": 50})
    folder = RunFolder(tmp_path)
    for _ in range(5):
        folder.append_event("0123456")
    line = '{"event": "0123456"}'
    assert len(line) == 20
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == [line]
    assert (tmp_path / "metrics.jsonl.1").read_text().splitlines() == [line, line]


def test_a_folder_says_whether_it_can_be_written(tmp_path: Path) -> None:
    assert RunFolder(tmp_path).is_writable()
    assert not RunFolder(tmp_path / "nowhere").is_writable()
