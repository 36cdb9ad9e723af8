"""A fleet is its shares in whole devices, in an order that the seed gives."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from device_profiles.errors import InputError
from device_profiles.fleet import (
    Fleet,
    Member,
    check_lora_count,
    draw_fleet,
    find_fleet,
    fleets,
    lora_count_of,
)
from device_profiles.planning import profile_lora_count
from device_profiles.profile import catalog, find_profile

NAMES = ("jetson-orin-nano-8gb", "raspberry-pi-5-8gb", "laptop-x86-cpu")


def fleet_of(*shares: float) -> Fleet:
    """Return a fleet of the catalog's devices, told apart by their LoRA counts from 12 up."""
    return Fleet(
        member=[
            Member(profile=NAMES[i % 3], share=share, lora_count=12 + i)
            for i, share in enumerate(shares)
        ]
    )


def counts(fleet: Fleet, clients: int) -> list[int]:
    """Return how many devices each member of ``fleet_of`` got."""
    drawn = Counter(device.lora_count for device in draw_fleet(fleet, clients, seed=0))
    return [drawn[12 + i] for i in range(len(fleet.member))]


def written(folder: Path, text: str) -> str:
    path = folder / "fleet.toml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize(
    ("clients", "expected"),
    [
        (10, [4, 3, 3]),
        (7, [3, 2, 2]),  # 2.8, 2.1, 2.1: the largest remainder is the first's
        (4, [2, 1, 1]),  # 1.6, 1.2, 1.2
        (5, [2, 2, 1]),  # 2.0, 1.5, 1.5: a tie, the earlier one first
        (3, [1, 1, 1]),  # 1.2, 0.9, 0.9: both remainders are above the first's
        (1, [1, 0, 0]),  # 0.4, 0.3, 0.3
    ],
)
def test_shares_become_whole_devices_by_largest_remainder(
    clients: int, expected: list[int]
) -> None:
    assert counts(fleet_of(0.4, 0.3, 0.3), clients) == expected


def test_equal_shares_of_a_third_give_the_first_the_odd_one() -> None:
    assert counts(fleet_of(1 / 3, 1 / 3, 1 / 3), 100) == [34, 33, 33]


@given(weights=st.lists(st.integers(1, 50), min_size=1, max_size=12), clients=st.integers(1, 300))
def test_every_member_is_within_one_device_of_its_share(weights: list[int], clients: int) -> None:
    fleet = fleet_of(*(weight / sum(weights) for weight in weights))
    got = counts(fleet, clients)
    assert sum(got) == clients
    for count, weight in zip(got, weights, strict=True):
        # In whole numbers, so that no rounding of the shares plays a part.
        assert abs(count * sum(weights) - weight * clients) < sum(weights)


def test_the_same_seed_draws_the_same_fleet() -> None:
    fleet = find_fleet("mixed")
    assert draw_fleet(fleet, 20, seed=3) == draw_fleet(fleet, 20, seed=3)


def test_another_seed_draws_another_order_and_other_preferences() -> None:
    fleet = find_fleet("mixed")
    one, two = draw_fleet(fleet, 20, seed=3), draw_fleet(fleet, 20, seed=4)
    assert [device.id for device in one] != [device.id for device in two]
    assert [device.preference for device in one] != [device.preference for device in two]


def test_devices_are_named_after_their_kind_and_their_place() -> None:
    for place, device in enumerate(draw_fleet(find_fleet("mixed"), 120, seed=0)):
        assert device.id == f"{device.profile.short}-{place:02d}"
        assert re.fullmatch(r"[a-z0-9-]{1,23}", device.id)


def test_preferences_lie_in_the_unit_interval_and_are_spread() -> None:
    weights = [device.preference for device in draw_fleet(find_fleet("mixed"), 400, seed=0)]
    assert 0 <= min(weights) <= max(weights) <= 1
    # Uniform on [0, 1]: standard deviation of the mean sqrt(1/12/400) = 0.0144.
    assert sum(weights) / 400 == pytest.approx(0.5, abs=5 * 0.0144)


def test_a_device_has_its_planned_lora_count_unless_the_fleet_says_otherwise() -> None:
    planned = profile_lora_count(find_profile("raspberry-pi-5-8gb"))
    own = Fleet(member=[Member(profile="raspberry-pi-5-8gb", share=1)])
    other = Fleet(member=[Member(profile="raspberry-pi-5-8gb", share=1, lora_count=planned + 1)])
    assert draw_fleet(own, 1, seed=0)[0].lora_count == planned
    assert draw_fleet(other, 1, seed=0)[0].lora_count == planned + 1


