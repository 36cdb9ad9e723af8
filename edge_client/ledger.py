"""What a device counts on its own disk, so that nothing that was said to it before counts again.

Its starts, which tell its sessions apart, and the newest manifest that it ever accepted.
"""

from __future__ import annotations

import json
from pathlib import Path

from device_profiles.errors import InputError
from edge_client.disk import replace_file


class Ledger:
    """One device's counts; to open it is to count a start.

    Args:
        folder: Of the device's states.

    Attributes:
        epoch: Number of this start, 1 for the first; on the disk before anything is said.
        highest: Epoch and counter of the newest manifest that was accepted.

    Raises:
        DiskError: If it cannot be written.
        InputError: If the file is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "epoch"
        last, self.highest = _read(self._path)
        self.epoch = last + 1
        self._write()

    def heard(self, highest: tuple[int, int]) -> None:
        """Remember the newest manifest.

        Raises:
            DiskError: If it cannot be written.
        """
        if highest != self.highest:
            self.highest = highest
            self._write()

    def _write(self) -> None:
        content = json.dumps({"epoch": self.epoch, "manifest": self.highest}).encode()
        replace_file(self._path, lambda new: _put(new, content))


def _put(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def _read(path: Path) -> tuple[int, tuple[int, int]]:
    if not path.exists():
        return 0, (0, 0)
    try:
        said = json.loads(path.read_bytes())
        epoch, (cloud_epoch, counter) = said["epoch"], said["manifest"]
        return int(epoch), (int(cloud_epoch), int(counter))
    except (OSError, ValueError, KeyError, TypeError) as err:
        raise InputError(
            f'{path} is damaged: write {{"epoch": N, "manifest": [0, 0]}} into it, with an N that '
            "is not below the number of this device's starts; its aggregator refuses a lower one"
        ) from err
