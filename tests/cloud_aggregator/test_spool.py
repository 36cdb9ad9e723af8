"""Updates on disk: pieces in any order, kept whole or not at all, and a full disk told in words."""

from __future__ import annotations

import gc
import shutil
from collections import namedtuple
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud_aggregator.partials import ResumablePartial
from cloud_aggregator.spool import Spool, SpoolFullError
from messaging.errors import ProtocolError
from messaging.protocol import Offer
from tests.cloud_aggregator.conftest import LAYOUT, blob_of, constant, offer_of
from tests.cloud_aggregator.notes import a_spool

Usage = namedtuple("Usage", "total used free")  # what shutil.disk_usage returns


def partial_of(spool: Spool, offer: Offer) -> ResumablePartial:
    """Return where an offer's pieces go, in the spool that they will be kept in."""
    return ResumablePartial(spool.partial_path(offer.client), offer)


@given(data=st.data())
def test_pieces_written_in_any_order_make_the_blob(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    blob = data.draw(st.binary(min_size=1, max_size=200))
    size = data.draw(st.integers(1, 50))
    starts = list(range(0, len(blob), size))
    order = data.draw(st.permutations(starts))
    again = data.draw(st.lists(st.sampled_from(starts), max_size=3))
    spool = a_spool(tmp_path_factory.mktemp("spool"))
    partial = partial_of(spool, offer_of("a", blob))
    for start in [*order, *again]:
        partial.write(start, blob[start : start + size])
    assert partial.finish() == blob


def test_a_partial_holds_its_file_open_between_pieces_until_it_rests(tmp_path: Path) -> None:
    def is_open() -> bool:
        return path in {Path(file.path) for file in psutil.Process().open_files()}

    spool, blob = a_spool(tmp_path / "1"), b"12345678"
    partial = partial_of(spool, offer_of("a", blob))
    path = spool.partial_path("a")
    assert not is_open()
    partial.write(4, blob[4:])
    assert is_open()
    partial.rest()
    assert not is_open()
    partial.write(0, blob[:4])
    assert is_open()
    assert partial.finish() == blob
    assert not is_open()
    forgotten = partial_of(spool, offer_of("a", blob))
    forgotten.write(0, blob[:4])
    assert is_open()
    del forgotten
    gc.collect()
    assert not is_open()


def keep(spool: Spool, client: str, value: float, **changes: int) -> bytes:
    """Let an update arrive whole and be kept."""
    blob = blob_of(client, value, **changes)
    offer = offer_of(client, blob)
    partial = partial_of(spool, offer)
    partial.write(0, blob)
    partial.finish()
    spool.keep(offer)
    return blob


def test_an_update_appears_under_its_name_only_once_it_is_kept(tmp_path: Path) -> None:
    spool = a_spool(tmp_path / "1")
    blob = blob_of("a", 2.0)
    offer = offer_of("a", blob)
    partial = partial_of(spool, offer)
    partial.write(0, blob)
    partial.finish()
    assert not spool.path("a").exists()
    spool.keep(offer)
    assert spool.path("a").read_bytes() == blob
    assert not list(spool.path("a").parent.glob("*.part"))


def test_kept_updates_are_read_in_the_order_asked_for(tmp_path: Path) -> None:
    spool = a_spool(tmp_path / "1")
    for client, value in (("c", 3.0), ("a", 1.0), ("b", 2.0)):
        keep(spool, client, value, examples=int(value))
    read = [spool.update(client, LAYOUT) for client in ("a", "c")]
    assert [h.examples for h, _ in read] == [1, 3]
    assert [v.tolist() for _, v in read] == [constant(1.0).tolist(), constant(3.0).tolist()]


def test_a_partial_that_is_given_up_leaves_nothing(tmp_path: Path) -> None:
    spool = a_spool(tmp_path / "1")
    partial = partial_of(spool, offer_of("a", b"blob"))
    partial.write(0, b"bl")
    partial.discard()
    assert list((tmp_path / "1").iterdir()) == []


def test_a_blob_that_is_refused_once_it_is_whole_leaves_nothing(tmp_path: Path) -> None:
    spool = a_spool(tmp_path / "1")
    partial = partial_of(spool, offer_of("a", b"blob"))
    partial.write(0, b"blob")
    assert partial.finish() == b"blob"
    partial.discard()
    assert list((tmp_path / "1").iterdir()) == []


def test_a_later_process_finds_what_was_kept_with_its_offer(tmp_path: Path) -> None:
    first = a_spool(tmp_path / "1")
    blobs = {client: keep(first, client, 1.0) for client in ("b", "a")}
    half = partial_of(first, offer_of("c", b"blob"))
    half.write(0, b"bl")
    half.finish()
    found = list(a_spool(tmp_path / "1").kept())
    assert [(offer.client, blob) for offer, blob in found] == [
        ("a", blobs["a"]),
        ("b", blobs["b"]),
    ]
    assert found[0][0] == offer_of("a", blobs["a"])


@pytest.mark.parametrize("damage", ["update", "offer", "other", "no update", "no offer"])
def test_a_kept_update_that_is_damaged_is_passed_over(damage: str, tmp_path: Path) -> None:
    spool = a_spool(tmp_path / "1")
    keep(spool, "a", 1.0)
    whole = keep(spool, "b", 1.0)
    update, offer = spool.path("a"), tmp_path / "1" / "a.json"
    if damage == "update":
        update.write_bytes(update.read_bytes()[:-1])
    elif damage == "offer":
        offer.write_bytes(b"{half an off")
    elif damage == "other":
        offer.write_bytes(b'{"kind":"DONE","run":"trial","client":"a","blob":null}')
    else:
        (update if damage == "no update" else offer).unlink()
    assert [blob for _, blob in spool.kept()] == [whole]


def test_an_update_damaged_on_disk_is_not_averaged(tmp_path: Path) -> None:
    spool = a_spool(tmp_path / "1")
    keep(spool, "a", 1.0)
    spool.path("a").write_bytes(spool.path("a").read_bytes()[:-4])
    with pytest.raises(ProtocolError):
        spool.update("a", LAYOUT)


def test_cleared_the_round_is_gone_and_clearing_twice_is_no_error(tmp_path: Path) -> None:
    spool = a_spool(tmp_path / "1")
    keep(spool, "a", 1.0)
    spool.clear()
    spool.clear()
    assert not (tmp_path / "1").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_a_full_disk_is_told_with_folder_and_remedy(tmp_path: Path) -> None:
    """The write itself fails with ENOSPC: the partial file is the device that is always full."""
    folder = tmp_path / "1"
    spool = a_spool(folder)
    partial = partial_of(spool, offer_of("a", b"blob"))
    (folder / "a.part").unlink()
    (folder / "a.part").symlink_to("/dev/full")
    with pytest.raises(SpoolFullError, match="is full"):
        partial_of(spool, offer_of("a", b"blob"))
    with pytest.raises(SpoolFullError, match=r"is full \(No space left.*resume the run") as told:
        partial.write(0, b"blob")
    assert str(folder) in str(told.value)
    assert told.value.exit_code == 1
    partial.discard()


def test_a_disk_without_room_for_an_offer_is_told_before_a_byte_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = a_spool(tmp_path / "1")
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: Usage(100, 97, 3))
    with pytest.raises(SpoolFullError, match="3 bytes free, 4 needed"):
        partial_of(spool, offer_of("a", b"blob"))
    assert list((tmp_path / "1").iterdir()) == []
    partial_of(spool, offer_of("a", b"blo")).discard()
