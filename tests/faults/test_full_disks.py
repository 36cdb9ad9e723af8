"""A full disk ends a program with a sentence and loses nothing; with room again, it goes on.

The disk is a real one of a few pages in memory, which a file fills.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.faults.play import DEVICES, Play
from tests.faults.processes import at

pytestmark = pytest.mark.faults

Undisturbed = Callable[..., dict[int, str]]


@contextmanager
def small_disk(folder: Path, kilobytes: int) -> Iterator[Path]:
    """Put a disk of so many kilobytes at ``folder``; skip where this user may not."""
    folder.mkdir(parents=True)
    size = f"size={kilobytes}k,mode=0777"
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", size, "none", str(folder)], capture_output=True, check=False
    )
    if mount.returncode:
        pytest.skip("only root may mount a disk of a few kilobytes")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path, *, but: int) -> Path:
    """Fill a disk but for so many bytes; return the file that does."""
    free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
    path = folder / "filler"
    path.write_bytes(bytes(max(0, free - but)))
    return path


@pytest.mark.parametrize("room", [0, 12_288], ids=["none", "less than an update"])
def test_a_full_spool_ends_the_aggregator_and_what_was_accepted_stays(
    room: int, play: Play, undisturbed: Undisturbed
) -> None:
    with small_disk(play.out / "spool", 256) as disk:
        cloud = play.cloud(codec="fp32")
        first = play.device("pi-1")
        others = play.others("pi-1", hold=at("step", round=1, step=3))
        cloud.wait_for("update", client="pi-1", round=1)
        for device in others.values():
            device.wait_held()
        filler = fill(disk, but=room)
        for device in others.values():
            device.let_go()
        status, said = cloud.fail()
        assert status == 1
        assert "is full" in said
        assert "resume the run" in said
        filler.unlink()
        again = play.cloud(codec="fp32")
        play.finish(again, first, *others.values())
        assert again.count("granted", client="pi-1", round=1) == 0
        assert play.accepted == [list(DEVICES)] * 2
        assert play.states == undisturbed(codec="fp32")


def test_a_device_whose_disk_is_full_leaves_with_a_sentence_and_comes_again(
    play: Play, undisturbed: Undisturbed
) -> None:
    with small_disk(play.device_folder("pi-1"), 256) as disk:
        cloud, others = play.cloud(), play.others("pi-1")
        one = play.device("pi-1", hold=at("step", round=2, step=1))
        one.wait_held()
        filler = fill(disk, but=0)
        one.let_go()
        status, said = one.fail()
        assert status == 1
        assert "make room in" in said
        filler.unlink()
        again = play.device("pi-1")
        play.finish(cloud, again, *others.values())
        assert play.accepted == [list(DEVICES)] * 2
        assert play.states == undisturbed()
