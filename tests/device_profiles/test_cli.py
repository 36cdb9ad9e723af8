"""`pwff devices`: every figure beside its unit and its source, and the same for a script."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from device_profiles.cli import derived, devices, source_of, summary, why, with_unit
from device_profiles.errors import InputError
from device_profiles.planning import profile_lora_count
from device_profiles.profile import catalog, find_profile

ROOT = Path(__file__).parents[2]

BOARD = """
name = "board"
title = "A board [red]of mine[/red]"
short = "board"
lora_count = 20

[compute]
flops = 3.2e10
watts = 7.5

[memory]
bytes = 4_000_000_000
bandwidth = 1.28e10

[radio]
snr_db = -2.5
bandwidth_hz = 180_000
transmit_watts = 0.2

[sources]
"compute.flops" = "measured on a Tuesday"
"radio" = "data sheet of the modem"
"radio.snr_db" = "drive test"
"""


def run(*arguments: str) -> Result:
    """Return what a call in a wide terminal gives."""
    return CliRunner(env={"COLUMNS": "200"}).invoke(devices, arguments)


def row(output: str, figure: str) -> str:
    """Return the one line of the table that begins with ``figure``, its columns one space apart."""
    (line,) = [line for line in output.splitlines() if line.split()[:1] == [figure]]
    return " ".join(line.split())


def test_list_gives_each_profile_with_its_figures_in_units() -> None:
    output = run("list").stdout
    # 2.5e12 FLOP/s, 8e9 B, 1e6 Hz of the catalog
    assert row(output, "jetson-orin-nano-8gb") == (
        "jetson-orin-nano-8gb NVIDIA Jetson Orin Nano 8 GB 24 8 GB 2.5 TFLOP/s 15 W "
        "5 dB, 1 MHz, 1 W"
    )
    assert all(row(output, name) for name in catalog())


def test_names_stay_whole_in_a_narrow_terminal() -> None:
    output = CliRunner(env={"COLUMNS": "80"}).invoke(devices, ["list"]).stdout
    assert all(row(output, name) for name in catalog())


def test_list_for_scripts_holds_the_profiles_in_si_units() -> None:
    listed = {profile["name"]: profile for profile in json.loads(run("list", "--json").stdout)}
    assert set(listed) == set(catalog())
    assert listed["raspberry-pi-5-8gb"]["compute"] == {
        "flops": 40e9,
        "watts": 11.0,
        "idle_watts": 3.3,
    }
    assert listed["raspberry-pi-5-8gb"]["memory"]["bytes"] == 8_000_000_000


def test_show_gives_every_figure_of_a_file_with_unit_and_source(tmp_path: Path) -> None:
    path = tmp_path / "board.toml"
    path.write_text(BOARD)
    output = run("show", str(path)).stdout
    assert "A board [red]of mine[/red]" in output  # a title is text, not markup
    assert row(output, "lora_count") == "lora_count 20 modules not stated"
    assert row(output, "compute.flops") == "compute.flops 32 GFLOP/s measured on a Tuesday"
    assert row(output, "compute.watts") == "compute.watts 7.5 W not stated"
    assert row(output, "memory.bytes") == "memory.bytes 4 GB not stated"
    assert row(output, "memory.bandwidth") == "memory.bandwidth 12.8 GB/s not stated"
    assert row(output, "radio.snr_db") == "radio.snr_db -2.5 dB drive test"
    assert row(output, "radio.bandwidth_hz") == "radio.bandwidth_hz 180 kHz data sheet of the modem"
    assert row(output, "radio.transmit_watts") == (
        "radio.transmit_watts 0.2 W data sheet of the modem"
    )


@pytest.mark.parametrize("name", sorted(catalog()))
def test_no_figure_of_the_catalog_is_shown_without_its_source(name: str) -> None:
    output = run("show", name).stdout
    assert "not stated" not in output
    values = json.loads(run("show", name, "--json").stdout)
    figures = [f for f in ("lora_count", "battery_joules", "precisions", "backends") if f in values]
    figures += [f"{s}.{f}" for s in ("compute", "memory", "radio") for f in values[s]]
    figures += [f"modes.{m}.{f}" for m, mode in values["modes"].items() for f in mode]
    assert len(figures) >= 12
    assert all(row(output, figure) for figure in figures)


def test_show_for_scripts_holds_the_profile_as_in_its_file(tmp_path: Path) -> None:
    path = tmp_path / "board.toml"
    path.write_text(BOARD)
    shown = json.loads(run("show", str(path), "--json").stdout)
    assert shown["radio"] == {
        "snr_db": -2.5, "bandwidth_hz": 180_000, "transmit_watts": 0.2, "circuit_watts": 0,
        "receive_watts": 0,
    }  # fmt: skip
    assert shown["sources"]["compute.flops"] == "measured on a Tuesday"


def test_list_marks_what_is_for_emulation_alone() -> None:
    output = run("list").stdout
    marked = {line.split()[0] for line in output.splitlines() if " * " in line and " W " in line}
    assert marked == {"jetson-nano-4gb", "phone-8gb"}
    assert "* Emulation only." in output


def test_list_shows_the_lora_count_that_is_planned() -> None:
    planned = profile_lora_count(find_profile("jetson-agx-orin-64gb"))
    assert f" GB {planned} 64 GB " in row(run("list").stdout, "jetson-agx-orin-64gb")


def test_show_tells_a_default_from_a_figure_without_a_source(tmp_path: Path) -> None:
    path = tmp_path / "board.toml"
    path.write_text(BOARD)
    output = run("show", str(path)).stdout
    # A quarter of 4 GB.
    assert row(output, "memory.reserved_bytes") == (
        "memory.reserved_bytes 1 GB default, assumed: a quarter of the memory, at most 4 GB"
    )
    assert row(output, "radio.circuit_watts") == "radio.circuit_watts 0 W default: not counted"
    assert row(output, "precisions") == "precisions fp32 default: what every device can hold"
    path.write_text(BOARD.replace("bandwidth = 1.28e10", "bandwidth = 1\nreserved_bytes = 1e9"))
    assert row(run("show", str(path)).stdout, "memory.reserved_bytes").endswith("1 GB not stated")


def test_show_gives_rate_and_power_of_the_power_mode_asked_for() -> None:
    output = run("show", "jetson-orin-nano-8gb@7w").stdout
    assert row(output, "compute.watts") == "compute.watts 7 W power mode 7w"
    assert row(output, "compute.flops") == "compute.flops 816 GFLOP/s power mode 7w"
    assert row(output, "memory.bandwidth") == "memory.bandwidth 68 GB/s power mode 7w"
    assert row(output, "modes.15w.watts").startswith("modes.15w.watts 15 W power budget")
    assert "Power mode: 7w; others: jetson-orin-nano-8gb@15w, jetson-orin-nano-8gb@25w." in output


def test_a_bandwidth_that_no_mode_states_keeps_its_source() -> None:
    nano = find_profile("jetson-nano-4gb").model_copy(update={"sources": {"memory": "data sheet"}})
    assert why("memory.bandwidth", nano) == "data sheet"
    assert why("compute.flops", nano) == "power mode 10w"


def test_show_says_that_a_clock_gives_rate_and_power(tmp_path: Path) -> None:
    path = tmp_path / "board.toml"
    cycles = "kappa = 1e-27\nflops_per_cycle = 16\nfrequency_hz = 2e9"
    path.write_text(
        BOARD.replace("flops = 3.2e10\nwatts = 7.5", cycles).replace(
            '"compute.flops"', '"compute.kappa"'
        )
    )
    output = run("show", str(path)).stdout
    assert row(output, "compute.kappa") == "compute.kappa 1e-27 measured on a Tuesday"
    assert row(output, "compute.frequency_hz") == "compute.frequency_hz 2 GHz not stated"
    # 16 * 2e9 FLOP/s and 1e-27 * (2e9)**3 W
    assert row(output, "compute.flops").startswith("compute.flops 32 GFLOP/s flops_per_cycle x ")
    assert row(output, "compute.watts") == "compute.watts 8 W kappa x frequency cubed"


def test_show_says_what_the_figures_come_to() -> None:
    output = run("show", "phone-8gb").stdout
    # 8 - 4 GB; 5 W / 60 GFLOP/s; 19 Wh / 5 W.
    assert "Free for training: 4 GB of 8 GB." in output
    assert "Energy of training: 0.08333 J per GFLOP." in output
    assert "Battery: 3.8 h of training at full power." in output
    assert row(output, "battery_joules").startswith("battery_joules 68.4 kJ (19 Wh) ")
    assert "Emulation only: this software does not run on it." in output
    assert find_profile("phone-8gb").note.split(".")[0] in output


def test_show_is_silent_about_what_a_device_does_not_have() -> None:
    said = " ".join(summary(find_profile("raspberry-pi-5-8gb")))
    assert not [word for word in ("Battery", "Power mode", "Emulation") if word in said]


def test_derived_figures_are_there_for_scripts() -> None:
    shown = json.loads(run("show", "phone-8gb", "--json").stdout)
    assert shown["derived"]["free_bytes"] == 4e9
    assert shown["derived"]["battery_hours"] == pytest.approx(3.8, rel=1e-12)  # rounding alone
    assert shown["emulation_only"] is True
    assert "mode" not in shown
    assert "battery_hours" not in derived(find_profile("cloud-vm"))


def test_unknown_name_is_bad_input_with_the_nearest_name() -> None:
    error = run("show", "raspberry-pi-5").exception
    assert isinstance(error, InputError)
    assert "did you mean 'raspberry-pi-5-8gb'?" in str(error)


def test_command_ends_with_two_for_an_unknown_name_and_needs_no_traceback() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "pwff.py"), "devices", "show", "jetson-orin-nano"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: unknown device profile 'jetson-orin-nano'")
    assert "did you mean 'jetson-orin-nano-8gb'?" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_figures_own_source_goes_before_its_sections() -> None:
    sources = {"radio": "section", "radio.snr_db": "own"}
    assert source_of("radio.snr_db", sources) == "own"
    assert source_of("radio.bandwidth_hz", sources) == "section"
    assert source_of("lora_count", sources) == "not stated"
    modes = {"modes": "all of them", "modes.7w": "this one", "modes.7w.watts": "own"}
    assert source_of("modes.7w.watts", modes) == "own"
    assert source_of("modes.7w.flops", modes) == "this one"
    assert source_of("modes.15w.flops", modes) == "all of them"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0 W"),
        (0.25, "0.25 W"),
        (999.0, "999 W"),
        (1000.0, "1 kW"),
        (38.4e9, "38.4 GW"),
        (2**33, "8.59 GW"),  # 8,589,934,592
        (1e18, "1000 PW"),
    ],
)
def test_values_have_a_decimal_prefix_and_four_digits(value: float, text: str) -> None:
    assert with_unit(value, "W") == text


def test_a_device_that_affords_no_lora_module_is_shown_all_the_same() -> None:
    usual = find_profile("cloud-vm")
    slow = usual.model_copy(update={"compute": usual.compute.model_copy(update={"flops": 1e6})})
    assert "lora_count" not in derived(slow)
    assert summary(slow)[0] == "LoRA modules: not even 12 in the reference job (pwff devices plan)."
