"""A run of all three stages that is over in seconds: two clients with a few rows and pairs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cloud_aggregator.experiment import Experiment, load_experiment

Made = Callable[..., Experiment]

#: Of an experiment; stages are one round, two and one.
SMALL: dict[str, Any] = {
    "stages": "instruction,reward,alignment", "partition": "iid", "clients": 2, "rounds": "1,2,1",
    "local_steps": "1,3,1", "batch_size": 2, "reward_batch_size": 2, "max_length": 64,
    "rollouts": 4, "max_new_tokens": 6, "held_out_prompts": 2, "adapter_size": 4,
    "transport": "memory",
}  # fmt: skip
STAGES = ["instruction", "reward", "reward", "alignment"]


def write_data(folder: Path) -> dict[str, str]:
    """Write rows and pairs below a folder; return the experiment's settings that name them."""

    def write(name: str, rows: list[dict[str, str]]) -> str:
        path = folder / f"{name}.jsonl"
        path.write_text("\n".join(json.dumps(row) for row in rows))
        return str(path)

    data = [{"instruction": f"Say {i}", "output": f"The number {i}."} for i in range(12)]
    files = {"data": write("rows", data)}
    ends = {"helpfulness": ("The number", "No"), "harmlessness": ("A", "Go")}
    for name, (better, worse) in ends.items():
        rows = [
            {"instruction": f"Name {name} {i}", "chosen": f"{better} {i}.", "rejected": worse}
            for i in range(12)
        ]
        files[name] = write(name, rows)
    return files


def maker(folder: Path, **settings: Any) -> Made:
    """Return what makes small experiments on data that it writes below a folder.

    Args:
        folder: Of the data.
        settings: Of all of them, in place of the small ones.
    """
    files = write_data(folder)
    return lambda **how: load_experiment(None, {**files, **SMALL, **settings, **how})
