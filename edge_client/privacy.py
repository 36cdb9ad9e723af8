"""What a device keeps to itself while client-level differential privacy is on.

The aggregator clips and blurs what it makes of the updates (``cloud_aggregator.privacy``); losses,
counts and figures beside them would tell what the noise hides, so they stay here: every device
says that it has one example, and none says how well it does. What it took to train is then no
measure either, since it counts the device's tokens: it is priced by the task alone.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from device_profiles.errors import InputError
from edge_client.alignment.settings import PpoSettings, RlooSettings
from messaging.protocol import DeviceRecord, Task

if TYPE_CHECKING:
    from edge_client.local_client import Result
    from edge_client.stage_work import Trained


def withholds(task: Task, *, private: bool, client: str) -> bool:
    """Return whether a task's results are withheld: a private device always does.

    Raises:
        InputError: If the run asks for it and the device has already told what it holds.
    """
    if task.private and not private:
        raise InputError(
            f"the run '{task.run}' is private and '{client}' is not: it has told how many examples "
            "it holds; set private = true in its configuration and start it again"
        )
    return private


def withheld(result: Result) -> Result:
    """Return the result with nothing but its update and its costs.

    Each field is chosen to stay, none to go: a figure that is added later stays on the device.
    """
    return type(result)(costs=result.costs, examples=1, blob=result.blob)


def withheld_training(
    done: Trained,
    task: Task,
    *,
    rewards: int = 1,
    adapted: bool = False,
    encoded: bool = False,
) -> Trained:
    """Return a training of weight 1 without its loss, priced by what the task asks for.

    Rows count in full length, a device with fewer examples than a batch as one that has enough, and
    an update of a policy as one that goes through all its epochs.

    Args:
        done: What it gave.
        task: That asked for it.
        rewards: Reward models of the method.
        adapted: Whether something of each one's trunk is its own and trains with its head.
        encoded: Whether an encoder is their trunk.
    """
    rows, read = task.local_steps * task.batch_size, 0
    scored = 0  # by the encoder
    if task.stage == "reward":
        sides = 2 * rows * rewards  # there and back where there are adapters; else they are read
        rows, read = (sides, 0) if adapted else (0, sides)
        if encoded:
            read, scored = 0, sides
    elif task.alignment is not None and task.alignment.algorithm == "dpo":
        rows *= 2
        read = rows  # the stage-1 policy reads what is trained on
    elif task.alignment is not None:
        drawn = task.local_steps * task.alignment.rollouts
        ppo = task.alignment.algorithm == "ppo"
        epochs = PpoSettings().epochs if ppo else RlooSettings().epochs
        # drawn, and looked at by two policies and by the trunk: a bare one serves all rewards
        rows, read = drawn * epochs, drawn * (3 + (rewards if adapted else 1))
        scored = drawn if encoded else 0  # beside the trunk, which the critics read
    return replace(
        done,
        loss=None,
        weight=1,
        tokens=rows * task.max_length,
        rows=rows,
        read_tokens=read * task.max_length,
        encoder_tokens=scored * task.max_length,
    )


def withheld_record(device: DeviceRecord) -> DeviceRecord:
    """Return what a private device says of itself: one example, and one pair where it has any."""
    return device.model_copy(
        update={
            "examples": 1,
            "held_out_examples": 0,
            "preference_pairs": min(1, device.preference_pairs),
            "categories": {},
            "costs": "modelled",
        }
    )
