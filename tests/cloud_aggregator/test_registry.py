"""Devices by identity, each in its newest session; who is built on something else stays out."""

from __future__ import annotations

from typing import Any

import pytest

from cloud_aggregator.registry import Registry
from messaging.errors import ProtocolError
from messaging.protocol import Hello
from tests.cloud_aggregator.conftest import BINDING, LAYOUT, RUN, SESSION, device

LATER = "f" * 16


def hello(client: str = "a", **changes: Any) -> Hello:
    fields: dict[str, Any] = {
        "run": RUN,
        "client": client,
        "session": SESSION,
        "online": True,
        "binding": BINDING,
        "layout": LAYOUT.sha256,
        "device": device(client),
    }
    return Hello(**{**fields, **changes})


def left(client: str = "a", session: str = SESSION) -> Hello:
    return hello(client, online=False, device=None, session=session)


@pytest.fixture
def registry() -> Registry:
    return Registry(binding=BINDING, layout=LAYOUT.sha256)


def test_devices_are_listed_in_client_order(registry: Registry) -> None:
    for client in ("c", "a", "b"):
        assert registry.greeted(hello(client))
    assert registry.online == ["a", "b", "c"]
    assert registry.devices["b"] == device("b")


def test_a_device_that_left_is_known_and_not_there(registry: Registry) -> None:
    registry.greeted(hello())
    assert registry.is_online("a")
    assert not registry.greeted(left())
    assert registry.online == []
    assert not registry.is_online("a")
    assert "a" in registry.devices


def test_who_never_came_cannot_leave_and_its_name_is_not_kept(registry: Registry) -> None:
    for number in range(9):
        assert not registry.greeted(left(f"stranger-{number}"))
    assert registry.changes == 0
    assert not registry._left


def test_the_will_of_an_older_session_does_not_send_the_newer_one_away(registry: Registry) -> None:
    registry.greeted(hello())
    registry.greeted(hello(session=LATER))
    registry.greeted(left(session=SESSION))
    assert registry.online == ["a"]
    registry.greeted(left(session=LATER))
    assert registry.online == []


def test_a_device_that_nobody_knows_cannot_leave(registry: Registry) -> None:
    assert not registry.greeted(left("x"))
    assert registry.devices == {}


def test_only_the_newest_session_speaks(registry: Registry) -> None:
    with pytest.raises(ProtocolError) as never_greeted:
        registry.check_session("a", SESSION)
    registry.greeted(hello())
    registry.check_session("a", SESSION)
    registry.greeted(hello(session=LATER))
    registry.check_session("a", LATER)
    with pytest.raises(ProtocolError, match="not its newest") as too_old:
        registry.check_session("a", SESSION)
    assert (never_greeted.value.code, too_old.value.code) == ("session", "session")


@pytest.mark.parametrize(
    ("changes", "code", "remedy"),
    [
        ({"binding": "0" * 64}, "base", "give it the run's model and placement"),
        ({"layout": "0" * 64}, "layout", "compare method, stages, reward_shares, rew"),
        ({"device": None}, "identity", "without a record"),
        ({"device": device("b")}, "identity", "record of the device that sends it"),
    ],
    ids=["base", "layout", "no record", "record of another"],
)
def test_a_device_on_something_else_is_refused_and_not_known(
    changes: dict[str, Any], code: str, remedy: str, registry: Registry
) -> None:
    with pytest.raises(ProtocolError, match=remedy) as refusal:
        registry.greeted(hello(**changes))
    assert refusal.value.code == code
    assert registry.online == []
    assert registry.devices == {}
    with pytest.raises(ProtocolError):
        registry.check_session("a", SESSION)


