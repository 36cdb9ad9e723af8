"""The experiments that come with the project: found by name, readable, and a run could begin."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from cloud_aggregator.emulation.emulate import emulate
from cloud_aggregator.emulation.plan import plan_run
from cloud_aggregator.experiment import load_experiment
from cloud_aggregator.experiments import about, find_experiment, listing, shipped
from cloud_aggregator.run_folder import RunFolder
from device_profiles.errors import InputError

NAMES = (
    "bad-links", "jetson-and-phones", "paper-consistent", "paper-literal", "straggler-storm",
    "thousand-devices",
)  # fmt: skip


def test_six_experiments_come_with_the_project() -> None:
    assert tuple(shipped()) == NAMES


def test_the_list_has_one_line_each_that_says_what_it_studies() -> None:
    for name, line in zip(NAMES, listing(), strict=True):
        said = about(shipped()[name])
        assert line.startswith(f"{name} ")
        assert line.endswith(said)
        assert 20 < len(said) <= 110  # "#" alone, or a line that no terminal holds
        assert said[-1] in ".?"  # a sentence that ends where its line does


@pytest.mark.parametrize("name", NAMES)
def test_a_run_of_each_could_begin(name: str, tmp_path: Path) -> None:
    options = {}
    if name == "thousand-devices":  # its own data come from a hub
        rows = tmp_path / "rows.jsonl"
        lines = [{"instruction": f"Say {n}", "output": f"It is {n}"} for n in range(2000)]
        rows.write_text("\n".join(map(json.dumps, lines)))
        options["data"] = str(rows)
    experiment = load_experiment(find_experiment(name), options)
    planned = plan_run(experiment, RunFolder(tmp_path / "run"))
    assert len(planned.fleet.clients) == experiment.clients
    assert all(client.train and client.held_out for client in planned.fleet.clients)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", NAMES)
def test_a_small_round_of_each_is_done(name: str, tmp_path: Path, tiny_checkpoint: Path) -> None:
    """With its own fleet, data split, link, codec, selection and deadline; fewer of everything."""
    few = {"clients": 6, "rounds": 1, "local_steps": 1, "held_out_share": 0.02}
    how = {"model": str(tiny_checkpoint), "data": "kit", "max_length": 64, "transport": "memory"}
    options: dict[str, object] = {**few, **how}
    path = find_experiment(name)
    if load_experiment(path, {}).cohort is not None:
        options["cohort"] = 3
    if name == "straggler-storm":
        options["deadline_seconds"] = 3600.0  # three phones may be all that is asked
    record = emulate(load_experiment(path, options), tmp_path / "run")
    assert (record.status, len(record.rounds), len(record.clients)) == ("done", 1, 6)
    assert record.rounds[0].accepted


def test_half_the_fleet_of_the_storm_are_phones(tmp_path: Path) -> None:
    experiment = load_experiment(find_experiment("straggler-storm"), {})
    planned = plan_run(experiment, RunFolder(tmp_path))
    kinds = Counter(client.device.profile.partition("@")[0] for client in planned.fleet.clients)
    assert kinds["phone-8gb"] == 15
    assert kinds.total() == 30


def test_a_file_goes_before_a_shipped_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "bad-links"
    own.write_text("clients = 2\n")
    monkeypatch.chdir(tmp_path)
    assert load_experiment(find_experiment("bad-links"), {}).clients == 2


def test_what_looks_like_a_path_is_one() -> None:
    assert find_experiment("some/bad-links") == Path("some/bad-links")
    assert find_experiment("bad-link.toml") == Path("bad-link.toml")


def test_an_unknown_name_is_told_with_the_nearest() -> None:
    with pytest.raises(InputError, match="no experiment 'bad-link'; did you mean 'bad-links'"):
        find_experiment("bad-link")
