"""Separate programs, one killed, whose reward models are more than heads on the base.

They are adapters on the trunk, whole trunks, and heads on an encoder.
"""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from tests.edge_client.reward.encoders import write_encoder
from tests.end_to_end.conftest import await_line, read_run, start
from tests.end_to_end.rewards import write_data
from tests.end_to_end.test_deployment import _no_process_is_left, configure, finish, processes

__all__ = ["_no_process_is_left", "processes"]  # fixtures

pytestmark = pytest.mark.broker

STAGES = "instruction,reward,alignment"
SECTIONS = """
[reward]
rounds = 1
local_steps = 3
batch_size = 2

[alignment]
rounds = 1
local_steps = 1

[alignment.settings]
rollouts = 4
max_new_tokens = 6
held_out_prompts = 2
"""


DEVICES = ("one", "two")


def write_configurations(what: str, folder: Path, url: str, base: Path) -> tuple[str, list[str]]:
    """Write what the aggregator and two devices are started with; return their paths."""
    same: dict[str, object] = {
        "run": what, "broker": url, "stages": STAGES, "model": str(base), "adapter_size": 4,
    }  # fmt: skip
    if what == "encoder":
        encoder = write_encoder(folder / "bert", positions=128, letters=True)
        same["reward_trunk"] = str(encoder)
    else:
        same["reward_shares"] = what
    small = {
        "clients": 2, "minimum_clients": 2, "rounds": 1, "local_steps": 1, "batch_size": 2,
        "codec": "fp32", "max_length": 64,
    }  # fmt: skip
    cloud = Path(configure("cloud.toml", folder, {**same, **small, "out": str(folder / "run")}))
    cloud.write_text(cloud.read_text() + SECTIONS)
    files = write_data(folder)
    own = {
        **same,
        "data": files["data"],
        "helpfulness_data": files["helpfulness"],
        "harmlessness_data": files["harmlessness"],
        "trunk_precision": "fp32" if what == "all" else "int8",
    }
    named = [{**own, "client": name, "folder": str(folder / name)} for name in DEVICES]
    return str(cloud), [configure("laptop.toml", folder, each) for each in named]


@pytest.mark.parametrize("what", ["adapters", "all", "encoder"])
def test_a_device_killed_in_reward_learning_goes_on_to_the_end(
    what: str,
    broker: str,
    tiny_checkpoint: Path,
    tmp_path: Path,
    processes: list[subprocess.Popen[str]],
) -> None:
    config, own = write_configurations(what, tmp_path, broker, tiny_checkpoint)
    cloud = start("aggregator", "--config", config)
    devices = [start("client", "--config", each) for each in own]
    processes += [cloud, *devices]
    for device in devices:
        await_line(device, lambda said: "connected" in said)
    await_line(cloud, lambda said: said.startswith("before: held-out pair"))
    devices[0].send_signal(signal.SIGKILL)
    devices[0].wait(60)
    devices[0] = start("client", "--config", own[0])
    processes.append(devices[0])
    for process in (cloud, *devices):
        finish(process)
    run = read_run(tmp_path / "run")
    assert [(r["stage"], r["accepted"]) for r in run["rounds"]] == [
        (stage, [*DEVICES]) for stage in STAGES.split(",")
    ]
    learned = load_file(tmp_path / "run" / "global" / "2" / "shared.safetensors")
    trunk = {name for name in learned if ".trunk." in name}
    assert bool(trunk) == (what != "encoder")
    assert any(".adapters." in name for name in trunk) == (what == "adapters")
    assert all(abs(t).max() > 0 for n, t in learned.items() if n.endswith("inner.weight"))
    for client in run["rounds"][-1]["clients"]:
        assert client["reward_helpfulness"] is not None
        assert client["reward_harmlessness"] is not None
