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


def withheld_training(done: Trained, task: Task, *, adapted_rewards: int = 0) -> Trained:
    """Return a training of weight 1 without its loss, priced by what the task asks for.

    Rows count in full length, and a device with fewer examples than a batch as one that has enough.

    Args:
        done: What it gave.
        task: That asked for it.
        adapted_rewards: Reward models whose trunk has adapters, which train: as many take the steps
            of reward learning through it. 0 where the trunk is bare.
    """
    rows, read = task.local_steps * task.batch_size, 0
    if task.stage == "reward" and adapted_rewards:  # both sides of every pair, there and back
        rows = 2 * rows * adapted_rewards
    elif task.stage == "reward":  # the trunk reads both sides of every pair, and trains nothing
        rows, read = 0, 2 * rows
    elif task.alignment is not None:
        dpo = task.alignment.algorithm == "dpo"
        rows = task.local_steps * (2 * task.batch_size if dpo else task.alignment.rollouts)
        read = rows  # the stage-1 policy reads what is trained on
    return replace(
        done,
        loss=None,
        weight=1,
        tokens=rows * task.max_length,
        rows=rows,
        read_tokens=read * task.max_length,
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
