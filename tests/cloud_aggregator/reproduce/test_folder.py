"""A comparison's folder: what it remembers, and what it refuses to be."""

from __future__ import annotations

from pathlib import Path

import pytest

from cloud_aggregator.reproduce.fig4 import QUICK, Settings
from cloud_aggregator.reproduce.folder import Comparison, keep, settle
from device_profiles.errors import InputError


def test_a_new_folder_has_the_defaults_and_the_width_of_the_base(tmp_path: Path) -> None:
    found = settle(tmp_path / "new", {})
    assert found.settings == Settings()
    assert found.width == 128  # of the bundled base


def test_going_on_needs_nothing_but_the_folder(tmp_path: Path) -> None:
    first = settle(tmp_path, {"seeds": [5], "rounds": "3", "methods": ["pwff"]})
    keep(tmp_path, first)
    assert settle(tmp_path, {}) == first
    assert settle(tmp_path, {"rounds": 4}).settings.seeds == (5,)


def test_a_kept_width_spares_the_base_when_rendering(tmp_path: Path) -> None:
    keep(tmp_path, Comparison(width=32, settings=Settings(model="./gone")))
    assert settle(tmp_path, {}, render_only=True).width == 32


def test_quick_sets_little_and_stays_quick_with_what_is_given(tmp_path: Path) -> None:
    quick = settle(tmp_path, {"rounds": 3}, quick=True)
    assert (quick.settings.rounds, quick.settings.seeds) == (3, QUICK["seeds"])
    keep(tmp_path, quick)
    assert settle(tmp_path, {}).settings.quick


def test_quick_does_not_write_over_a_full_comparison(tmp_path: Path) -> None:
    keep(tmp_path, settle(tmp_path, {}))
    with pytest.raises(InputError, match="--quick would write over; name another --out"):
        settle(tmp_path, {}, quick=True)


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("Dear")
    with pytest.raises(InputError, match="holds something else"):
        settle(tmp_path, {})
    with pytest.raises(InputError, match="is no folder"):
        settle(tmp_path / "letter.txt", {})
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_a_folder_of_another_comparison_is_refused(tmp_path: Path) -> None:
    (tmp_path / "fig4.toml").write_text('reproduces = "fig5"\nwidth = 128\n')
    with pytest.raises(InputError, match=r"fig4\.toml"):
        settle(tmp_path, {})


def test_there_is_nothing_to_render_in_a_new_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="leave --render-only out"):
        settle(tmp_path / "new", {}, render_only=True)


@pytest.mark.parametrize(
    ("given", "words"),
    [({"rounds": "0"}, ["rounds", "'0'", "1"]), ({"rounds": "x"}, ["rounds", "'x'"]),
     ({"local_steps": -1}, ["local_steps", "-1"]), ({"seeds": [2**31]}, ["seeds", "2147483648"])],
)  # fmt: skip
def test_a_setting_out_of_its_range_is_named(
    tmp_path: Path, given: dict[str, object], words: list[str]
) -> None:
    with pytest.raises(InputError) as refused:
        settle(tmp_path, given)
    assert all(word in str(refused.value) for word in words), refused.value
