"""What a device is: the catalog's figures, their sources, and what a file may say."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import pytest

from device_profiles.cli import source_of
from device_profiles.config_files import check, read_toml
from device_profiles.errors import InputError
from device_profiles.profile import Profile, catalog, find_profile, places, write_profile

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


def stated(profile: Profile) -> set[str]:
    """Return the places of the figures that a profile's file gives."""
    found = {"lora_count", "battery_joules", "precisions", "backends"} & profile.model_fields_set
    for section in ("memory", "radio", "compute"):
        found |= {f"{section}.{name}" for name in getattr(profile, section).model_fields_set}
    if profile.modes:  # rate, power and bandwidth are filled in from the mode in force
        found -= {"compute.flops", "compute.watts"}
    for mode, figures in profile.modes.items():
        found |= {f"modes.{mode}.{name}" for name in figures.model_fields_set}
        found -= {"memory.bandwidth"} if figures.bandwidth else set()
    return found


@pytest.mark.parametrize("name", sorted(catalog()))
def test_every_figure_of_the_catalog_has_a_source(name: str) -> None:
    profile = catalog()[name]
    places = stated(profile)
    for place in places:
        source = source_of(place, profile.sources)
        assert source != "not stated", place
        assert len(source.split()) >= 3, place
    used = {place.rsplit(".", n)[0] for place in places for n in range(3)}
    assert set(profile.sources) <= used  # none that stands for nothing


@pytest.mark.parametrize("name", sorted(catalog()))
def test_a_training_rate_that_nobody_measured_says_that_it_is_assumed(name: str) -> None:
    profile = catalog()[name]
    rates = [place for place in stated(profile) if place.endswith(".flops")]
    assert rates
    assert all(source_of(place, profile.sources).startswith("assumed") for place in rates)


#: Name, FLOP/s, watts, gigabytes and bytes/s, computed from what the sources say.
FIGURES = [
    # Of NVIDIA's devices a quarter of the rate in fp16, and the larger end of the power.
    ("jetson-orin-nano-8gb", 10e12 / 4, 15, 8, 68e9),
    ("jetson-orin-nx-16gb", 15e12 / 4, 25, 16, 128 / 8 * 6400e6),
    ("jetson-agx-orin-64gb", 42.6e12 / 4, 60, 64, 256 / 8 * 6400e6),
    ("jetson-agx-thor-128gb", 60e12, 130, 128, 256 / 8 * 8532e6),
    # Without tensor cores, a sixth of it.
    ("jetson-nano-4gb", 472e9 / 6, 10, 4, 64 / 8 * 3200e6),
    # 4,267 million transfers a second of 4 bytes are 17.07 GB/s, to two digits.
    ("raspberry-pi-5-8gb", 40e9, 11, 8, 17e9),
    ("phone-8gb", 60e9, 5, 8, 64 / 8 * 6400e6),
    ("laptop-apple-m2", 150e9, 20, 16, 100e9),
    # Two channels of 2,400 million transfers a second of 8 bytes.
    ("laptop-x86-cpu", 150e9, 41, 16, 2 * 2400e6 * 8),
    ("laptop-x86-gpu-8gb", 11.6e12 / 4, 140, 8, 128 / 8 * 16e9),
    ("cloud-vm", 4 * 2.5e9 * 32 / 2, 60, 32, 40e9),
]


@pytest.mark.parametrize(("name", "flops", "watts", "gigabytes", "bandwidth"), FIGURES)
def test_catalog_figures_are_those_of_their_sources(
    name: str, flops: float, watts: float, gigabytes: int, bandwidth: float
) -> None:
    profile = find_profile(name)
    # The catalog gives two or three digits.
    assert profile.compute.flops == pytest.approx(flops, rel=0.02)
    assert profile.compute.watts == watts
    assert profile.memory.bytes == gigabytes * 10**9
    assert profile.memory.bandwidth == pytest.approx(bandwidth, rel=0.001)


