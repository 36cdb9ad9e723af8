"""Trackers: what a run's events become, read back from real event files and a real MLflow store."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest

from cloud_aggregator.records import RunRecord
from cloud_aggregator.run_folder import RunFolder
from cloud_aggregator.trackers import MLFLOW_EXPERIMENT, open_trackers, round_figures
from device_profiles.errors import InputError
from quantization.errors import MissingExtraError
from tests.cloud_aggregator.reports.conftest import make_run

Points = dict[str, dict[int, float]]


def sent(record: RunRecord) -> RunRecord:
    """Return a run in which ``a`` alone sent: 1,000 bytes a round, in 2 s and 3 J."""
    changes = {"upload_bytes": 1000, "uplink_seconds": 2.0, "uplink_joules": 3.0}
    nothing = dict.fromkeys(changes, 0)
    for place, done in enumerate(record.rounds):
        clients = [c.model_copy(update=changes if c.id == "a" else nothing) for c in done.clients]
        record.rounds[place] = done.model_copy(update={"clients": clients})
    return record


@pytest.fixture
def run() -> RunRecord:
    """Return a run of two clients and two rounds."""
    return sent(make_run({"a": [0.1, 0.2, 0.3], "b": [0.1, 0.2, 0.5]}))


def follow(names: list[str], folder: Path, record: RunRecord, *, of: int = 0) -> None:
    """Tell trackers what a run tells its listeners, when rounds up to ``of`` were there before."""
    so_far = record.model_copy(update={"rounds": record.rounds[:of], "status": "running"})
    with open_trackers(names, RunFolder(folder)) as tell:
        tell("plan", record=so_far, clients=[], broken=[])
        if not of:
            tell("before", stage="instruction", eval_loss=4.5, eval_accuracy=0.1, kl=None)
        for done in record.rounds[of:]:
            so_far.rounds.append(done)
            tell("task", round=done.round)
            tell("round", stage=done.stage, round=done.round)
        so_far.status = "done"
        tell("end", status="done", reason="rounds")


def points(folder: Path) -> Points:
    """Read event files as their format says: length, its CRC, an event, its CRC; again and again.

    Source: TensorFlow, tensorflow/core/lib/io/record_writer.h.
    """
    from tensorboardX.proto.event_pb2 import Event

    found: Points = {}
    for path in sorted(folder.glob("tensorboard/events.out.tfevents.*")):
        content, at = path.read_bytes(), 0
        while at < len(content):
            (length,) = struct.unpack_from("<Q", content, at)
            event = Event.FromString(content[at + 12 : at + 12 + length])
            at += 12 + length + 4
            for value in event.summary.value:
                found.setdefault(value.tag, {})[event.step] = value.simple_value
    return found


def test_a_rounds_figures_have_names_and_what_was_not_sent_is_left_out(run: RunRecord) -> None:
    figures = round_figures(run.rounds[1])
    assert figures["eval_accuracy/b"] == 0.5
    assert (figures["uplink_seconds/a"], figures["uplink_joules/a"]) == (2.0, 3.0)
    assert "uplink_seconds/b" not in figures
    assert "global/kl" not in figures
    assert figures["global/upload_bytes"] == 1000.0


def test_tensorboards_event_files_hold_every_round(tmp_path: Path, run: RunRecord) -> None:
    pytest.importorskip("tensorboardX", reason="the extra 'tensorboard' is not installed")
    follow(["tensorboard"], tmp_path, run)
    found = points(tmp_path)
    # single precision, which is what an event file has
    assert found["eval_accuracy/b"] == pytest.approx({1: 0.2, 2: 0.5}, rel=1e-6)
    assert found["global/eval_accuracy"][0] == pytest.approx(0.1, rel=1e-6)
    assert set(found["global/eval_accuracy"]) == {0, 1, 2}
    assert found["uplink_joules/a"] == {1: 3.0, 2: 3.0}


def test_switched_on_when_a_run_goes_on_it_is_given_the_rounds_before(
    tmp_path: Path, run: RunRecord
) -> None:
    pytest.importorskip("tensorboardX", reason="the extra 'tensorboard' is not installed")
    follow(["tensorboard"], tmp_path, run, of=1)
    assert set(points(tmp_path)["eval_accuracy/a"]) == {1, 2}


def mlflow_store(folder: Path, patch: pytest.MonkeyPatch) -> Any:
    """Return a client of a file store that trackers use too."""
    tracking = pytest.importorskip("mlflow.tracking", reason="the extra 'mlflow' is not installed")
    store = (folder / "mlruns").as_uri()
    patch.setenv("MLFLOW_TRACKING_URI", store)
    patch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # a database would take SQLAlchemy besides
    return tracking.MlflowClient(store)


def test_mlflow_has_one_run_with_every_round_though_it_was_broken_off(
    tmp_path: Path, run: RunRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = mlflow_store(tmp_path, monkeypatch)
    first = run.model_copy(update={"rounds": run.rounds[:1]})
    follow(["mlflow"], tmp_path / "run", first)
    follow(["mlflow"], tmp_path / "run", run, of=1)
    home = store.get_experiment_by_name(MLFLOW_EXPERIMENT)
    (kept,) = store.search_runs([home.experiment_id])
    assert (kept.info.run_name, kept.info.status) == (run.run, "FINISHED")
    assert kept.data.params["method"] == run.method
    history = store.get_metric_history(kept.info.run_id, "eval_accuracy/b")
    assert {m.step: m.value for m in history} == {1: 0.2, 2: 0.5}


def test_a_store_that_mlflow_cannot_use_is_told_with_a_way_out(
    tmp_path: Path, run: RunRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow", reason="the extra 'mlflow' is not installed")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nonsense://nowhere")
    with pytest.raises(InputError, match="set MLFLOW_TRACKING_URI"):
        follow(["mlflow"], tmp_path, run)


def test_an_unknown_tracker_is_told_with_the_nearest(tmp_path: Path) -> None:
    with (
        pytest.raises(InputError, match="did you mean 'mlflow'"),
        open_trackers(["mlfow"], RunFolder(tmp_path)),
    ):
        pass


def test_a_tracker_that_is_not_installed_is_told_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with (
        pytest.raises(MissingExtraError, match=r"pip install 'pwff\[tensorboard\]'"),
        open_trackers(["tensorboard"], RunFolder(tmp_path)),
    ):
        pass
