"""What a device is: the catalog's figures, their sources, and what a file may say."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import pytest

from device_profiles.errors import InputError
from device_profiles.profile import catalog, find_profile

BOARD = """
name = "board"
title = "A board"
short = "board"
lora_count = 12

[compute]
flops = 1e9
watts = 5.0

[memory]
bytes = 1_000_000_000
bandwidth = 1e9

[radio]
snr_db = 5.0
bandwidth_hz = 1e6
transmit_watts = 1.0

[sources]
"compute.flops" = "assumed"
"""


def board(folder: Path, old: str = "", new: str = "") -> str:
    """Return the path of a profile file with ``old`` replaced by ``new``."""
    assert old in BOARD
    path = folder / "board.toml"
    path.write_text(BOARD.replace(old, new, 1) if old else BOARD)
    return str(path)


def test_catalog_names_each_profile_as_its_file() -> None:
    folder = resources.files("device_profiles") / "catalog"
    assert sorted(f"{name}.toml" for name in catalog()) == sorted(
        entry.name for entry in folder.iterdir() if entry.name.endswith(".toml")
    )


def test_catalog_holds_a_jetson_a_raspberry_pi_and_a_laptop() -> None:
    assert {profile.short for profile in catalog().values()} >= {"orin", "pi5", "laptop"}


def test_short_names_tell_the_profiles_apart() -> None:
    shorts = [profile.short for profile in catalog().values()]
    assert len(set(shorts)) == len(shorts)


@pytest.mark.parametrize("name", sorted(catalog()))
def test_every_figure_of_the_catalog_has_a_source(name: str) -> None:
    sources = catalog()[name].sources
    figures = {"compute.flops", "compute.watts", "memory.bytes", "memory.bandwidth"}
    assert set(sources) == figures | {"radio", "lora_count"}
    assert all(len(source.split()) >= 3 for source in sources.values())


@pytest.mark.parametrize(
    ("name", "flops", "watts", "gigabytes", "bandwidth"),
    [
        # Orin Nano data sheet: about 10 TFLOP/s fp16, 7 to 15 W, 68 GB/s; a quarter sustained.
        ("jetson-orin-nano-8gb", 10e12 / 4, 15, 8, 68e9),
        # 4,267 million transfers a second of 4 bytes are 17.07 GB/s, to two digits.
        ("raspberry-pi-5-8gb", 40e9, 11, 8, 17e9),
        # Two channels of 2,400 million transfers a second of 8 bytes.
        ("laptop-x86-cpu", 150e9, 41, 16, 2 * 2400e6 * 8),
    ],
)
def test_catalog_figures_are_those_of_their_sources(
    name: str, flops: float, watts: float, gigabytes: int, bandwidth: float
) -> None:
    profile = find_profile(name)
    assert (profile.compute.flops, profile.compute.watts) == (flops, watts)
    assert profile.memory.bytes == gigabytes * 10**9
    assert profile.memory.bandwidth == pytest.approx(bandwidth)


def test_a_faster_device_trains_more_lora_modules() -> None:
    counts = [
        find_profile(name).lora_count
        for name in ("raspberry-pi-5-8gb", "jetson-orin-nano-8gb", "laptop-x86-cpu")
    ]
    assert counts == [12, 24, 36]


def test_a_profile_is_found_by_its_file(tmp_path: Path) -> None:
    profile = find_profile(board(tmp_path))
    assert (profile.name, profile.radio.bandwidth_hz) == ("board", 1e6)


def test_an_unknown_profile_is_told_with_the_nearest() -> None:
    with pytest.raises(InputError) as err:
        find_profile("rasberry-pi-5")
    assert "unknown device profile 'rasberry-pi-5'" in str(err.value)
    assert "did you mean 'raspberry-pi-5-8gb'?" in str(err.value)
    assert "jetson-orin-nano-8gb" in str(err.value)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("bandwidth_hz = 1e6", "bandwidth_hz = -1.0", r"radio\.bandwidth_hz = -1\.0: .*than 0"),
        ("bandwidth_hz = 1e6", "bandwidth_hz = nan", r"radio\.bandwidth_hz = nan"),
        ("bandwidth_hz = 1e6", "bandwith_hz = 1e6", r"did you mean 'bandwidth_hz'"),
        ("snr_db = 5.0", "snr_db = 101.0", r"radio\.snr_db = 101\.0: .*less than or equal to 100"),
        ("snr_db = 5.0", "snr_db = inf", r"radio\.snr_db = inf"),
        ("transmit_watts = 1.0", "transmit_watts = -0.1", r"radio\.transmit_watts = -0\.1"),
        ("flops = 1e9", "flops = 0", r"compute\.flops = 0: .*greater than 0"),
        ("flops = 1e9", "flops = inf", r"compute\.flops = inf"),
        ("watts = 5.0", "", r"'compute\.watts' is missing; add it"),
        ("bytes = 1_000_000_000", "bytes = 0.5", r"memory\.bytes = 0\.5: .*integer"),
        ("bytes = 1_000_000_000", "bytes = 0", r"memory\.bytes = 0: .*greater than 0"),
        ("bandwidth = 1e9", "bandwidth = -1.0", r"memory\.bandwidth = -1\.0"),
        ("lora_count = 12", "lora_count = 11", r"lora_count = 11: .*greater than or equal to 12"),
        ("lora_count = 12", "lora_count = 37", r"lora_count = 37: .*less than or equal to 36"),
        ('name = "board"', 'name = "../board"', r"name = '\.\./board'"),
        ('short = "board"', 'short = "bo/ard"', r"short = 'bo/ard'"),
        ("[compute]", "[computer]", r"unknown key 'computer'; did you mean 'compute'"),
    ],
)  # fmt: skip
def test_a_wrong_figure_is_refused_by_file_field_and_bound(
    tmp_path: Path, old: str, new: str, says: str
) -> None:
    with pytest.raises(InputError, match=says) as err:
        find_profile(board(tmp_path, old, new))
    assert "board.toml: " in str(err.value)


def test_a_profile_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read .*absent\.toml"):
        find_profile(str(tmp_path / "absent.toml"))