def test_every_device_of_the_catalog_is_in_the_table_of_figures() -> None:
    assert sorted(row[0] for row in FIGURES) == sorted(catalog())


@pytest.mark.parametrize(
    ("name", "clock", "cores", "bandwidth"),
    [
        # GPU clock in MHz, share of the cores and memory clock of nvpmodel's modes, against the
        # mode that is in force.
        ("jetson-nano-4gb@5w", 640 / 921.6, 1, 1),
        ("jetson-orin-nano-8gb@7w", 408 / 625, 2 / 4, 1),
        ("jetson-orin-nano-8gb@25w", 918 / 625, 1, 102 / 68),
        ("jetson-orin-nx-16gb@10w", 612 / 918, 2 / 4, 2133 / 3200),
        ("jetson-orin-nx-16gb@15w", 612 / 918, 2 / 4, 1),
        ("jetson-orin-nx-16gb@25w", 408 / 918, 1, 1),
        ("jetson-orin-nx-16gb@40w", 1173 / 918, 1, 1),
        ("jetson-agx-orin-64gb@15w", 408 / 1300.5, 3 / 8, 2133 / 3200),
        ("jetson-agx-orin-64gb@30w", 612 / 1300.5, 4 / 8, 1),
        ("jetson-agx-orin-64gb@50w", 816 / 1300.5, 1, 1),
    ],
)
def test_power_modes_of_the_catalog_are_scaled_by_clock_and_cores(
    name: str, clock: float, cores: float, bandwidth: float
) -> None:
    usual, mode = find_profile(name.partition("@")[0]), find_profile(name)
    # The catalog gives three digits.
    assert mode.compute.flops == pytest.approx(usual.compute.flops * clock * cores, rel=0.005)
    assert mode.memory.bandwidth == pytest.approx(usual.memory.bandwidth * bandwidth, rel=0.005)
    assert mode.compute.watts == float(name.partition("@")[2].removesuffix("w"))


def test_the_catalog_says_which_devices_are_for_emulation_alone_and_why() -> None:
    only = {name for name, profile in catalog().items() if profile.emulation_only}
    assert only == {"jetson-nano-4gb", "phone-8gb"}
    assert all(catalog()[name].note for name in only)
    assert "JetPack 4" in catalog()["jetson-nano-4gb"].note


