"""docs/deployment.md names files, keys and options that there are."""

from __future__ import annotations

import re
from pathlib import Path

from click.testing import CliRunner

from cloud_aggregator.guards import SecuritySection
from cloud_aggregator.service_config import load_service
from edge_client.service_config import SecuritySection as DeviceSecurity
from edge_client.service_config import load_client
from pwff import command

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "deployment.md").read_text()


def test_the_secured_examples_are_configurations_of_the_same_run() -> None:
    cloud = load_service(ROOT / "examples" / "secured" / "cloud.toml")
    device = load_client(ROOT / "examples" / "secured" / "jetson.toml")
    assert (cloud.run, cloud.broker, cloud.model) == (device.run, device.broker, device.model)
    assert cloud.security.keys is not None
    assert device.security.key is not None
    assert device.security.certificate == Path(f"/etc/pwff/{device.client}.pem")


def test_the_guide_names_files_that_there_are() -> None:
    for path in re.findall(r"(?:examples|deploy)/[\w./@-]+\w", GUIDE):
        assert (ROOT / path).exists(), path


def test_the_guide_names_every_key_of_the_security_sections() -> None:
    for name in {*SecuritySection.model_fields, *DeviceSecurity.model_fields}:
        assert f"`{name}`" in GUIDE, name


def test_the_guide_calls_certs_with_options_that_there_are() -> None:
    shown = CliRunner().invoke(command, ["certs", "--help"]).output
    for line in GUIDE.splitlines():
        if "pwff certs" in line:
            for option in re.findall(r"--\w+", line):
                assert option in shown


def test_the_guide_numbers_ten_commands() -> None:
    numbered = set(map(int, re.findall(r"# (\d+)$", GUIDE, flags=re.MULTILINE))) | {8, 9}
    assert numbered == set(range(1, 11))
