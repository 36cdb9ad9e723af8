"""The command ``export``: what it asks for, before it does anything."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from device_profiles.errors import InputError
from edge_client.export_command import export


def refused(*arguments: str) -> str:
    """Call ``export`` with bad input and return its sentence."""
    with pytest.raises(InputError) as caught:
        CliRunner().invoke(export, list(arguments), standalone_mode=False, catch_exceptions=False)
    return str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["RUN"], "--client is missing"),
        ([], "--state"),
        (["RUN", "--client", "a", "--global", "x"], "--global goes with --state"),
        (["RUN", "--state", "S"], "leave RUN and --client out"),
        (["--state", "S", "--out", "X"], "--base is missing"),
        (["--state", "S", "--base", "mini"], "--out is missing"),
        (["RUN", "--client", "a", "--precision", "int8"], "--format onnx"),
    ],
)
def test_what_is_missing_or_too_much_is_named(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert words in refused(*arguments)
    assert not list(tmp_path.iterdir())


def test_a_run_that_is_not_there_is_told_and_nothing_is_written(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert "holds no run" in refused(str(run), "--client", "pi5-01")
    assert not run.exists()