def test_every_device_of_the_catalog_has_memory_left_for_training() -> None:
    for profile in catalog().values():
        assert "reserved_bytes" in profile.memory.model_fields_set
        assert profile.memory.free_bytes >= 2e9


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
        ("bandwidth_hz = 1e6", "bandwidth_hz = -1.0", r"radio\.bandwidth_hz = -1\.0: negative;"),
        ("bandwidth_hz = 1e6", "bandwidth_hz = nan", r"radio\.bandwidth_hz = nan"),
        ("bandwidth_hz = 1e6", "bandwith_hz = 1e6", r"did you mean 'bandwidth_hz'"),
        ("snr_db = 5.0", "snr_db = 101.0", r"radio\.snr_db = 101\.0: .*less than or equal to 100"),
        ("snr_db = 5.0", "snr_db = inf", r"radio\.snr_db = inf"),
        ("transmit_watts = 1.0", "transmit_watts = -0.1", r"radio\.transmit_watts = -0\.1"),
        ("flops = 1e9", "flops = 0", r"compute\.flops = 0: .*greater than 0"),
        ("flops = 1e9", "flops = inf", r"compute\.flops = inf"),
        ("bandwidth_hz = 1e6", 'bandwidth_hz = "1 MHx"', r"bandwidth_hz = '1 MHx': unknown unit"),
        ("bandwidth_hz = 1e6", 'bandwidth_hz = "1 W"', r"bandwidth_hz = '1 W': 'W' is a unit of p"),
        ("snr_db = 5.0", 'snr_db = "101 dB"', r"radio\.snr_db = '101 dB': .*less than or equal to"),
        ("watts = 5.0", "", r"'compute\.watts' is missing; add it"),
        ("flops = 1e9\nwatts = 5.0", "", r"'compute\.flops' is missing; add it with 'watts', or"),
        ("watts = 5.0", "watts = 5.0\nidle_watts = 6", r"compute: idle_watts = 6 is above wat"),
        ("watts = 5.0", "watts = 5.0\nwats = 5.0", r"unknown key 'compute\.wats'; did you mean 'w"),
        ("bytes = 1_000_000_000", "bytes = 0.5", r"memory\.bytes = 0\.5: .*integer"),
        ("bytes = 1_000_000_000", "bytes = 0", r"memory\.bytes = 0: .*greater than 0"),
        ("bandwidth = 1e9", "bandwidth = -1.0", r"memory\.bandwidth = -1\.0"),
        ("bandwidth = 1e9", 'reserved_bytes = "1 GB"', r"'memory\.bandwidth' is missing; add it"),
        (
            "bandwidth = 1e9",
            'bandwidth = 1e9\nreserved_bytes = "1 GB"',
            r"memory: reserved_bytes = 1000000000 leaves nothing of bytes = 1000000000; give less",
        ),
        ("[memory]", "[memry]", r"unknown key 'memry'; did you mean 'memory'"),
        (
            "[memory]\nbytes = 1_000_000_000\nbandwidth = 1e9",
            "",
            r"'memory' is missing; add a table \[memory\] with 'bytes' and 'bandwidth'",
        ),
        (
            "[compute]\nflops = 1e9\nwatts = 5.0",
            "",
            r"'compute' is missing; add a table \[compute\] with 'flops' and 'watts'",
        ),
        ("lora_count = 12", "battery_joules = -1", r"battery_joules = -1: negative"),
        ("lora_count = 12", 'battery_joules = "18 W"', r"battery_joules = '18 W': .*an energy"),
        ("lora_count = 12", 'precisions = ["fp16"]', r"precisions\.0 = 'fp16': .*'fp32', 'bf16'"),
        ("lora_count = 12", "precisions = []", r"precisions = \[\]: .*at least 1"),
        ("lora_count = 12", 'backends = ["gpu"]', r"backends\.0 = 'gpu': .*'cpu', 'cuda'"),
        ("lora_count = 12", 'mode = "7w"', r"mode = '7w': no such power mode; add \[modes\.7w\]"),
        ("lora_count = 12", 'mode = ["7w"]', r"mode = \['7w'\]: .*string"),
        ('"compute.flops"', '"compute.flop"', r"unknown key 'sources\.compute\.flop'; did you"),
        ('"compute.flops"', '"camera"', r"unknown key 'sources\.camera'"),
        ('= "assumed"', '= ""', r"sources\.compute\.flops = '': .*at least 1"),
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


def test_every_figure_of_a_file_may_have_a_unit(tmp_path: Path) -> None:
    text = BOARD
    for old, new in [
        ("flops = 1e9", 'flops = "1 GFLOP/s"'),
        ("watts = 5.0", 'watts = "5000 mW"'),
        ("bytes = 1_000_000_000", 'bytes = "1 GB"'),
        ("bandwidth = 1e9", 'bandwidth = "1 GB/s"'),
        ("snr_db = 5.0", 'snr_db = "5 dB"'),
        ("bandwidth_hz = 1e6", 'bandwidth_hz = "1 MHz"'),
        ("transmit_watts = 1.0", 'transmit_watts = "1 W"'),
    ]:
        assert old in text
        text = text.replace(old, new, 1)
    path = tmp_path / "units.toml"
    path.write_text(text)
    assert find_profile(str(path)) == find_profile(board(tmp_path))


MODES = """
name = "board"
title = "A board with power modes"
short = "board"
mode = "15w"

[compute]
idle_watts = "2 W"

[modes.7w]
flops = "1 GFLOP/s"
watts = "7 W"
bandwidth = "10 GB/s"

[modes.15w]
flops = "3 GFLOP/s"
watts = "15 W"
bandwidth = "30 GB/s"

[memory]
bytes = "4 GB"

[radio]
snr_db = 5
bandwidth_hz = "1 MHz"
transmit_watts = 1
"""


