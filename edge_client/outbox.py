"""The update that a device still owes the aggregator, on its disk until it has been taken.

One file: a line of JSON that says which task it is of and what its offer will say, then the blob.
"""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

from edge_client.disk import replace_file
from edge_client.local_client import Result
from messaging.protocol import Costs, Task

log = logging.getLogger(__name__)

_FILE = "update-outgoing"


class Outbox:
    """One device's finished update.

    Args:
        folder: Of the device's states.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / _FILE

    def put(self, task: Task, result: Result) -> None:
        """Keep what came of a task, in the place of whatever was kept; without a blob, nothing is.

        Raises:
            DiskError: If the disk does not take it.
        """
        blob = result.blob
        if blob is None:
            return
        said = {
            "task": task_key(task),
            "sha256": hashlib.sha256(blob).hexdigest(),
            "examples": result.examples,
            "train_loss": result.train_loss,
            "costs": result.costs.model_dump(),
        }
        head = json.dumps(said).encode() + b"\n"

        def write(path: Path) -> None:
            with path.open("wb") as file:
                file.write(head)
                file.write(blob)

        replace_file(self._path, write)

    def of(self, task: Task) -> Result | None:
        """Return what came of this task before the device was started again, or none."""
        try:
            head, _, blob = self._path.read_bytes().partition(b"\n")
        except FileNotFoundError:
            return None
        try:
            said: dict[str, Any] = json.loads(head)
            whole = hashlib.sha256(blob).hexdigest() == said["sha256"]
            result = Result(
                costs=Costs.model_validate(said["costs"]),
                examples=said["examples"],
                blob=blob,
                train_loss=said["train_loss"],
            )
            same = said["task"] == task_key(task)
        except (ValueError, KeyError, TypeError) as err:
            whole, same, result = False, False, None
            log.debug("%s: %s", self._path, err)
        if not whole:
            log.warning("%s is damaged: the round is trained again, to the same bits", self._path)
            self.clear()
            return None
        return result if same else None

    def clear(self) -> None:
        """Forget it: the aggregator has it, refuses it, or asks for something else by now."""
        self._path.unlink(missing_ok=True)


def task_key(task: Task) -> list[object]:
    """Return what makes a task the one that it is, as JSON carries it: two alike are one task."""
    state = None if task.state is None else task.state.blob
    return [task.run, task.client, task.work, task.stage, task.round, state]
