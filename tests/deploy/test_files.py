"""The files that a deployment begins with are what their programs read, and name what there is."""

from __future__ import annotations

import configparser
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from pwff import command

ROOT = Path(__file__).parents[2]
UNITS = sorted((ROOT / "deploy" / "systemd").glob("*.service"))
IMAGES = sorted((ROOT / "deploy" / "container").glob("*.Containerfile"))
HARDENED = {
    "NoNewPrivileges": "yes",
    "ProtectSystem": "strict",
    "ProtectHome": "yes",
    "PrivateTmp": "yes",
    "ProtectKernelModules": "yes",
    "RestrictNamespaces": "yes",
    "CapabilityBoundingSet": "",
    "UMask": "0077",
}


def unit(path: Path) -> configparser.ConfigParser:
    """Return a unit's sections; a key that stands twice keeps its last value."""
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read_string(path.read_text())
    return parser


def check_command(words: list[str]) -> None:
    """See that ``pwff`` has the command and each of its options."""
    name, *options = words
    shown = CliRunner().invoke(command, [name, "--help"]).output
    for option in (word for word in options if word.startswith("--")):
        assert option in shown, option


def test_there_is_a_unit_and_an_image_for_each_side() -> None:
    assert [path.name for path in UNITS] == ["pwff-aggregator.service", "pwff-client@.service"]
    assert [path.stem for path in IMAGES] == ["aggregator", "client"]


@pytest.mark.parametrize("path", UNITS, ids=lambda p: p.name)
def test_a_unit_runs_a_command_that_there_is_confined_and_stopped_by_sigterm(path: Path) -> None:
    service = unit(path)["Service"]
    program, *words = service["ExecStart"].split()
    assert program == "/opt/pwff/bin/pwff"
    check_command(words)
    assert {key: service[key] for key in HARDENED} == HARDENED
    assert service["User"] == "pwff"
    assert service["KillSignal"] == "SIGTERM"
    assert int(service["TimeoutStopSec"]) >= 60
    assert service["SuccessExitStatus"] == "130"  # what an interrupted run ends with
    assert (service["Restart"], service["RestartPreventExitStatus"]) == ("on-failure", "2")


@pytest.mark.parametrize("path", UNITS, ids=lambda p: p.name)
def test_systemd_reads_the_unit_without_a_complaint(path: Path, tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed here; the other tests parse the unit")
    copy = tmp_path / path.name
    copy.write_text(path.read_text().replace("/opt/pwff/bin/pwff", "/bin/true"))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(copy)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    mine = [line for line in done.stderr.splitlines() if path.stem.split("@")[0] in line]
    assert not mine


def steps(path: Path) -> list[tuple[str, str]]:
    """Return a container file's instructions, continued lines joined."""
    text = re.sub(r"\\\n\s*", "", path.read_text())
    lines = (line for line in text.splitlines() if line and not line.startswith("#"))
    return [tuple(line.split(maxsplit=1)) for line in lines]  # type: ignore[misc]


@pytest.mark.parametrize("path", IMAGES, ids=lambda p: p.stem)
def test_an_image_runs_a_command_that_there_is_as_nobody_special(path: Path) -> None:
    last: dict[str, str] = dict(steps(path))
    known = {"ARG", "FROM", "COPY", "RUN", "ENV", "USER", "WORKDIR", "VOLUME", "EXPOSE",
             "STOPSIGNAL", "HEALTHCHECK", "ENTRYPOINT", "CMD"}  # fmt: skip
    assert set(last) <= known
    assert int(last["USER"]) > 0
    assert last["STOPSIGNAL"] == "SIGTERM"
    assert json.loads(last["ENTRYPOINT"]) == ["pwff"]
    check_command(json.loads(last["CMD"]))
    health = json.loads(last["HEALTHCHECK"].split("CMD", 1)[1])
    compile(health[health.index("-c") + 1], "health check", "exec")


def test_no_secret_is_copied_into_an_image() -> None:
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {"**/*.pem", "**/*.key", "**/*.keys.toml", "**/*.key.toml", "secrets"} <= set(ignored)
