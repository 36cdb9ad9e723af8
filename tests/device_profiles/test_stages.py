"""The stages that a person names: in their order, and only where a method has a use for them."""

from __future__ import annotations

import pytest

from device_profiles.errors import InputError
from device_profiles.methods import METHODS, find_method
from device_profiles.stages import STAGES, parse_stages


def test_all_stages_are_named_in_their_order_with_or_without_spaces() -> None:
    assert parse_stages("instruction, reward,alignment", find_method("pwff")) == list(STAGES)
    assert parse_stages("reward,alignment", find_method("sfl")) == ["reward", "alignment"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("instruct", "unknown stage 'instruct'"),
        ("", "unknown stage ''"),
        ("reward,instruction", "not in their order"),
        ("instruction,instruction", "name one twice"),
        ("instruction,alignment", "put reward before it"),
    ],
)
def test_stages_that_make_no_run_are_refused_with_what_there_is(text: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        parse_stages(text, find_method("pwff"))


@pytest.mark.parametrize("name", ["shepherd", "local-only"])
def test_a_method_without_objectives_is_instruction_tuned_alone(name: str) -> None:
    method = find_method(name)
    assert parse_stages("instruction", method) == ["instruction"]
    with pytest.raises(InputError, match="instruction-tuned alone"):
        parse_stages("instruction,reward", method)


def test_every_method_that_is_aligned_shares_something() -> None:
    assert all(method.shared for method in METHODS.values() if method.objectives)
