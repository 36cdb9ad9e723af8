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
)
from device_profiles.profile import catalog

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


def test_a_device_has_its_profiles_lora_count_unless_the_fleet_says_otherwise() -> None:
    own = Fleet(member=[Member(profile="raspberry-pi-5-8gb", share=1)])
    other = Fleet(member=[Member(profile="raspberry-pi-5-8gb", share=1, lora_count=30)])
    assert draw_fleet(own, 1, seed=0)[0].lora_count == 12
    assert draw_fleet(other, 1, seed=0)[0].lora_count == 30


@pytest.mark.parametrize("name", sorted(fleets()))
def test_every_bundled_fleet_can_be_drawn(name: str) -> None:
    devices = draw_fleet(find_fleet(name), 10, seed=0)
    assert len(devices) == 10
    assert {device.profile.name for device in devices} <= set(catalog())


def test_the_mixed_fleet_has_four_jetsons_three_pis_and_three_laptops_in_ten() -> None:
    drawn = Counter(device.profile.short for device in draw_fleet(find_fleet("mixed"), 10, seed=0))
    assert drawn == {"orin": 4, "pi5": 3, "laptop": 3}


def test_a_fleet_of_no_clients_is_refused() -> None:
    with pytest.raises(InputError, match="clients = 0; a fleet has at least 1"):
        draw_fleet(find_fleet("mixed"), 0, seed=0)


def test_an_unknown_fleet_is_told_with_the_nearest() -> None:
    with pytest.raises(InputError, match=r"unknown fleet 'mixd'; did you mean 'mixed'\?"):
        find_fleet("mixd")


ONE = '[[member]]\nprofile = "laptop-x86-cpu"\nshare = 1.0\n'


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
        ("title = 'none'\n", r"'member' is missing; add it"),
        ("member = []\n", r"member = \[\]: .*at least 1 item"),
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


@pytest.mark.parametrize("count", [12, 24, 36])
def test_lora_counts_from_12_to_36_pass(count: int) -> None:
    assert check_lora_count(count, "lora_count") == count


@pytest.mark.parametrize("count", [-1, 0, 11, 37])
def test_lora_counts_outside_12_to_36_are_refused(count: int) -> None:
    with pytest.raises(InputError, match=rf"--lora = {count}; choose 12 to 36"):
        check_lora_count(count, "--lora")
