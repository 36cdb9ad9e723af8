"""Every mistake in a file becomes one sentence that says where it is and what helps."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field, ValidationError, model_validator

from device_profiles.config_files import Config, check, choose, load, nearest, read_toml
from device_profiles.errors import InputError


class Wheel(Config):
    """A part of the example."""

    radius: Annotated[float, Field(gt=0)]
    colour: Literal["red", "blue"] = "red"


class Axle(Config):
    """A part whose figures can contradict each other."""

    length: float = Field(description="its length, metres")

    @model_validator(mode="after")
    def _is_short(self) -> Axle:
        if self.length > 1:
            raise ValueError("the axle is too long")
        return self


class Cart(Config):
    """The example: a record in a record, alone and in a list."""

    name: str
    spare: Wheel
    wheel: tuple[Wheel, ...] = ()
    painted: dict[str, Wheel] = Field(default_factory=dict)
    axle: Axle | None = None
    least: int = 0
    most: int = 9

    @model_validator(mode="after")
    def _least_is_not_above_most(self) -> Cart:
        if self.least > self.most:
            raise ValueError(f"least = {self.least} is above most = {self.most}")
        return self


GOOD: dict[str, Any] = {"name": "barrow", "spare": {"radius": 2.0}}


def test_nearest_names_a_close_word_and_keeps_quiet_about_a_far_one() -> None:
    assert nearest("raduis", ["radius", "colour"]) == "; did you mean 'radius'?"
    assert nearest("xyzzy", ["radius", "colour"]) == ""


def test_choose_returns_a_known_name() -> None:
    assert choose("codec", "int8", ["fp32", "int8"]) == "int8"


def test_choose_names_the_unknown_the_nearest_and_all_known_names() -> None:
    with pytest.raises(InputError) as err:
        choose("codec", "int5", ("int8", "fp32"))
    assert str(err.value) == ("unknown codec 'int5'; did you mean 'int8'? Choose one of fp32, int8")


def test_bad_input_ends_the_command_with_2() -> None:
    assert InputError.exit_code == 2


def test_load_returns_the_record_and_its_defaults(tmp_path: Path) -> None:
    path = tmp_path / "cart.toml"
    path.write_text('name = "barrow"\n[spare]\nradius = 2\n[[wheel]]\nradius = 1.5\ncolour="blue"')
    cart = load(Cart, path)
    assert cart.spare == Wheel(radius=2.0, colour="red")
    assert cart.wheel == (Wheel(radius=1.5, colour="blue"),)


def test_a_record_cannot_be_changed() -> None:
    cart = check(Cart, GOOD, "cart.toml")
    with pytest.raises(ValidationError, match="frozen"):
        cart.name = "other"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"name = ", "is no valid TOML"),
        (b"name = 1\nname = 2\n", "is no valid TOML"),
        (b"name = '\xff'\n", "is no valid TOML"),
    ],
)
def test_a_file_that_is_no_toml_is_named(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "broken.toml"
    path.write_bytes(content)
    with pytest.raises(InputError, match=says) as err:
        read_toml(path)
    assert str(path) in str(err.value)


def test_a_missing_file_and_a_folder_are_named_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read .*absent\.toml: No such file"):
        read_toml(tmp_path / "absent.toml")
    with pytest.raises(InputError, match=r"cannot read .*: Is a directory"):
        read_toml(tmp_path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"nmae": 1},
            "f: unknown key 'nmae'; did you mean 'name'? (known: axle, least, most, name, ",
        ),
        (
            {"spare": {"radius": 1, "color": "red"}},
            "f: unknown key 'spare.color'; did you mean 'colour'? (known: colour, radius)",
        ),
        (
            {"wheel": [{"radius": 1}, {"radius": 1, "raduis": 2}]},
            "f: unknown key 'wheel.1.raduis'; did you mean 'radius'? (known: colour, radius)",
        ),
        (
            {"painted": {"radius": {"radius": 1, "raduis": 2}}},
            "f: unknown key 'painted.radius.raduis'; did you mean 'radius'? (known: colour, rad",
        ),
        (
            {"painted": {"left": {"colour": "red"}}},
            "f: 'painted.left.radius' is missing; add it",
        ),
        ({"spare": {}}, "f: 'spare.radius' is missing; add it"),
        ({"axle": {"length": 2}}, "f: axle: the axle is too long"),
        ({"spare": {"radius": -1}}, "f: spare.radius = -1: Input should be greater than 0"),
        ({"spare": {"radius": "x"}}, "f: spare.radius = 'x': Input should be a valid number"),
        (
            {"spare": {"radius": 1, "colour": "green"}},
            "f: spare.colour = 'green': Input should be 'red' or 'blue'",
        ),
        ({"least": 10}, "f: least = 10 is above most = 9"),
    ],
)
def test_a_wrong_field_is_told_with_source_place_value_and_bound(
    change: dict[str, Any], says: str
) -> None:
    with pytest.raises(InputError) as err:
        check(Cart, GOOD | change, "f")
    assert str(err.value).startswith(says)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"name": "barrow"}, "f: 'spare' is missing; add a table [spare] with 'radius'"),
        ({"spare": {"radius": 1}}, "f: 'name' is missing; add it"),
        (GOOD | {"axle": {}}, "f: 'axle.length' is missing; add its length, metres"),
    ],
)
def test_what_is_missing_is_told_with_what_to_add(values: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError) as err:
        check(Cart, values, "f")
    assert str(err.value) == says


def test_a_misspelt_required_key_is_told_as_unknown_not_as_missing() -> None:
    with pytest.raises(InputError, match=r"unknown key 'spare.raduis'; did you mean 'radius'"):
        check(Cart, {"name": "barrow", "spare": {"raduis": 1}}, "f")


def test_a_long_value_does_not_flood_the_sentence() -> None:
    with pytest.raises(InputError, match="spare") as err:
        check(Cart, GOOD | {"spare": "x" * 10_000}, "f")
    assert len(str(err.value)) < 250
