"""`pwff devices`: every figure beside its unit and its source, and the same for a script."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from device_profiles.cli import devices, source_of, with_unit
from device_profiles.errors import InputError
from device_profiles.profile import catalog

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
    assert listed["raspberry-pi-5-8gb"]["compute"] == {"flops": 40e9, "watts": 11.0}
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
    places = [
        f"{section}.{figure}" if isinstance(values, dict) else section
        for section, values in catalog()[name].model_dump(exclude={"sources"}).items()
        for figure in (values if isinstance(values, dict) else [section])
    ]
    assert all(row(output, p) for p in places if p not in ("name", "title", "short"))


def test_show_for_scripts_holds_the_profile_as_in_its_file(tmp_path: Path) -> None:
    path = tmp_path / "board.toml"
    path.write_text(BOARD)
    shown = json.loads(run("show", str(path), "--json").stdout)
    assert shown["radio"] == {"snr_db": -2.5, "bandwidth_hz": 180_000, "transmit_watts": 0.2}
    assert shown["sources"]["compute.flops"] == "measured on a Tuesday"


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
