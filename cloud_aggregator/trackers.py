"""Trackers that follow a run beside its own record: TensorBoard event files, and MLflow.

Both are told what the run's listeners are told, and read a round's figures off the record. A
tracker that is switched on when a run goes on is given the rounds before, too. Units are the
record's: seconds, joules, bytes, nats; accuracy is a share in [0, 1].
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from cloud_aggregator.records import RoundRecord, RunRecord
from cloud_aggregator.run_folder import RunFolder, write_atomically
from device_profiles.config_files import choose
from device_profiles.errors import InputError
from quantization.errors import MissingExtraError

#: Name of MLflow's experiment; its runs have the run's own name.
MLFLOW_EXPERIMENT = "pwff"
_MLFLOW_RUN = "mlflow-run"  # file of a run's folder: the run's id there
_ENDED = {"done": "FINISHED", "stopped": "KILLED", "running": "KILLED", "failed": "FAILED"}


class _Tracker(Protocol):
    """Something that keeps figures by name and round; ``is_new`` if it has none of this run yet."""

    is_new: bool

    def log(self, figures: dict[str, float], round_: int) -> None: ...

    def close(self, status: str) -> None: ...


class _TensorBoard:
    """Event files in ``tensorboard`` in the run's folder, by tensorboardX."""

    def __init__(self, folder: RunFolder, record: RunRecord) -> None:
        from tensorboardX import SummaryWriter

        del record
        where = folder.path / "tensorboard"
        self.is_new = not where.exists()
        self._writer = SummaryWriter(str(where))

    def log(self, figures: dict[str, float], round_: int) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, round_)
        self._writer.flush()

    def close(self, status: str) -> None:
        del status
        self._writer.close()


class _MLflow:
    """A run of MLflow, where MLFLOW_TRACKING_URI says or MLflow's own default is."""

    def __init__(self, folder: RunFolder, record: RunRecord) -> None:
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient

        kept = folder.path / _MLFLOW_RUN
        self.is_new = not kept.exists()
        try:
            self._client = MlflowClient()
            if self.is_new:
                self._run = self._begin(record)
            else:
                self._run = kept.read_text().strip()
                self._client.update_run(self._run, status="RUNNING")
        except MlflowException as err:
            raise InputError(
                f"MLflow cannot be written to: {str(err)[:300]}; set MLFLOW_TRACKING_URI to a "
                "store that takes runs, or leave --track mlflow out"
            ) from err
        write_atomically(kept, self._run.encode())

    def _begin(self, record: RunRecord) -> str:
        known = self._client.get_experiment_by_name(MLFLOW_EXPERIMENT)
        home = known.experiment_id if known else self._client.create_experiment(MLFLOW_EXPERIMENT)
        run = str(self._client.create_run(home, run_name=record.run).info.run_id)
        said = {
            "method": record.method,
            "seed": record.seed,
            "stages": ",".join(record.stages),
            "codec": record.codec,
            "model": record.model.name,
            "data": record.data.source,
        }
        for name, value in said.items():
            self._client.log_param(run, name, value)
        return run

    def log(self, figures: dict[str, float], round_: int) -> None:
        for name, value in figures.items():
            self._client.log_metric(self._run, name, value, step=round_)

    def close(self, status: str) -> None:
        self._client.set_terminated(self._run, _ENDED[status])


#: By name, which is also that of the extra: the package that it takes, and how it is opened.
TRACKERS: dict[str, tuple[str, Callable[[RunFolder, RunRecord], _Tracker]]] = {
    "tensorboard": ("tensorboardX", _TensorBoard),
    "mlflow": ("mlflow", _MLflow),
}


def check_trackers(names: Sequence[str]) -> None:
    """Refuse a tracker that is not known or not installed.

    Raises:
        InputError: With the nearest known name.
        MissingExtraError: Naming the extra.
    """
    for name in names:
        package, _ = TRACKERS[choose("tracker", name, TRACKERS)]
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError(
                f"tracker '{name}' takes {package}, which is not installed: "
                f"`pip install 'pwff[{name}]'`"
            )


@contextlib.contextmanager
def open_trackers(names: Sequence[str], folder: RunFolder) -> Iterator[Callable[..., None]]:
    """Yield a listener of a run's events that feeds these trackers, and see that they are closed.

    They open with the event ``plan``, which brings the run's record, and close with ``end``.

    Raises:
        InputError: If a tracker is unknown or its store is not usable.
        MissingExtraError: If a tracker's package is not installed.
    """
    check_trackers(names)
    opened: list[_Tracker] = []
    records: list[RunRecord] = []

    def tell(event: str, **fields: Any) -> None:
        if event == "plan":
            records.append(fields["record"])
            for name in names:
                tracker = TRACKERS[name][1](folder, records[0])
                opened.append(tracker)
                if tracker.is_new:
                    _catch_up(tracker, records[0])
        elif event == "before":
            figures = {f"global/{k}": v for k, v in fields.items() if isinstance(v, float)}
            _log_all(opened, figures, len(records[0].rounds))
        elif event == "round":
            done = next(r for r in records[0].rounds if r.round == fields["round"])
            _log_all(opened, round_figures(done), done.round)
        elif event == "end":
            close()

    def close() -> None:
        while opened:
            opened.pop().close(records[0].status)

    try:
        yield tell
    finally:
        close()


def round_figures(record: RoundRecord) -> dict[str, float]:
    """Return a round's figures by name: ``global/FIGURE``, and ``FIGURE/CLIENT`` of each client.

    What was not measured, or not sent, is left out.
    """
    figures: dict[str, float | None] = {
        **{f"global/{name}": value for name, value in record.global_.model_dump().items()},
        "global/virtual_seconds": record.virtual_seconds,
        "global/upload_bytes": float(sum(c.upload_bytes for c in record.clients)),
    }
    for client in record.clients:
        figures[f"eval_accuracy/{client.id}"] = client.eval_accuracy
        figures[f"reward_accuracy/{client.id}"] = client.reward_accuracy
        if client.upload_bytes:
            figures[f"uplink_seconds/{client.id}"] = client.uplink_seconds
            figures[f"uplink_joules/{client.id}"] = client.uplink_joules
    return {name: value for name, value in figures.items() if value is not None}


def _catch_up(tracker: _Tracker, record: RunRecord) -> None:
    for done in record.rounds:
        tracker.log(round_figures(done), done.round)


def _log_all(trackers: Sequence[_Tracker], figures: dict[str, float], round_: int) -> None:
    for tracker in trackers:
        tracker.log(figures, round_)
