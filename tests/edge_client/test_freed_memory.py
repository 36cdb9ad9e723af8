"""Freed memory is given back now and then, and where no work follows."""

from __future__ import annotations

from edge_client.freed_memory import FreedMemory


def counted() -> tuple[FreedMemory, list[None]]:
    given: list[None] = []
    return FreedMemory(lambda: given.append(None)), given


def test_work_that_follows_on_work_gives_back_every_eighth_time() -> None:
    freed, given = counted()
    for _ in range(20):
        freed.begin()
    for done in range(1, 20):
        freed.end()
        freed.tick()  # more is to be done
        assert len(given) == done // 8
    freed.end()
    assert len(given) == 2
    freed.tick()
    assert len(given) == 3


def test_the_end_of_work_gives_back_once() -> None:
    freed, given = counted()
    freed.tick()
    assert not given  # nothing was done
    freed.begin()
    freed.tick()
    freed.end()
    assert not given  # the next piece may come at once
    freed.tick()
    freed.tick()
    assert len(given) == 1