def test_a_profile_that_states_its_lora_count_has_it_instead_of_the_plans() -> None:
    profile = find_profile("raspberry-pi-5-8gb")
    other = profile_lora_count(profile) + 1
    assert lora_count_of(profile.model_copy(update={"lora_count": other}), None) == other


@pytest.mark.parametrize("name", sorted(fleets()))
def test_every_bundled_fleet_can_be_drawn(name: str) -> None:
    fleet = find_fleet(name)
    devices = draw_fleet(fleet, fleet.size or 10, seed=0)
    assert len(devices) == (fleet.size or 10)
    assert len({device.id for device in devices}) == len(devices)
    assert {device.profile.name for device in devices} <= set(catalog())


def test_the_mixed_fleet_has_four_jetsons_three_pis_and_three_laptops_in_ten() -> None:
    drawn = Counter(device.profile.short for device in draw_fleet(find_fleet("mixed"), 10, seed=0))
    assert drawn == {"orin": 4, "pi5": 3, "laptop": 3}


def test_the_mixed_fleet_is_drawn_as_ever() -> None:
    # As drawn before fleets had overrides: runs with the same seed have the same devices.
    drawn = draw_fleet(find_fleet("mixed"), 10, seed=0)
    assert " ".join(device.id for device in drawn) == (
        "orin-00 orin-01 pi5-02 pi5-03 laptop-04 laptop-05 orin-06 laptop-07 pi5-08 orin-09"
    )
    assert [d.lora_count for d in drawn] == [24, 24, 12, 12, 36, 36, 24, 36, 12, 24]
    assert {(d.profile.radio.snr_db, d.profile.radio.transmit_watts) for d in drawn} == {
        (5.0, 1.0), (2.0, 0.5), (10.0, 1.0)
    }  # fmt: skip


def test_one_of_each_has_every_device_of_the_catalog_once() -> None:
    drawn = draw_fleet(find_fleet("one-of-each"), len(catalog()), seed=0)
    assert sorted(device.profile.name for device in drawn) == sorted(catalog())


def test_the_fleet_of_jetsons_and_phones_uses_power_modes() -> None:
    drawn = draw_fleet(find_fleet("jetsons-and-phones"), 10, seed=0)
    modes = Counter((device.profile.short, device.profile.mode) for device in drawn)
    assert modes == {
        ("phone", None): 5, ("nano", "10w"): 1, ("orin", "7w"): 2, ("orin", "25w"): 1,
        ("agx", "maxn"): 1,
    }  # fmt: skip


def test_a_fleet_of_no_clients_is_refused() -> None:
    with pytest.raises(InputError, match="clients = 0; a fleet has at least 1"):
        draw_fleet(find_fleet("mixed"), 0, seed=0)


def test_an_unknown_fleet_is_told_with_the_nearest() -> None:
    with pytest.raises(InputError, match=r"unknown fleet 'mixd'; did you mean 'mixed'\?"):
        find_fleet("mixd")


