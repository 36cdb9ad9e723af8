"""Where a round's training stands, on disk, so that a device that is killed does not begin it anew.

One file with one flat array. It belongs to what the training was given: with another start, other
settings or other data it is not looked at, and the training begins. What is drawn at random is a
function of seed and place (``device_profiles.seeds``), so a count of steps is all that a stream's
state comes to. With it or without, a round gives the same bits.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from edge_client.disk import replace_file
from edge_client.restraint import Watched
from edge_client.state import TRAINING_FILE

log = logging.getLogger(__name__)


class StoppedError(Exception):
    """The device is to leave: what it was at is put down, to be taken up again."""

    exit_code = 130


class Interruption:
    """Says to whoever works for long that it is time to stop; set from a signal handler too."""

    def __init__(self) -> None:
        self.wanted = False

    def stop(self) -> None:
        """Ask for it."""
        self.wanted = True

    def check(self) -> None:
        """Return if there is nothing to stop for.

        Raises:
            StoppedError: If there is.
        """
        if self.wanted:
            raise StoppedError


@dataclass(frozen=True, kw_only=True)
class Standing:
    """A training after some of its steps.

    Attributes:
        losses: Of its steps, nats.
        rows: Examples that went through the model.
        tokens: Their tokens.
        values: What trains, and Adam's first and second moments. Shape (3, size).
        watched: What early stopping has seen; none without it.
    """

    losses: list[float]
    rows: int
    tokens: int
    values: npt.NDArray[np.float32]
    watched: Watched | None = None


class Progress:
    """The checkpoint of one device's training.

    Args:
        folder: Of the device's states.
        interruption: Looked at after every step.
        every_steps: Steps between checkpoints, at least 1; none for one only when it is stopped.
    """

    def __init__(
        self, folder: Path, interruption: Interruption, *, every_steps: int | None = None
    ) -> None:
        self.interruption = interruption
        self._folder = folder
        self._path = folder / TRAINING_FILE
        self._every = every_steps

    def beside(self, name: str) -> Progress:
        """Return the checkpoint of another training of the same round."""
        other = Progress(self._folder, self.interruption, every_steps=self._every)
        other._path = self._folder / f"{TRAINING_FILE}-{name}"
        return other

    def begun(self, fingerprint: str) -> Standing | None:
        """Return where the training of this fingerprint stood, or none."""
        if not self._path.exists():
            return None
        try:
            with safe_open(self._path, "np") as file:
                said = json.loads(file.metadata()["pwff"])
                if said.pop("fingerprint") != fingerprint:
                    return None
                watched = said.pop("watched")
                if watched is not None:
                    watched = Watched(best=file.get_tensor("best"), **watched)
                standing = Standing(values=file.get_tensor("values"), watched=watched, **said)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as err:
            log.warning("%s is damaged (%s): the round begins anew", self._path, err)
            return None
        log.info("the training goes on after step %d", len(standing.losses))
        return standing

    def stepped(self, fingerprint: str, steps: int, standing: Callable[[], Standing]) -> None:
        """Take note of ``steps`` steps; write down where the training stands if it is time.

        Raises:
            StoppedError: If the device is to leave; where it stands is on the disk.
            DiskError: If the disk does not take it.
        """
        stopping = self.interruption.wanted
        if stopping or (self._every is not None and steps % self._every == 0):
            self._write(fingerprint, standing())
        if stopping:
            raise StoppedError

    def ended(self, fingerprint: str, standing: Standing) -> None:
        """Write down what a training came to, where another of the same round follows it.

        Raises:
            DiskError: If the disk does not take it.
        """
        self._write(fingerprint, standing)

    def _write(self, fingerprint: str, standing: Standing) -> None:
        said = {
            "fingerprint": fingerprint,
            "losses": standing.losses,
            "rows": standing.rows,
            "tokens": standing.tokens,
            "watched": None,
        }
        arrays, watched = {"values": standing.values}, standing.watched
        if watched is not None:
            arrays["best"] = watched.best
            said["watched"] = {
                "best_loss": watched.best_loss,
                "best_step": watched.best_step,
                "looked": watched.looked,
                "looks": watched.looks,
                "waited": watched.waited,
            }
        metadata = {"pwff": json.dumps(said)}
        replace_file(self._path, lambda new: save_file(arrays, new, metadata=metadata))