def moded(folder: Path, old: str = "", new: str = "") -> str:
    """Return the path of a profile with power modes, with ``old`` replaced by ``new``."""
    assert old in MODES
    path = folder / "moded.toml"
    path.write_text(MODES.replace(old, new, 1) if old else MODES)
    return str(path)


def test_the_mode_in_force_gives_rate_power_and_bandwidth(tmp_path: Path) -> None:
    profile = find_profile(moded(tmp_path))
    assert (profile.compute.flops, profile.compute.watts) == (3e9, 15)
    assert profile.compute.idle_watts == 2
    assert (profile.memory.bytes, profile.memory.bandwidth) == (4e9, 30e9)


def test_another_mode_changes_rate_power_and_bandwidth_and_nothing_else(tmp_path: Path) -> None:
    usual = find_profile(moded(tmp_path))
    other = usual.at_mode("7W")
    assert (other.compute.flops, other.compute.watts) == (1e9, 7)
    assert (other.compute.idle_watts, other.memory.bandwidth) == (2, 10e9)
    assert other.mode == "7w"
    assert other.at_mode("15w") == usual
    assert find_profile(moded(tmp_path) + "@7w") == other


def test_a_bandwidth_beside_the_modes_holds_in_all_of_them(tmp_path: Path) -> None:
    text = MODES.replace('bandwidth = "10 GB/s"\n', "").replace('bandwidth = "30 GB/s"\n', "")
    path = tmp_path / "flat.toml"
    path.write_text(text.replace('bytes = "4 GB"', 'bytes = "4 GB"\nbandwidth = "20 GB/s"'))
    assert find_profile(str(path)).memory.bandwidth == 20e9
    assert find_profile(f"{path}@7w").memory.bandwidth == 20e9


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('mode = "15w"', 'mode = "15"', r"mode = '15': no such power mode; .*one of 7w, 15w"),
        ('mode = "15w"', 'mode = ["15w"]', r"mode = \['15w'\]: .*string"),
        ('mode = "15w"', "", r"'mode' is missing; add the name of the power mode in force"),
        ('mode = "15w"', 'mod = "15w"', r"unknown key 'mod'; did you mean 'mode'"),
        ("idle_watts", "flops = 1e9\nidle_watts", r"leave both out of \[compute\]"),
        ("idle_watts", "watts = 16\nidle_watts", r"leave both out of \[compute\]"),
        ("bytes =", "bandwidth = 1e9\nbytes =", r"leave it out of \[memory\]"),
        ('bandwidth = "10 GB/s"', "", r"give each power mode its 'bandwidth', or \[memory\] one"),
        ('bandwidth = "30 GB/s"', "", r"'memory\.bandwidth' is missing; add it"),
        ('watts = "7 W"', "", r"'modes\.7w\.watts' is missing; add it"),
        ('watts = "7 W"', 'wats = "7 W"', r"unknown key 'modes\.7w\.wats'; did you mean 'watts'"),
        ('watts = "7 W"', 'watts = "1 W"', r"idle_watts = 2 is above watts of mode '7w' = 1"),
        ("[modes.7w]", '[modes."7 W"]', r"modes\.7 W.* = '7 W': .*pattern"),
        ('bytes = "4 GB"', "", r"'memory\.bytes' is missing; add it"),
    ],
)
def test_modes_that_contradict_are_refused(tmp_path: Path, old: str, new: str, says: str) -> None:
    with pytest.raises(InputError, match=says) as err:
        find_profile(moded(tmp_path, old, new))
    assert "moded.toml: " in str(err.value)


