"""A folder that is there whole or not at all: written beside its place, then renamed."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from device_profiles.errors import InputError

MARK = "export.json"


def check_place(out: Path, *, force: bool) -> None:
    """See that a new export may be put at ``out``.

    Raises:
        InputError: If something is there that may not be replaced.
    """
    if not out.exists() and not out.is_symlink():
        return
    if not force:
        raise InputError(f"{out} is there already; give --force to replace it, or another --out")
    if not (out / MARK).is_file() or out.is_symlink():
        raise InputError(
            f"{out} is no export of pwff (it has no {MARK}), so --force does not replace it; give "
            "another --out"
        )


@contextlib.contextmanager
def new_folder(out: Path, *, force: bool) -> Iterator[Path]:
    """Yield a folder to fill; it becomes ``out`` if the body ends well, and is removed otherwise.

    Raises:
        InputError: See ``check_place``; or if ``out`` cannot be written.
    """
    check_place(out, force=force)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as err:
        raise InputError(
            f"cannot write {out}: {err.strerror or err}; choose another --out"
        ) from err
    try:
        new = work / "new"
        new.mkdir()
        yield new
        check_place(out, force=force)  # the body took its time
        if out.exists():
            out.rename(work / "old")
        try:
            new.rename(out)
        except OSError:
            if (work / "old").exists():
                (work / "old").rename(out)
            raise
    except OSError as err:
        raise InputError(
            f"cannot write {out}: {err.strerror or err}; choose another --out"
        ) from err
    finally:
        shutil.rmtree(work, ignore_errors=True)


def size_of(folder: Path) -> int:
    """Return the size of a folder's files, bytes."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
