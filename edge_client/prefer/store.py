"""Ranked pairs in a JSONL file, one line each, safe on disk before the next is asked for.

A line is what ``load_preferences`` reads: instruction, input, chosen, rejected, split (where the
prompt had one) and objective; beside them who judged and whose responses they are.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
from pathlib import Path
from types import TracebackType

from pydantic import ValidationError

from device_profiles.errors import InputError
from edge_client.data.instructions import json_lines, what_is_wrong
from edge_client.data.preference_layouts import own_row
from edge_client.data.preferences import Pair

_BEGINNING = b'{"instruction": "'  # of every line that is written here


class StoreError(Exception):
    """A pair that could not be written."""

    exit_code = 1


class PairStore:
    """The file that a session appends to; nobody else may while it is open.

    Args:
        path: Of the file; it and its folder are made where they are missing.
        objective: Of all its pairs.

    Attributes:
        objective: Of all its pairs.
        judged: The prompts that have a pair.
        count: How many pairs there are.
        mended: Whether a last line that a crash had cut short was removed.

    Raises:
        InputError: If the file is in use, cannot be written, or holds something else.
    """

    def __init__(self, path: Path, objective: str) -> None:
        self.path = path
        self.judged: set[str] = set()
        self.count = 0
        self.mended = False
        self.objective = objective
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        except OSError as err:
            raise InputError(
                f"--out {path}: {err.strerror}; name a file that can be written"
            ) from err
        try:
            self._lock()
            self._read()
            _sync_folder(path.parent)
        except BaseException:
            os.close(self._file)
            raise

    def add(self, pair: Pair, **notes: str) -> None:
        """Append a pair; when this returns it is on disk.

        Args:
            pair: The ranked pair.
            notes: More to be kept with it.

        Raises:
            StoreError: If there is no room; the file is then as it was.
        """
        row = {**pair.model_dump(exclude_none=True), "objective": self.objective, **notes}
        line = (json.dumps(row, ensure_ascii=False) + "\n").encode()
        end = os.fstat(self._file).st_size
        try:
            if os.write(self._file, line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # noqa: TRY301 - ours too
            os.fsync(self._file)
        except OSError as err:
            os.ftruncate(self._file, end)
            raise StoreError(
                f"{self.path} cannot be written: {err.strerror}; its {self.count} pairs are kept"
            ) from err
        self.judged.add(pair.prompt)
        self.count += 1

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as err:
            raise InputError(
                f"--out {self.path} is in use by another session; end it, or name another file"
            ) from err

    def _read(self) -> None:
        """Take over what is there, then end or remove a last line that a crash cut short."""
        content = self.path.read_bytes()
        whole, _, rest = content.rpartition(b"\n")
        torn = bool(rest) and not _is_json(rest)
        if torn and not (rest.startswith(_BEGINNING) or _BEGINNING.startswith(rest)):
            raise InputError(f"--out {self.path} is no JSONL file of pairs; name another file")
        try:
            text = (whole if torn else content).decode("utf-8")
        except UnicodeDecodeError as err:
            raise InputError(
                f"--out {self.path} is not UTF-8 text (byte {err.start}); name another file"
            ) from err
        for number, row in json_lines(text):
            wrong = self._take(row)
            if wrong:
                raise InputError(
                    f"--out {self.path}, line {number}: {wrong}; name another file, or mend it"
                )
        if torn:
            os.ftruncate(self._file, len(content) - len(rest))
            self.mended = True
        elif rest:
            os.write(self._file, b"\n")

    def _take(self, row: object) -> str | None:
        """Count a pair that is there already, or return what is wrong with it."""
        if isinstance(row, Exception):
            return f"no valid JSON: {row}"
        found = own_row(row, self.objective)
        if isinstance(found, str):
            return found
        try:
            pair = Pair.model_validate(found)
        except ValidationError as err:
            return what_is_wrong(err)
        self.judged.add(pair.prompt)
        self.count += 1
        return None

    def close(self) -> None:
        """Let others write to the file."""
        os.close(self._file)

    def __enter__(self) -> PairStore:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _sync_folder(path: Path) -> None:
    """Put the name of a new file on disk too."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