def test_an_unknown_mode_is_told_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"power mode of board '15v'; did you mean '15w'\?"):
        find_profile(moded(tmp_path) + "@15v")
    with pytest.raises(InputError, match="board has no power modes; leave out '15w'"):
        find_profile(board(tmp_path) + "@15w")
    with pytest.raises(InputError, match="unknown power mode of jetson-orin-nano-8gb ''"):
        find_profile("jetson-orin-nano-8gb@")


def test_a_folder_may_have_the_sign_of_modes_in_its_name(tmp_path: Path) -> None:
    folder = tmp_path / "me@home"
    folder.mkdir()
    assert find_profile(board(folder)).name == "board"
    assert find_profile(moded(folder) + "@7w").mode == "7w"


#: Profiles of every form a file may have.
FORMS = {
    "plain": BOARD,
    "modes": MODES,
    "cycles": BOARD.replace(
        "flops = 1e9\nwatts = 5.0",
        'kappa = 1e-28\nflops_per_cycle = 8\nfrequency_hz = "2 GHz"\nidle_watts = 0.1',
    ),
    "catalog": None,
}


@pytest.mark.parametrize("form", FORMS)
def test_a_profile_that_was_written_is_read_as_the_same(tmp_path: Path, form: str) -> None:
    text = FORMS[form]
    if text is None:
        profiles = list(catalog().values())
        profiles += [p.at_mode(mode) for p in profiles for mode in p.modes]
    else:
        (tmp_path / "first.toml").write_text(text)
        profiles = [find_profile(str(tmp_path / "first.toml"))]
    # What came as JSON has every figure stated, those that are absent too.
    profiles += [Profile.model_validate_json(profile.model_dump_json()) for profile in profiles]
    for profile in profiles:
        write_profile(profile, tmp_path / "second.toml")
        assert find_profile(str(tmp_path / "second.toml")) == profile
    assert sorted(entry.name for entry in tmp_path.iterdir() if "new" in entry.name) == []


def test_what_follows_from_other_figures_is_not_written_beside_them(tmp_path: Path) -> None:
    path = tmp_path / "second.toml"
    write_profile(find_profile(moded(tmp_path)), path)
    content = read_toml(path)
    assert (content["compute"], content["memory"]) == ({"idle_watts": 2}, {"bytes": 4_000_000_000})
    (tmp_path / "first.toml").write_text(FORMS["cycles"] or "")
    write_profile(find_profile(str(tmp_path / "first.toml")), path)
    assert set(read_toml(path)["compute"]) == {
        "kappa", "flops_per_cycle", "frequency_hz", "idle_watts"
    }  # fmt: skip


@pytest.mark.parametrize("form", ["plain", "modes", "cycles"])
def test_a_profile_passes_through_plain_values_and_json(tmp_path: Path, form: str) -> None:
    text = FORMS[form]
    assert text is not None
    path = tmp_path / "board.toml"
    path.write_text(text)
    profile = find_profile(str(path))
    assert check(Profile, profile.model_dump(), "values") == profile
    assert Profile.model_validate_json(profile.model_dump_json()) == profile


def test_writing_replaces_a_profile_that_was_there(tmp_path: Path) -> None:
    path = tmp_path / "board.toml"
    path.write_text("no TOML = at all =")
    write_profile(catalog()["phone-8gb"], path)
    assert find_profile(str(path)) == catalog()["phone-8gb"]


def test_a_profile_that_cannot_be_written_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot write .*absent.board\.toml: No such file"):
        write_profile(catalog()["phone-8gb"], tmp_path / "absent" / "board.toml")
    (tmp_path / "folder.toml").mkdir()
    with pytest.raises(InputError, match=r"cannot write .*folder\.toml"):
        write_profile(catalog()["phone-8gb"], tmp_path / "folder.toml")
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder.toml"]


def test_places_are_those_of_the_file(tmp_path: Path) -> None:
    found = places(find_profile(moded(tmp_path)))
    assert {"lora_count", "compute.kappa", "memory.reserved_bytes", "modes.7w.watts"} <= set(found)
    assert len(found) == len(set(found)) == 4 + 6 + 3 + 5 + 2 * 3
