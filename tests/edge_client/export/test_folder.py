"""A new folder is there whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from device_profiles.errors import InputError
from edge_client.export.folder import MARK, check_place, new_folder, size_of


def fill(folder: Path, text: str) -> None:
    (folder / MARK).write_text(text)


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def fail_in(out: Path, *, force: bool) -> None:
    """Begin a folder and fail before it is whole."""
    with new_folder(out, force=force) as folder:
        fill(folder, "half")
        raise KeyError


def test_it_appears_when_it_is_filled(tmp_path: Path) -> None:
    out = tmp_path / "a" / "b"
    with new_folder(out, force=False) as folder:
        fill(folder, "new")
        assert not out.exists()
    assert (out / MARK).read_text() == "new"
    assert names(out.parent) == ["b"]
    assert size_of(out) == 3


def test_nothing_is_left_of_one_that_failed(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        fail_in(tmp_path / "out", force=False)
    assert not list(tmp_path.iterdir())


def test_an_export_is_replaced_by_force_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with new_folder(out, force=False) as folder:
        fill(folder, "old")
    with pytest.raises(InputError, match="--force"):
        check_place(out, force=False)
    with new_folder(out, force=True) as folder:
        fill(folder, "new")
    assert (out / MARK).read_text() == "new"
    assert names(tmp_path) == ["out"]


def test_the_old_one_stays_if_the_new_one_fails(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with new_folder(out, force=False) as folder:
        fill(folder, "old")
    with pytest.raises(KeyError):
        fail_in(out, force=True)
    assert (out / MARK).read_text() == "old"
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_what_is_no_export_is_never_replaced(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("mine")
    elif kind == "folder":
        out.mkdir()
        (out / "mine").write_text("mine")
    else:
        with new_folder(tmp_path / "other", force=False) as folder:
            fill(folder, "other")
        out.symlink_to(tmp_path / "other")
    with pytest.raises(InputError, match="another --out"):
        check_place(out, force=True)


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(InputError, match="choose another --out"),
        new_folder(tmp_path / "file" / "out", force=False),
    ):
        pass
