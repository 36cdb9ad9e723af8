"""The command ``simulate``: what it prints, writes and refuses; ``draw_fleet``'s fleets."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from cloud_aggregator.simulation.command import simulate
from cloud_aggregator.simulation.devices import Devices
from cloud_aggregator.simulation.settings import load_simulation
from device_profiles.errors import InputError
from device_profiles.fleet import draw_fleet, find_fleet

SMALL = ["--devices", "30", "--cohort", "5", "--rounds", "3"]


def test_it_writes_what_it_prints(tmp_path: Path) -> None:
    out = CliRunner().invoke(simulate, [*SMALL, "--out", str(tmp_path), "--json"])
    assert out.exit_code == 0
    written = json.loads((tmp_path / "simulation.json").read_text())
    assert json.loads(out.stdout) == written
    assert written["basis"] == "modelled"
    with (tmp_path / "rounds.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["accepted"]) for row in rows] == [5, 5, 5]
    compute = sum(float(row["compute_joules_modelled"]) for row in rows)
    assert compute == pytest.approx(written["totals"]["joules"]["compute"])


def test_a_table_says_that_it_is_modelled_and_options_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('mode = "fedbuff"\ndevices = 30\ncohort = 6\nrounds = 2\nbuffer_size = 3\n')
    out = CliRunner().invoke(simulate, [str(file), "--rounds", "4"])
    assert out.exit_code == 0
    assert "fedbuff, 30 devices, uniform, always (modelled)" in out.stdout
    assert "accepted 12" in out.stdout  # four times three


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"cohort": 20, "devices": 10}, "cohort = 20 of devices = 10; choose at most"),
        ({"buffer_size": 4}, "buffer_size = 4 with mode 'synchronous'; it belongs to 'fedbuff'"),
        ({"mode": "fedbuff", "quorum": 0.5}, "quorum = 0.5 with mode 'fedbuff'; it belongs to"),
        ({"on_hours": 1.0}, "on_hours = 1.0 with availability 'always'; it belongs to 'churn'"),
        ({"mode": "fedbuff", "buffer_size": 200}, "buffer_size = 200 with cohort = 100; choose"),
        ({"device": 4}, "options: unknown key 'device'; did you mean 'devices'?"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, object], told: str) -> None:
    with pytest.raises(InputError, match=f"^{told}"):
        load_simulation(None, options)


@pytest.mark.parametrize("fleet", ["mixed", "one-of-each"])
def test_a_fleet_has_the_order_that_a_run_would_have(fleet: str) -> None:
    devices = Devices(load_simulation(None, {"devices": 11, "cohort": 2, "fleet": fleet}))
    drawn = draw_fleet(find_fleet(fleet), 11, 0)
    assert [devices.kinds[kind].profile for kind in devices.kind] == [one.profile for one in drawn]
