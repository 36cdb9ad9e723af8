"""What `pwff devices plan` says."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from device_profiles.errors import InputError
from device_profiles.profile import Profile, catalog, write_profile
from edge_client import measure_command
from edge_client.devices_command import devices
from edge_client.machine_profile import THIS_MACHINE

PAGE = Path(__file__).parents[2] / "docs" / "devices.md"


def run(*words: str) -> Result:
    return CliRunner(catch_exceptions=False).invoke(devices, ["plan", *words])


def values(*words: str) -> Any:
    return json.loads(run(*words, "--json").stdout)


def test_the_page_of_plans_is_what_the_command_prints() -> None:
    assert run("--all", "--markdown").stdout == PAGE.read_text()


def test_every_device_of_the_catalog_has_a_plan_of_12_to_36() -> None:
    plans = {p["profile"].partition("@")[0]: p["lora_count"] for p in values("--all")}
    assert set(plans) == set(catalog())
    assert all(12 <= count <= 36 for count in plans.values())


@pytest.mark.parametrize("name", sorted(catalog()))
def test_a_reader_can_compute_the_policys_count_from_the_printed_inputs(name: str) -> None:
    planned = values(name)
    given = planned["inputs"]
    scores = {
        "memory": math.log2(given["free_bytes"] / 2e9) / 3,
        "time": math.log10(given["deadline_seconds"] / given["seconds_with_12"]),
        "energy": math.log10(
            given["energy_joules"]
            / (given["watts"] * given["seconds_with_12"] + given["uplink_joules_fp32"])
        ),
        "data": math.log10(given["samples"] / 500),
    }
    assert planned["scores"] == pytest.approx(scores, rel=1e-9)
    lowest = min(1.0, max(0.0, min(scores.values())))
    assert planned["policy_count"] == 12 + math.floor(24 * lowest)
    assert planned["lora_count"] == min(planned["policy_count"], planned["hard_count"])


def test_less_of_anything_never_raises_the_count() -> None:
    name = "raspberry-pi-5-8gb"
    before = values(name)["lora_count"]
    for words in (("--deadline", "400"), ("--energy", "5000"), ("--samples", "900")):
        assert values(name, *words)["lora_count"] < before


def test_a_deadline_that_cannot_be_met_is_refused_with_what_it_would_take() -> None:
    with pytest.raises(InputError, match="the deadline is 1 s; give a longer deadline"):
        run("raspberry-pi-5-8gb", "--deadline", "1")


def test_too_little_energy_is_refused_with_what_it_would_take() -> None:
    with pytest.raises(InputError, match="the budget is 2 J; give more energy"):
        run("raspberry-pi-5-8gb", "--energy", "2")


def test_a_precision_that_the_device_lacks_is_refused_by_what_it_has() -> None:
    with pytest.raises(InputError, match="precision 'nf5' does not work on laptop-x86-cpu"):
        run("laptop-x86-cpu", "--precision", "nf5")


def test_one_precision_is_planned_with_it_alone() -> None:
    assert values("laptop-x86-cpu", "--precision", "int8")["precision"] == "int8"


@pytest.mark.parametrize(
    "words", [(), ("laptop-x86-cpu", "--all"), ("laptop-x86-cpu", "--this-machine")]
)
def test_neither_a_device_nor_all_and_more_than_one_are_refused(words: tuple[str, ...]) -> None:
    with pytest.raises(InputError, match="name one device, or give --all"):
        run(*words)


def test_this_machine_is_planned_by_what_was_measured_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sources = {"compute.flops": "measured on this machine, 2026-01-31"}
    mine = catalog()["laptop-x86-cpu"].model_copy(update={"name": "mine", "sources": sources})
    write_profile(mine, THIS_MACHINE)
    found = run("--this-machine", "--json")
    assert json.loads(found.stdout) == values(str(THIS_MACHINE))
    assert json.loads(found.stdout)["profile"] == "mine"
    assert found.stderr == "By this-machine.toml: measured on this machine, 2026-01-31.\n"


def test_a_machine_that_nobody_measured_is_measured_at_once_and_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    asked: list[float] = []

    def measured(*, seconds: float) -> tuple[Profile, None]:
        asked.append(seconds)
        return catalog()["raspberry-pi-5-8gb"], None

    monkeypatch.setattr(measure_command, "this_machine", measured)
    found = run("--this-machine", "--json")
    assert asked == [2.0]
    assert json.loads(found.stdout) == values("raspberry-pi-5-8gb")
    assert "no this-machine.toml in this folder: measured on the spot for 2 s." in found.stderr
    assert "pwff devices measure" in found.stderr
    assert not list(tmp_path.iterdir())


def test_a_base_of_another_shape_takes_less(tiny_checkpoint: Path) -> None:
    small = values("raspberry-pi-5-8gb", "--model", str(tiny_checkpoint), "--max-length", "64")
    whole = values("raspberry-pi-5-8gb")
    assert small["modelled"]["memory_bytes"] < whole["modelled"]["memory_bytes"]
    assert small["modelled"]["compute_seconds"] < whole["modelled"]["compute_seconds"]


def test_a_file_of_rows_is_counted(tmp_path: Path) -> None:
    rows = [{"instruction": f"Say {i}.", "input": "", "output": f"Word {i}."} for i in range(7)]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    assert values("laptop-x86-cpu", "--data", str(path))["inputs"]["samples"] == 7


def test_the_plan_is_shown_with_its_reasons_and_says_what_is_modelled() -> None:
    shown = run("jetson-orin-nano-8gb").stdout
    assert "LoRA modules" in shown
    assert "memory has the lowest score" in " ".join(shown.split())
    assert "* modelled" in shown