@pytest.mark.parametrize(
    ("run", "said", "taken"),
    [
        ("", "int8:ff", True),
        ("", "int8+ab:ff", False),
        ("ab", "int8+ab:ff", True),
        ("ab", "int8+cd:ff", False),
        ("ab", "int8:ff", False),
        ("ab", "", True),  # it scores nothing
    ],
)
def test_a_device_scores_by_the_encoder_of_the_run(run: str, said: str, taken: bool) -> None:
    registry = Registry(binding=BINDING, layout=LAYOUT.sha256, encoder=run)
    record = device("a").model_copy(update={"scoring": said})
    if taken:
        assert registry.greeted(hello(device=record))
        return
    with pytest.raises(ProtocolError, match="read another reward_trunk") as refusal:
        registry.greeted(hello(device=record))
    assert refusal.value.code == "layout"


def test_a_refused_hello_takes_nothing_from_the_session_that_is_there(registry: Registry) -> None:
    registry.greeted(hello())
    with pytest.raises(ProtocolError):
        registry.greeted(hello(session=LATER, binding="0" * 64))
    registry.check_session("a", SESSION)
    assert registry.online == ["a"]


def scoring(client: str, words: str, **changes: Any) -> Hello:
    """Return a HELLO of a device that scores responses so."""
    record = device(client).model_copy(update={"scoring": words})
    return hello(client, device=record, **changes)


@pytest.mark.parametrize("words", ["fp32:" + "a" * 64, "int8:" + "b" * 64, ""])
def test_a_device_that_scores_by_something_else_is_refused(words: str, registry: Registry) -> None:
    registry.greeted(scoring("a", "int8:" + "a" * 64))
    assert registry.greeted(scoring("b", "int8:" + "a" * 64))
    with pytest.raises(ProtocolError, match=f"'c' scores responses by '{words}' and the") as told:
        registry.greeted(scoring("c", words))
    assert told.value.code == "layout"
    assert (
        "another trunk precision, reward_trunk or reference set; give it theirs"
        in told.value.reason
    )
    assert registry.online == ["a", "b"]
    assert "c" not in registry.devices


def test_a_device_alone_may_come_back_with_another_way_of_scoring(registry: Registry) -> None:
    registry.greeted(scoring("a", "fp32:" + "a" * 64))
    assert registry.greeted(scoring("a", "int8:" + "a" * 64, session=LATER))
    assert registry.devices["a"].scoring == "int8:" + "a" * 64


def test_in_a_run_that_goes_on_who_comes_first_scores_as_the_run_does() -> None:
    ours, other = "int8:" + "a" * 64, "fp32:" + "a" * 64
    registry = Registry(binding=BINDING, layout=LAYOUT.sha256, scoring=ours)
    with pytest.raises(ProtocolError, match="'z' scores responses by"):
        registry.greeted(scoring("z", other))
    assert registry.greeted(scoring("a", ours))


def test_a_device_that_comes_back_brings_its_newest_record(registry: Registry) -> None:
    registry.greeted(hello())
    registry.greeted(hello(session=LATER, device=device("a", examples=9)))
    assert registry.devices["a"].examples == 9


def test_where_the_clients_are_known_another_one_is_refused() -> None:
    registry = Registry(binding=BINDING, layout=LAYOUT.sha256, known=frozenset({"a"}))
    assert registry.greeted(hello("a"))
    with pytest.raises(ProtocolError) as told:
        registry.greeted(hello("b"))
    assert told.value.code == "identity"
    assert registry.online == ["a"]


def test_all_have_left_once_each_has_said_so(registry: Registry) -> None:
    for client in ("a", "b"):
        registry.greeted(hello(client))
    assert not registry.all_left
    registry.greeted(left("a"))
    assert not registry.all_left
    registry.greeted(left("b"))
    assert registry.all_left
    registry.greeted(hello("b", session=LATER))
    assert not registry.all_left


def test_a_device_that_an_earlier_process_knew_has_left_when_it_says_so_in_any_session() -> None:
    known = {"a": device("a")}
    registry = Registry(binding=BINDING, layout=LAYOUT.sha256, devices=known)
    assert not registry.all_left
    registry.greeted(left("a", session=LATER))
    assert registry.all_left
