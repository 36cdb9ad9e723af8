"""The Python API: light to import, and its documented example runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import cloud_aggregator
from device_profiles.errors import InputError

DOCUMENT = Path(__file__).parents[2] / "docs" / "api.md"


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = (
        "import sys, cloud_aggregator\n"
        "heavy = {'torch', 'numpy', 'pydantic', 'transformers', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "from cloud_aggregator import Experiment\n"
        "assert Experiment(clients=3).clients == 3\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_name_of_the_api_is_there() -> None:
    assert set(cloud_aggregator.__all__) <= set(dir(cloud_aggregator))
    assert all(getattr(cloud_aggregator, name) is not None for name in cloud_aggregator.__all__)


def test_another_name_is_refused() -> None:
    with pytest.raises(AttributeError, match="no attribute 'emulat'"):
        _ = cloud_aggregator.emulat


def test_the_documented_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(code, str(DOCUMENT), "exec"), names)  # noqa: S102 - the document's own code
    record = names["record"]
    assert isinstance(record, cloud_aggregator.RunRecord)
    assert (record.status, len(record.clients), len(record.rounds)) == ("done", 3, 1)
    assert cloud_aggregator.read_record(tmp_path / "runs" / "small") == record


def test_an_experiment_that_contradicts_itself_is_refused_before_it_runs(tmp_path: Path) -> None:
    wrong = cloud_aggregator.Experiment(clients=3, cohort=4)
    with pytest.raises(InputError, match="cohort = 4 of clients = 3"):
        cloud_aggregator.emulate(wrong, tmp_path / "run")
    assert not (tmp_path / "run").exists()