ONE = '[[member]]\nprofile = "laptop-x86-cpu"\nshare = 1.0\n'
ORIN = '[[member]]\nprofile = "jetson-orin-nano-8gb"\nshare = 1.0\n'
NAMED = '[[device]]\nid = "lab-pi"\nprofile = "raspberry-pi-5-8gb"\n'


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (ONE.replace("1.0", "0.9"), r"shares of the members sum to 0\.9; make them sum to 1"),
        (ONE + ONE, r"shares of the members sum to 2; make them sum to 1"),
        (ONE.replace("1.0", "0"), r"member\.0\.share = 0: .*greater than 0"),
        (ONE.replace("1.0", "1.5"), r"member\.0\.share = 1\.5: .*less than or equal to 1"),
        (ONE.replace("1.0", "nan"), r"member\.0\.share = nan"),
        (ONE.replace("share", "shares"), r"unknown key 'member\.0\.shares'; did you mean 'share'"),
        (ONE.replace("laptop-x86", "labtop-x86"), r"did you mean 'laptop-x86-cpu'"),
        (ONE + "lora_count = 11\n", r"lora_count of member 1 = 11; choose 12 to 36"),
        (ONE + "lora_count = 37\n", r"lora_count of member 1 = 37; choose 12 to 36"),
        ("title = 'none'\n", r"either \[\[member\]\] tables, .*or \[\[device\]\].*is neither"),
        ("member = []\n", r"either \[\[member\]\] tables, .*there is neither"),
        (ONE + NAMED, r"give either \[\[member\]\] tables, for a mix, or \[\[device\]\] tables"),
        (ONE + "count = 3\n", r"member\.0: give either 'share' or 'count'"),
        (ONE.replace("share = 1.0\n", ""), r"member\.0: give either 'share' or 'count'"),
        (ONE.replace("share = 1.0", "count = 0"), r"member\.0\.count = 0: .*greater than 0"),
        (ONE + ONE.replace("share = 1.0", "count = 1"), r"some members have a share and some a c"),
        (ONE + "snr_db = 101\n", r"member\.0\.snr_db = 101: .*less than or equal to 100"),
        (ONE + "bandwidth_hz = 0\n", r"member\.0\.bandwidth_hz = 0: .*greater than 0"),
        (ONE + "transmit_watts = -1\n", r"member\.0\.transmit_watts = -1: negative"),
        (ONE + "bandwidth_hz = '1 W'\n", r"bandwidth_hz = '1 W': 'W' is a unit of power"),
        (ONE + "mode = '7w'\n", r"fleet\.toml: member 1: laptop-x86-cpu has no power modes"),
        (ORIN + "mode = '8w'\n", r"fleet\.toml: member 1: unknown power mode of .*'8w'; choose"),
        (ORIN.replace("8gb", "8gb@7w") + "mode = '15w'\n", r"member 1 has mode = '15w' and profi"),
        ("seed = -1\n" + ONE, r"seed = -1: .*greater than or equal to 0"),
        ("seed = 1\n" + NAMED, r"'seed' orders a mix, and named devices have an order"),
        (NAMED + NAMED, r"two devices have the id 'lab-pi'; give each its own"),
        (NAMED.replace("lab-pi", "Lab Pi"), r"device\.0\.id = 'Lab Pi': .*pattern"),
        (NAMED.replace('id = "lab-pi"\n', ""), r"'device\.0\.id' is missing; add it"),
        (NAMED + "share = 0.5\n", r"unknown key 'device\.0\.share'"),
        (NAMED + "lora_count = 11\n", r"lora_count of device 1 = 11; choose 12 to 36"),
        (NAMED.replace("pi-5-8gb", "pi-5"), r"fleet\.toml: device 1: .*'raspberry-pi-5-8gb'"),
    ],
)
def test_a_wrong_fleet_file_is_refused_with_the_field_and_the_bound(
    tmp_path: Path, text: str, says: str
) -> None:
    with pytest.raises(InputError, match=says):
        find_fleet(written(tmp_path, text))


def test_a_profile_file_is_looked_for_beside_the_fleets_file(tmp_path: Path) -> None:
    source = Path(str(fleets()["mixed"])).parents[1] / "catalog" / "raspberry-pi-5-8gb.toml"
    text = source.read_text().replace("raspberry-pi-5-8gb", "own-board")
    (tmp_path / "board.toml").write_text(text)
    fleet = find_fleet(written(tmp_path, ONE.replace("laptop-x86-cpu", "board.toml")))
    assert draw_fleet(fleet, 1, seed=0)[0].profile.name == "own-board"


def test_a_profile_file_beside_the_fleet_may_be_asked_for_in_a_power_mode(tmp_path: Path) -> None:
    source = Path(str(fleets()["mixed"])).parents[1] / "catalog" / "jetson-orin-nano-8gb.toml"
    (tmp_path / "board.toml").write_text(source.read_text())
    for text in (
        ORIN.replace("jetson-orin-nano-8gb", "board.toml@7w"),
        ORIN.replace("jetson-orin-nano-8gb", "board.toml") + 'mode = "7W"\n',
    ):
        (device,) = draw_fleet(find_fleet(written(tmp_path, text)), 1, seed=0)
        assert device.profile == find_profile("jetson-orin-nano-8gb@7w")


