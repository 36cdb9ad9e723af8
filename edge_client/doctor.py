"""The command ``doctor``: what is installed, what works, and what to install.

It imports no package of an extra itself, so it works on a machine that has only the core.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import platform
import queue
import re
import secrets
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import click
from rich import box
from rich.console import Console
from rich.table import Table

_PYTHON = (3, 10)
NEEDED = ("core", "edge")
#: Extra to package to versions, as in pyproject.toml; ``core`` is what comes without an extra.
PACKAGES: dict[str, dict[str, str]] = {
    "core": {
        "alembic": ">=1.13",
        "click": ">=8.1",
        "cryptography": ">=43",
        "jinja2": ">=3.1",
        "matplotlib": ">=3.8",
        "numpy": ">=1.26",
        "paho-mqtt": ">=2.1",
        "prometheus-client": ">=0.20",
        "psutil": ">=5.9",
        "pydantic": ">=2.11",
        "python-json-logger": ">=3.2",
        "rich": ">=13.7",
        "safetensors": ">=0.4.5",
        "sqlalchemy": ">=2.0.30",
        **({"tomli": ">=2.0"} if sys.version_info < (3, 11) else {}),
        "tomli-w": ">=1.0",
        "zlib-ng": ">=0.5",
    },
    "edge": {
        "torch": ">=2.4",
        "transformers": ">=4.57,<6",
        "peft": ">=0.17",
        "scikit-learn": ">=1.4",
    },
    "hub": {"datasets": ">=3.0"},
    "quantized": {"bitsandbytes": ">=0.46"},
    "onnx": {"onnxruntime": ">=1.20", "optimum-onnx": ">=0.1.0", "optimum": ">=2.1"},
    "endpoint": {"httpx": ">=0.27", "tenacity": ">=9.0"},
    "ray": {"ray": ">=2.40"},
    "broker": {"iotcore": ">=0.4"},
    "claims": {"aiohttp": ">=3.9", "fsspec": ">=2024.6", "tenacity": ">=9.0"},
    "claims-s3": {"s3fs": ">=2024.6"},
    "postgresql": {"psycopg[binary]": ">=3.2"},
    "privacy": {"dp-accounting": ">=0.4.3"},
    "tensorboard": {"tensorboardX": ">=2.6"},
    "mlflow": {"mlflow-skinny": ">=3.0"},
}
_GPU = " cuda"
#: Row of ``edge_client.trials.TRIALS`` to the extra that it needs, and whether a default run does.
TRIED = {
    "base": ("edge", True),
    "fp32 cpu": ("edge", True),
    "fp32 cuda": ("edge", False),
    "bf16 cpu": ("edge", False),
    "bf16 cuda": ("edge", False),
    "int8 cpu": ("edge", False),
    "int8 cuda": ("edge", False),
    "int8-dynamic cpu": ("edge", False),
    "nf4 cpu": ("edge", False),
    "nf4 cuda": ("edge", False),
    "onnx": ("onnx", False),
}
_OTHER_BUILD = "install packages built for this processor: pip install --upgrade 'pwff[edge]'"
_MODULES = {
    "mlflow-skinny": "mlflow",
    "optimum-onnx": "optimum",
    "paho-mqtt": "paho",
    "python-json-logger": "pythonjsonlogger",
    "scikit-learn": "sklearn",
}
_TRAINS = "runs train on the CPU, on a base in any precision below that runs there (--precision)"
_HUB_MODEL = "gpt2"
_HUB_SECONDS = 5.0
_MESSAGE_SECONDS = 10.0
_LITTLE_BYTES = 10**9

State = Literal["ok", "note", "missing"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the answer.

    Attributes:
        area: What it belongs to.
        what: What was looked at.
        state: ``ok``; ``note``: the default run works without it; ``missing``: it does not.
        found: What was found.
        remedy: What to do, or an empty string.
    """

    area: str
    what: str
    state: State
    found: str
    remedy: str = ""


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def doctor(as_json: bool) -> int:
    """Say what is installed, what works here, and what to install.

    A broker is started and kernels are run to find out. Ends with 0 if all that `pwff emulate`
    needs works, else with 1.
    """
    console = Console(markup=False, highlight=False, stderr=as_json)
    with console.status("looking at this machine"):
        findings = list(examine())
    missing = [f for f in findings if f.state == "missing"]
    if as_json:
        rows = [dataclasses.asdict(finding) for finding in findings]
        click.echo(json.dumps({"ok": not missing, "findings": rows}, indent=2))
    else:
        console.print(_table(findings))
        if missing:
            names = ", ".join(f"{f.area} {f.what}" for f in missing)
            console.print(f"pwff emulate does not work here yet: {names}", soft_wrap=True)
        else:
            console.print("All that pwff emulate needs works here.")
    return 1 if missing else 0


