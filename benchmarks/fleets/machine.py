"""The machine that a benchmark ran on, and what a tree of processes takes of it."""

from __future__ import annotations

import platform
import subprocess
import threading
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

SAMPLE_SECONDS = 0.25


def cpu() -> str:
    """Return the processor's name."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown"


def ours() -> str:
    """Return the versions of what trains here."""
    found = [f"Python {platform.python_version()}"]
    for name in ("torch", "transformers", "peft", "ray"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def watch(process: subprocess.Popen[bytes]) -> int:
    """Wait for a process; return the largest sum of its tree's proportional set sizes, bytes."""
    peak = 0
    done = threading.Event()

    def sample() -> None:
        nonlocal peak
        root = psutil.Process(process.pid)
        while not done.wait(SAMPLE_SECONDS):
            try:
                tree = [root, *root.children(recursive=True)]
            except psutil.Error:
                return
            peak = max(peak, sum(map(_proportional, tree)))

    thread = threading.Thread(target=sample)
    thread.start()
    process.wait()
    done.set()
    thread.join()
    return peak


def _proportional(process: psutil.Process) -> int:
    try:
        return int(process.memory_full_info().pss)
    except psutil.Error:  # it has ended
        return 0