def test_a_member_has_its_own_link_and_the_rest_from_its_profile(tmp_path: Path) -> None:
    text = ONE + 'snr_db = "-3 dB"\nbandwidth_hz = "180 kHz"\ntransmit_watts = "0.2 W"\n'
    (device,) = draw_fleet(find_fleet(written(tmp_path, text)), 1, seed=0)
    usual = find_profile("laptop-x86-cpu")
    radio = device.profile.radio
    assert (radio.snr_db, radio.bandwidth_hz, radio.transmit_watts) == (-3, 180_000, 0.2)
    assert device.profile.model_copy(update={"radio": usual.radio}) == usual


def test_a_power_of_0_is_an_override_too(tmp_path: Path) -> None:
    text = ONE + "snr_db = 0\ntransmit_watts = 0\n"
    (device,) = draw_fleet(find_fleet(written(tmp_path, text)), 1, seed=0)
    assert (device.profile.radio.snr_db, device.profile.radio.transmit_watts) == (0, 0)


COUNTS = """
[[member]]
profile = "laptop-x86-cpu"
count = 2

[[member]]
profile = "raspberry-pi-5-8gb"
count = 3
"""


def test_members_with_counts_are_so_many_in_a_seeded_order(tmp_path: Path) -> None:
    fleet = find_fleet(written(tmp_path, COUNTS))
    assert fleet.size == 5
    orders = set()
    for seed in range(8):
        drawn = draw_fleet(fleet, 5, seed)
        assert Counter(device.profile.short for device in drawn) == {"laptop": 2, "pi5": 3}
        orders.add(tuple(device.id for device in drawn))
    assert len(orders) > 1


@pytest.mark.parametrize("clients", [4, 6])
def test_a_fleet_of_another_size_than_the_run_is_refused(tmp_path: Path, clients: int) -> None:
    fleet = find_fleet(written(tmp_path, COUNTS))
    with pytest.raises(InputError, match=f"clients = {clients}, and the fleet has 5 devices"):
        draw_fleet(fleet, clients, seed=0)


def test_a_mix_by_shares_has_the_size_of_the_run() -> None:
    assert find_fleet("mixed").size is None


def test_a_fleets_seed_fixes_the_order_and_leaves_the_preferences_to_the_run(
    tmp_path: Path,
) -> None:
    mixed = Path(str(fleets()["mixed"])).read_text()
    fleet = find_fleet(written(tmp_path, "seed = 7\n" + mixed))
    one, two = draw_fleet(fleet, 20, seed=3), draw_fleet(fleet, 20, seed=4)
    usual = draw_fleet(find_fleet("mixed"), 20, seed=7)
    assert [d.id for d in one] == [d.id for d in two] == [d.id for d in usual]
    assert [d.preference for d in one] != [d.preference for d in two]


def test_named_devices_keep_their_names_and_their_order(tmp_path: Path) -> None:
    text = "".join(
        NAMED.replace("lab-pi", name) + f"lora_count = {count}\n"
        for name, count in (("zoe", 30), ("lab-pi", 12), ("anna", 20))
    )
    fleet = find_fleet(written(tmp_path, text))
    assert fleet.size == 3
    for seed in range(3):
        drawn = draw_fleet(fleet, 3, seed)
        assert [(d.id, d.lora_count) for d in drawn] == [("zoe", 30), ("lab-pi", 12), ("anna", 20)]


def test_named_devices_may_differ_from_their_profile(tmp_path: Path) -> None:
    text = (
        '[[device]]\nid = "mine"\nprofile = "jetson-orin-nano-8gb"\nmode = "7w"\nsnr_db = 12\n'
        + NAMED
    )
    mine, pi = draw_fleet(find_fleet(written(tmp_path, text)), 2, seed=0)
    assert (mine.profile.mode, mine.profile.compute.watts, mine.profile.radio.snr_db) == (
        "7w", 7, 12
    )  # fmt: skip
    assert pi.profile == find_profile("raspberry-pi-5-8gb")


@pytest.mark.parametrize("count", [12, 24, 36])
def test_lora_counts_from_12_to_36_pass(count: int) -> None:
    assert check_lora_count(count, "lora_count") == count


@pytest.mark.parametrize("count", [-1, 0, 11, 37])
def test_lora_counts_outside_12_to_36_are_refused(count: int) -> None:
    with pytest.raises(InputError, match=rf"--lora = {count}; choose 12 to 36"):
        check_lora_count(count, "--lora")