def _table(findings: list[Finding]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("area", "what", "state"):
        table.add_column(heading, no_wrap=True)
    table.add_column("found", overflow="fold")
    area = ""
    for finding in findings:
        found = finding.found + (f"\nRemedy: {finding.remedy}" if finding.remedy else "")
        shown = "" if finding.area == area else finding.area
        style = {"ok": "", "note": "yellow", "missing": "bold red"}[finding.state]
        table.add_row(shown, finding.what, finding.state, found, style=style)
        area = finding.area
    return table


def examine() -> Iterator[Finding]:
    """Look at everything, the quick things first; without the core, at nothing else."""
    yield look_at_python()
    yield from (look_at_packages(extra) for extra in PACKAGES)
    if any(version_of(package) is None for package in PACKAGES["core"]):
        return
    yield look_at_cpu()
    yield look_at_memory()
    yield look_at_disk()
    yield _guarded(check_broker, "missing")
    yield _guarded(check_hub, "note")
    yield _guarded(check_kit, "missing")
    base = _guarded(check_base, "missing")
    yield base
    yield from run_trials(base=base.state == "ok")


def _guarded(check: Callable[[], Finding], bad: State) -> Finding:
    """Return what a check found; one that breaks has found something broken."""
    try:
        return check()
    except Exception as err:
        what = check.__name__.removeprefix("check_")
        return Finding(area="check", what=what, state=bad, found=f"{type(err).__name__}: {err}")


def look_at_cpu() -> Finding:
    """Say which processor this is, and how much of it is ours."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = f"{cpu_name()}, {cores} cores usable, {platform.system()} {platform.machine()}"
    return Finding(area="machine", what="cpu", state="ok", found=found)


def look_at_memory() -> Finding:
    """Say how much memory is free."""
    import psutil

    from device_profiles.cli import with_unit

    memory = psutil.virtual_memory()
    little = memory.available < _LITTLE_BYTES
    return Finding(
        area="machine",
        what="memory",
        state="note" if little else "ok",
        found=f"{with_unit(memory.available, 'B')} free of {with_unit(memory.total, 'B')}",
        remedy="close something, or give --workers 1" if little else "",
    )


def look_at_disk() -> Finding:
    """Say how much room there is for runs, which go below the current folder."""
    from device_profiles.cli import with_unit

    disk = shutil.disk_usage(Path.cwd())
    little = disk.free < _LITTLE_BYTES
    return Finding(
        area="machine",
        what="disk",
        state="note" if little else "ok",
        found=f"{with_unit(disk.free, 'B')} free of {with_unit(disk.total, 'B')} in this folder",
        remedy="make room, or give another --out" if little else "",
    )


def cpu_name() -> str:
    """Return what the processor, or the board it is on, calls itself."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    for key in ("model name", "Model"):
        for line in lines:
            name, _, value = line.partition(":")
            if name.strip() == key:
                return value.strip()
    return platform.processor() or platform.machine()


def look_at_python() -> Finding:
    """Say which interpreter runs."""
    new = sys.version_info >= _PYTHON
    return Finding(
        area="installed",
        what="python",
        state="ok" if new else "missing",
        found=f"{platform.python_version()} ({sys.executable})",
        remedy="" if new else "use Python {}.{} or newer".format(*_PYTHON),
    )


def version_of(package: str) -> str | None:
    """Return the version of a package that could be imported, without importing it.

    Extras of its own (``psycopg[binary]``) are passed over.
    """
    name = package.partition("[")[0]
    module = _MODULES.get(name, name.replace("-", "_"))
    try:
        if importlib.util.find_spec(module) is None:
            return None
        return metadata.version(name)
    except (ImportError, ValueError):
        return None


def fits(version: str, wanted: str) -> bool:
    """Return whether a version is within bounds such as ``>=4.57,<6``."""
    have = _release(version)
    for bound in wanted.split(","):
        number = _release(bound[2:] if bound.startswith(">=") else bound[1:])
        if bound.startswith(">=") and have < number:
            return False
        if bound.startswith("<") and have >= number:
            return False
    return True


def _release(version: str) -> list[int]:
    """Return the numbers of a version, without zeros at the end; ``2.4.0+cu126`` is 2, 4."""
    found = re.match(r"\d+(\.\d+)*", version)
    numbers = [int(n) for n in found.group().split(".")] if found else []
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return numbers


def look_at_packages(extra: str) -> Finding:
    """Say which packages of an extra are here, and in which version."""
    versions = {name: version_of(name) for name in PACKAGES[extra]}
    absent = [name for name, version in versions.items() if version is None]
    unfit = [
        f"{name} {version} (needs {PACKAGES[extra][name]})"
        for name, version in versions.items()
        if version is not None and not fits(version, PACKAGES[extra][name])
    ]
    here = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    words = [here] if here else []
    if absent:
        words.append("not installed" + (f": {', '.join(absent)}" if here else ""))
    if unfit:
        words.append(f"does not fit: {', '.join(unfit)}")
    bad: State = "missing" if extra in NEEDED else "note"
    source = "pwff" if extra == "core" else f"pwff[{extra}]"
    return Finding(
        area="installed",
        what=extra,
        state=bad if absent or unfit else "ok",
        found="; ".join(words),
        remedy=f"pip install '{source}'" if absent or unfit else "",
    )


def check_broker() -> Finding:
    """Start the broker that a run would start, and pass one message through it."""
    from messaging.broker import embedded_broker, embedded_kind
    from messaging.errors import BrokerUnavailableError
    from messaging.mqtt import MqttNetwork

    kind = embedded_kind()
    area, what, remedy = "broker", "embedded", "install mosquitto, or: pip install 'pwff[broker]'"
    if kind is None:
        found = "neither mosquitto nor the package iotcore is installed"
        return Finding(area=area, what=what, state="missing", found=found, remedy=remedy)
    topic, payload = f"pwff-doctor/{secrets.token_hex(8)}", secrets.token_bytes(1000)
    ready, arrived = threading.Event(), threading.Event()

    def deliver(_topic: str, received: bytes) -> None:
        if received == payload:
            arrived.set()

    began = time.perf_counter()
    try:
        with embedded_broker(kind=kind) as url:
            started = time.perf_counter()
            transport = MqttNetwork(url).open(
                client_id=topic.replace("/", "-"),
                filters=[topic],
                deliver=deliver,
                connected=ready.set,
            )
            transport.start()
            try:
                ready.wait(_MESSAGE_SECONDS)
                sent = time.perf_counter()
                transport.publish(topic, payload)
                passed = arrived.wait(_MESSAGE_SECONDS)
                back = time.perf_counter()
            finally:
                transport.close()
    except BrokerUnavailableError as err:
        return Finding(area=area, what=what, state="missing", found=str(err), remedy=remedy)
    if not passed:
        found = f"{kind} starts, but no message comes through within {_MESSAGE_SECONDS:g} s"
        return Finding(area=area, what=what, state="missing", found=found, remedy=remedy)
    found = (
        f"{kind} starts in {1e3 * (started - began):.0f} ms; "
        f"a message comes back in {1e3 * (back - sent):.1f} ms"
    )
    return Finding(area=area, what=what, state="ok", found=found)


def check_hub(wait_seconds: float = _HUB_SECONDS) -> Finding:
    """Ask the model hub; the default run does without it."""
    area, what = "hub", "huggingface"
    try:
        from huggingface_hub import HfApi, constants
    except ImportError:
        found, remedy = "not asked: huggingface_hub is not installed", "pip install 'pwff[edge]'"
        return Finding(area=area, what=what, state="note", found=found, remedy=remedy)
    if constants.HF_HUB_OFFLINE:
        found = "not asked: HF_HUB_OFFLINE is set; models come from folders and the hub's cache"
        return Finding(area=area, what=what, state="note", found=found)
    failures: queue.Queue[str] = queue.Queue()

    def ask() -> None:
        try:
            HfApi().model_info(_HUB_MODEL, timeout=wait_seconds)
        except Exception as err:  # its clients have no error class in common
            failures.put(type(err).__name__)
        else:
            failures.put("")

    # A thread, since looking up a name has no timeout of its own.
    threading.Thread(target=ask, daemon=True).start()
    try:
        failure = failures.get(timeout=wait_seconds)
    except queue.Empty:
        failure = f"nothing within {wait_seconds:g} s"
    if not failure:
        return Finding(area=area, what=what, state="ok", found=f"{constants.ENDPOINT} answers")
    return Finding(
        area=area,
        what=what,
        state="note",
        found=f"{constants.ENDPOINT} does not answer ({failure}); needed for --model HUB_ID and "
        "--data alpaca only",
    )


def check_base() -> Finding:
    """Look up the bundled base; whether it runs is one of the trials."""
    from quantization.errors import BaseModelError
    from quantization.identity import MINI, identify

    area, what, remedy = "bundled", "base", "install pwff again, or give --model FOLDER"
    try:
        base = identify(MINI)
    except BaseModelError as err:
        return Finding(area=area, what=what, state="missing", found=str(err), remedy=remedy)
    found = (
        f"{MINI}: {base.parameters:,} parameters, {base.shape.layers} blocks of width "
        f"{base.shape.width}, sha256 {base.sha256[:12]}"
    )
    return Finding(area=area, what=what, state="ok", found=found)


def check_kit() -> Finding:
    """Read the bundled instruction data."""
    from edge_client.data.instructions import KIT, load_instructions

    examples = load_instructions(KIT).examples
    held_out = sum(example.split == "held_out" for example in examples)
    found = f"{len(examples) - held_out} examples to train on, {held_out} held out"
    return Finding(area="bundled", what="kit", state="ok", found=found)


def run_trials(*, base: bool) -> Iterator[Finding]:
    """Run what ``TRIED`` names where its packages are, the base only if ``base`` is there."""
    from edge_client.trials import try_out

    yield Finding(area="runs", what="training", state="ok", found=_TRAINS)
    findings: dict[str, Finding] = {}
    names = []
    for name, (extra, needed) in TRIED.items():
        packages = {**PACKAGES["edge"], **PACKAGES[extra]}
        absent = [package for package in packages if version_of(package) is None]
        if not absent and (base or name != "base"):
            names.append(name)
        elif absent and not name.endswith(_GPU):
            findings[name] = Finding(
                area="runs",
                what=name,
                state="missing" if needed else "note",
                found=f"not tried: {', '.join(absent)} not installed",
                remedy=f"pip install 'pwff[{extra}]'",
            )
    for outcome in try_out(names):
        _, needed = TRIED[outcome.name]
        if outcome.state == "absent" and outcome.name != f"fp32{_GPU}":
            continue  # said once
        bad: State = "missing" if needed else "note"
        findings[outcome.name] = Finding(
            area="runs",
            what=outcome.name,
            state="ok" if outcome.state == "works" else bad,
            found=outcome.words,
            remedy=_OTHER_BUILD if needed and outcome.state == "fails" else "",
        )
    yield from (findings[name] for name in TRIED if name in findings)
