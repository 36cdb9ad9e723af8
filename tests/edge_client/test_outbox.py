"""The update that a device owes, on its disk: kept whole, for its own task alone."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from device_profiles.errors import InputError
from edge_client import disk
from edge_client.disk import DiskError
from edge_client.ledger import Ledger
from edge_client.local_client import Result
from edge_client.outbox import Outbox
from messaging.protocol import Costs, StateRef
from tests.edge_client.conftest import a_task

BLOB = bytes(range(256)) * 3 + b"\nand a line"
RESULT = Result(
    costs=Costs(compute_seconds=0.1 + 0.2, uplink_bits=1e9), examples=4, blob=BLOB, train_loss=1 / 3
)


def test_an_update_comes_back_as_it_was_after_a_restart(tmp_path: Path) -> None:
    Outbox(tmp_path / "new" / "folder").put(a_task(), RESULT)
    assert Outbox(tmp_path / "new" / "folder").of(a_task()) == RESULT


def test_the_same_task_is_known_though_its_wording_has_changed(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path)
    outbox.put(a_task(), RESULT)
    assert outbox.of(a_task(outcome="late", reason="again")) == RESULT


@pytest.mark.parametrize(
    "changes",
    [
        {"round": 2},
        {"work": "evaluate"},
        {"stage": "reward"},
        {"state": StateRef(round=0, blob="ab" * 32, bytes=2000, chunk_bytes=2064, chunks=1)},
    ],
)
def test_another_task_is_not_answered_with_it(tmp_path: Path, changes: dict[str, Any]) -> None:
    outbox = Outbox(tmp_path)
    outbox.put(a_task(), RESULT)
    assert outbox.of(a_task(**changes)) is None


def test_what_is_cleared_is_gone_and_may_be_cleared_again(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path)
    outbox.clear()
    outbox.put(a_task(), RESULT)
    for _ in range(2):
        outbox.clear()
        assert outbox.of(a_task()) is None
    assert list(tmp_path.iterdir()) == []


def test_a_result_without_an_update_is_not_kept(tmp_path: Path) -> None:
    Outbox(tmp_path).put(a_task(), Result(costs=Costs(), examples=1))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kept", [0, 40, -1])
def test_a_damaged_update_is_never_offered(
    tmp_path: Path, kept: int, caplog: pytest.LogCaptureFixture
) -> None:
    outbox = Outbox(tmp_path)
    outbox.put(a_task(), RESULT)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:kept])
    with caplog.at_level(logging.WARNING):
        assert outbox.of(a_task()) is None
    assert "is damaged: the round is trained again" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_on_a_full_disk_the_older_update_is_still_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outbox = Outbox(tmp_path)
    outbox.put(a_task(), RESULT)

    def full(_handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(disk.os, "fsync", full)
    with pytest.raises(DiskError, match=r"update-outgoing: No space left on device; .* is whole"):
        outbox.put(a_task(round=2), RESULT)
    assert outbox.of(a_task()) == RESULT
    assert len(list(tmp_path.iterdir())) == 1


# -- the ledger ------------------------------------------------------------------------------------


def test_every_start_is_counted_and_the_newest_manifest_is_remembered(tmp_path: Path) -> None:
    first = Ledger(tmp_path / "new")
    assert (first.epoch, first.highest) == (1, (0, 0))
    first.heard((2, 7))
    second = Ledger(tmp_path / "new")
    assert (second.epoch, second.highest) == (2, (2, 7))
    assert Ledger(tmp_path / "new").epoch == 3


def test_a_start_is_on_the_disk_before_anything_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[bool] = []
    real = disk.os.fsync

    def watch(handle: int) -> None:
        synced.append(True)
        real(handle)

    monkeypatch.setattr(disk.os, "fsync", watch)
    Ledger(tmp_path)
    assert len(synced) == 2  # the file, and the folder that names it
    assert (tmp_path / "epoch").exists()


@pytest.mark.parametrize("content", [b"", b"3", b"{}", b'{"epoch": "many", "manifest": [0, 0]}'])
def test_a_damaged_ledger_is_named_with_what_to_write_into_it(
    tmp_path: Path, content: bytes
) -> None:
    (tmp_path / "epoch").write_bytes(content)
    with pytest.raises(InputError, match=r"epoch is damaged: write \{.*refuses a lower one"):
        Ledger(tmp_path)
