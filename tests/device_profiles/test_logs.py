"""Log lines carry what is known of run, round and client, for people and for machines."""

from __future__ import annotations

import io
import json
import logging
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from device_profiles import logs

log = logging.getLogger("some.module")


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    """Yield what logs are written to; afterwards the log is as it was."""
    root = logging.getLogger()
    handlers, level, place = root.handlers[:], root.level, dict(logs._process)
    for handler in handlers:
        root.removeHandler(handler)  # else basicConfig closes them
    logs._process.clear()
    yield io.StringIO()
    for handler in root.handlers[:]:
        root.removeHandler(handler)
    for handler in handlers:
        root.addHandler(handler)
    root.setLevel(level)
    logs._process.clear()
    logs._process.update(place)


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_line_for_machines_is_one_object_with_all_that_is_known(stream: io.StringIO) -> None:
    logs.start("json", "info", stream=stream)
    logs.place(run="trial")
    log.info("before")
    logs.note_event("task", work="train", round=3, clients=["a"])
    with logs.bound(client="a"):
        log.warning("took %d bytes\nand more", 7)
    log.info("after")
    before, inside, after = lines(stream)
    assert inside.pop("time").endswith("Z")
    assert inside == {
        "level": "WARNING", "logger": "some.module", "message": "took 7 bytes\nand more",
        "run": "trial", "round": 3, "client": "a",
    }  # fmt: skip
    assert (before.get("round"), before["run"]) == (None, "trial")
    assert ("client" in after, after["round"]) == (False, 3)


def test_a_line_for_people_ends_with_what_is_known(stream: io.StringIO) -> None:
    logs.start("text", "info", stream=stream)
    log.info("alone")
    with logs.bound(client="a", round=2):
        log.info("hello")
    alone, hello = stream.getvalue().splitlines()
    assert alone.endswith(" INFO alone")
    assert hello.endswith(" INFO hello [round=2 client=a]")


def test_an_inner_binding_adds_to_the_outer_one_and_goes_with_its_block(
    stream: io.StringIO,
) -> None:
    logs.start("json", "info", stream=stream)
    with logs.bound(client="a"):
        with logs.bound(round=5):
            log.info("both")
        log.info("one")
    both, one = lines(stream)
    assert (both["client"], both["round"]) == ("a", 5)
    assert (one["client"], "round" in one) == ("a", False)


def test_another_thread_has_the_run_and_not_what_this_one_is_about(stream: io.StringIO) -> None:
    logs.start("json", "info", stream=stream)
    logs.place(run="trial")
    with logs.bound(client="a"):
        thread = threading.Thread(target=log.info, args=("from there",))
        thread.start()
        thread.join(10)
    (line,) = lines(stream)
    assert (line["run"], "client" in line) == ("trial", False)


def test_an_event_becomes_a_line_with_its_plain_fields(stream: io.StringIO) -> None:
    logs.start("json", "info", stream=stream)
    # 'name' and 'message' are words that a log record keeps for itself
    logs.tell_event("round", round=4, name="x", message="y", loss=None, clients=["a"])
    (line,) = lines(stream)
    assert (line["event"], line["round"], line["message"]) == ("round", 4, "round")
    assert line["fields"] == {"round": 4, "name": "x", "message": "y", "loss": None}


def test_an_error_keeps_its_traceback_on_the_one_line(stream: io.StringIO) -> None:
    logs.start("json", "info", stream=stream)
    try:
        {}["gone"]
    except KeyError:
        log.exception("failed")
    (line,) = lines(stream)
    assert "KeyError: 'gone'" in line["exc_info"]


@pytest.mark.parametrize(("level", "said"), [("debug", 3), ("info", 2), ("error", 0)])
def test_less_than_the_level_is_left_out(level: str, said: int, stream: io.StringIO) -> None:
    logs.start("text", level, stream=stream)
    log.debug("d")
    log.info("i")
    log.warning("w")
    assert len(stream.getvalue().splitlines()) == said


def test_only_the_three_fields_are_bound(stream: io.StringIO) -> None:
    with pytest.raises(ValueError, match="'password' is no field"):
        logs.place(password="x")  # noqa: S106
    with pytest.raises(ValueError, match="'clients' is no field"), logs.bound(clients="x"):
        pass
    assert stream.getvalue() == ""
