"""A run's folder: what is in it, written so that a reader never sees half a file."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import secrets
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import ValidationError

from cloud_aggregator.event_log import append_line
from cloud_aggregator.records import RunRecord
from device_profiles.errors import InputError

_RECORDED_PACKAGES = (
    "torch", "transformers", "peft", "tokenizers", "numpy", "safetensors", "scikit-learn",
    "pydantic", "paho-mqtt", "iotcore",
)  # fmt: skip


class DiskFullError(Exception):
    """The disk of a run has no room; what was written is safe."""

    exit_code = 1


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn what the disk says against writing ``path`` into a sentence."""
    try:
        yield
    except OSError as err:
        if err.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFullError(
                f"the disk is full at {path} ({err.strerror}); make room there, then resume the run"
            ) from err
        raise InputError(
            f"cannot write {path}: {err.strerror or err}; choose a folder that can be written"
        ) from err


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Put ``content`` at ``path``: the old file or the new, never a part, even after a crash.

    Raises:
        DiskFullError: If there is no room.
        InputError: If the folder cannot be written.
    """
    new = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with new.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            new.replace(path)
        except BaseException:
            new.unlink(missing_ok=True)
            raise


class RunFolder:
    """Paths and files of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def record_path(self) -> Path:
        """``run.json``."""
        return self.path / "run.json"

    @property
    def report_path(self) -> Path:
        """``report.html``."""
        return self.path / "report.html"

    def global_path(self, round_: int) -> Path:
        """Return where the global state after a round is; round 0 is the initial one."""
        return self.path / "global" / str(round_) / "shared.safetensors"

    def client_path(self, client: str) -> Path:
        """Return an emulated client's own folder."""
        return self.path / "clients" / client

    @property
    def spool_path(self) -> Path:
        """Where updates wait for the end of their round."""
        return self.path / "spool"

    @property
    def stale_path(self) -> Path:
        """Where late updates wait for a later round."""
        return self.path / "stale"

    def write_record(self, record: RunRecord) -> None:
        """Write ``run.json``."""
        text = record.model_dump_json(by_alias=True, indent=1)
        write_atomically(self.record_path, text.encode() + b"\n")

    def append_event(self, event: str, **fields: Any) -> None:
        """Add one line to ``metrics.jsonl``; the file of a long deployment is bounded.

        Raises:
            DiskFullError: If there is no room.
            InputError: If the folder cannot be written.
        """
        path = self.path / "metrics.jsonl"
        with _writing(path):
            self.path.mkdir(parents=True, exist_ok=True)
            append_line(path, json.dumps({"event": event, **fields}))

    def is_writable(self) -> bool:
        """Return whether the run's state can be written, as far as can be told without writing."""
        return os.access(self.path, os.W_OK | os.X_OK)

    def write_config(self, config: dict[str, Any]) -> None:
        """Write ``config.toml``: what makes the run repeatable, and on what it ran."""
        packages = {}
        for name in _RECORDED_PACKAGES:
            try:
                packages[name] = version(name)
            except PackageNotFoundError:
                continue
        machine = {
            "python": sys.version.split()[0],
            "cpu": _cpu(),
            "system": f"{platform.system()} {platform.machine()}",
        }
        content = {**config, "machine": machine, "packages": packages}
        write_atomically(self.path / "config.toml", tomli_w.dumps(content).encode())


def read_record(path: Path) -> RunRecord:
    """Return the record of a run's folder (or of its ``run.json``).

    Raises:
        InputError: If there is none, or it is damaged.
    """
    file = path / "run.json" if path.is_dir() else path
    try:
        return RunRecord.model_validate_json(file.read_bytes())
    except OSError as err:
        raise InputError(
            f"{path} holds no run: {file} cannot be read; give a run's folder"
        ) from err
    except ValidationError as err:
        first = err.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        place = f" at '{where}'" if where else ""
        raise InputError(f"{file} is damaged{place}: {first['msg']}") from err


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"
