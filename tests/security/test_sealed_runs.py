"""A run with certificates and seals, as it should go: from end to end, and over restarts."""

from __future__ import annotations

import pytest

from messaging import topics
from messaging.chunks import MAGIC
from messaging.protocol import Hello, decode
from messaging.security import MAGIC as SEALED
from messaging.security import SEAL_BYTES
from tests.cloud_aggregator.conftest import RUN, Teacher, join
from tests.security.conftest import INSIDER, Site

pytestmark = pytest.mark.broker


def test_a_sealed_run_over_mutual_tls_ends_with_both_devices_counted(site: Site) -> None:
    ear = site.peer(INSIDER, "pwff/#")
    _, thread = site.aggregator()
    for client in ("a", "b"):
        site.device(client)
    join(thread)
    assert (site.record.status, len(site.record.rounds)) == ("done", 2)
    assert [r.accepted for r in site.record.rounds] == [["a", "b"]] * 2
    assert all(not r.observed.refused for r in site.record.rounds)
    while not ear.heard.empty():  # nothing is said in the clear but chunks
        _, payload = ear.heard.get()
        assert not payload or payload.startswith((MAGIC, SEALED)), payload[:20]


def test_a_restarted_device_is_heard_in_its_new_session(site: Site) -> None:
    _, thread = site.aggregator(rounds=1)
    first = site.device("a")
    site.device("b", Teacher("b", before_work=lambda _task: site.events.wait_for("again")))
    site.events.wait_for("report", client="a")  # and the run waits for b
    first.stop()
    site.events.wait_for("hello", client="a", online=False)
    site.device("a")
    site.events.wait_for("hello", client="a", online=True, times=2)
    site.tell("again")
    join(thread)
    assert site.record.rounds[0].accepted == ["a", "b"]


def test_a_restarted_aggregator_is_known_by_its_devices(site: Site) -> None:
    server, thread = site.aggregator()
    hosts = [site.device(client) for client in ("a", "b")]
    site.events.wait_for("round", round=1)
    server.stop()
    join(thread)
    _, thread = site.aggregator()
    join(thread)
    assert site.record.status == "done"
    assert [r.round for r in site.record.rounds] == [1, 2]
    assert [r.accepted for r in site.record.rounds] == [["a", "b"]] * 2
    assert not any(host.failures for host in hosts)


def test_a_restarted_broker_is_found_again(site: Site) -> None:
    _, thread = site.aggregator(rounds=1)
    site.device("a")
    site.events.wait_for("hello", client="a")
    site.broker.stop()
    site.broker.start()
    site.events.wait_for("hello", client="a", online=True, times=2)
    site.device("b")
    join(thread)
    assert site.record.rounds[0].accepted == ["a", "b"]


def test_a_hello_that_the_broker_retained_for_an_earlier_aggregator_is_not_heard(
    site: Site,
) -> None:
    """It is bound to that one's session; the device greets the new one by itself."""
    server, thread = site.aggregator()
    host = site.device("a")
    site.events.wait_for("hello", client="a", online=True)
    server.stop()
    join(thread)
    ear = site.peer(INSIDER, topics.state(RUN, "a"))
    _, retained = ear.wait_for("#")
    assert isinstance(decode(retained[SEAL_BYTES:]), Hello)
    site.aggregator()
    site.refused("stale", client="a")
    site.events.wait_for("hello", client="a", online=True, times=2)
    assert not host.failures
