"""A run before it starts: what planning takes, and who is dealt to whom."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cloud_aggregator.emulation.plan import plan_run, turn_weight, worker_specs
from cloud_aggregator.experiment import Experiment
from cloud_aggregator.run_folder import RunFolder


def test_planning_a_run_and_checking_its_memory_loads_no_torch() -> None:
    """The process that starts the workers is small, and starts them at once."""
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from cloud_aggregator.emulation import emulate, plan, room\n"
        "from cloud_aggregator.experiment import Experiment\n"
        "from cloud_aggregator.run_folder import RunFolder\n"
        "planned = plan.plan_run(Experiment(partition='iid'), RunFolder(Path('nowhere')))\n"
        "room.check_room(planned)\n"
        "heavy = {'torch', 'transformers', 'sklearn', 'ray'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_clients_are_dealt_so_that_no_worker_has_a_clients_work_more_than_another() -> None:
    experiment = Experiment(clients=9, workers=3, partition="iid", skew=1.0)
    planned = plan_run(experiment, RunFolder(Path("nowhere")))
    weights = {c.device.id: turn_weight(planned, c) for c in planned.fleet.clients}
    specs = worker_specs(planned)
    dealt = [c.device.id for spec in specs for c in spec.clients]
    assert sorted(dealt) == sorted(weights)
    loads = [sum(weights[c.device.id] for c in spec.clients) for spec in specs]
    # Graham's bound for dealing the largest first: no load is above the least by a whole client
    assert max(loads) - min(loads) <= max(weights.values())


def test_a_clients_turn_weighs_what_it_trains_and_what_it_measures() -> None:
    experiment = Experiment(clients=2, partition="iid", local_steps=5, batch_size=4)
    planned = plan_run(experiment, RunFolder(Path("nowhere")))
    client = planned.fleet.clients[0]
    # 540 rows a client, a fifth of them held out; a trained row counts for three
    assert (client.device.examples, client.device.held_out_examples) == (432, 108)
    size = 1 + client.device.trainable_parameters / planned.identity.parameters
    assert turn_weight(planned, client) == pytest.approx((3 * 5 * 4 + 108) * size)
