"""A personal model leaves the folder of a run that was trained, and says the same everywhere."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from edge_client.export_command import export
from edge_client.talk_command import generate
from tests.end_to_end.conftest import SMALL, pwff, read_run

HAS_ONNX = all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime", "optimum"))


@pytest.fixture(scope="module")
def run(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a small run on the tiny base."""
    folder = tmp_path_factory.mktemp("home") / "run"
    done = pwff(
        "emulate", *SMALL, "--model", str(tiny_checkpoint), "--learning-rate", "0.02",
        "--transport", "memory", "--out", str(folder),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def call(command: click.Command, *arguments: str) -> dict[str, Any]:
    """Call a command in this process and return the JSON that it prints."""
    done = CliRunner().invoke(
        command, [*arguments, "--json"], standalone_mode=False, catch_exceptions=False
    )
    assert done.return_value == 0
    given: dict[str, Any] = json.loads(done.stdout)
    return given


def say(model: Path, *more: str) -> str:
    settings = ["--temperature", "0", "--max-tokens", "24", "--prompt", "Name a river."]
    return str(call(generate, str(model), *settings, *more)["text"])


def test_run_and_exports_say_the_same_and_other_clients_something_else(
    run: Path, tmp_path: Path
) -> None:
    clients = [c["id"] for c in read_run(run)["clients"]]
    expected = {client: say(run, "--client", client) for client in clients}
    assert len(set(expected.values())) > 1  # they are personal
    forms = ["hf", "onnx"] if HAS_ONNX else ["hf"]
    for form in forms:
        out = tmp_path / form
        report = call(export, str(run), "--client", clients[0], "--format", form, "--out", str(out))
        assert report["round"] == 2
        assert report["check"]["text"] == "the client's held-out text"
        assert report["check"]["largest_difference"] <= 1e-4
        assert say(out) == expected[clients[0]]
    if not HAS_ONNX:
        pytest.skip("the extra onnx is not installed: only the export for transformers was tried")


def test_by_default_the_export_lies_in_the_run_s_folder(run: Path) -> None:
    client = read_run(run)["clients"][1]["id"]
    report = call(export, str(run), "--client", client)
    assert Path(report["folder"]) == run / "exports" / f"{client}-hf-fp32"
    assert report["bytes"] == sum(p.stat().st_size for p in Path(report["folder"]).iterdir())
