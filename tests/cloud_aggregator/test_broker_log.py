"""Whom a broker turned away, counted from its log."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from cloud_aggregator import broker_log
from cloud_aggregator.broker_log import BrokerLog
from cloud_aggregator.service_config import load_service
from device_profiles.errors import InputError

NO_CERTIFICATE = (
    "1: OpenSSL Error[0]: error:0A0000C7:SSL routines::peer did not return a certificate\n"
)
SCAN = "1: OpenSSL Error[0]: error:0A000126:SSL routines::unexpected eof while reading\n"
NOT_TLS = "1: OpenSSL Error[0]: error:0A00010B:SSL routines::wrong version number\n"
NOT_TLS_EITHER = "1: Client connection from 1.2.3.4 failed: error:0A00010B:SSL routines::x.\n"
STRANGER = "1: Client eve disconnected, not authorised.\n"
GARBAGE = "1: Client eve disconnected due to malformed packet.\n"
DENIED = "1: Denied PUBLISH from eve (d0, q1, r0, m2, 'pwff/v1/r/c/a/state', ... (12 bytes))\n"
DENIED_BY_DATE = [
    DENIED.replace("1:", start, 1)
    for start in (
        "2026-11-30T10:00:00+0000:",
        "2026-11-30 10:00:00:",
        "Nov 30 10:00:00 host mosquitto[1]:",
        "Nov  3 10:00:00 host mosquitto[1]: 1:",
    )
]
LIES = (  # what a device that is let in may call its topics
    "1: Received PUBLISH from eve (d0, q1, r0, m3, 'Denied PUBLISH from a', ... (1 bytes))\n",
    "1: Received PUBLISH from eve (d0, q1, r0, m3, ': Client a disconnected, not authorised', )\n",
    "1: Received PUBLISH from eve (d0, q1, r0, m3, 'OpenSSL Error[0]: certificate', ... (1 by)\n",
)
ORDINARY = "1: New client connected from 127.0.0.1:1 as a (p5, c1, k30, u'a').\n"


class Watched:
    """A log, and what was counted of it."""

    def __init__(self, path: Path) -> None:
        self.path, self.found = path, Counter[str]()
        path.write_text(STRANGER)  # what stood there before is not counted
        self.log = BrokerLog(path, lambda reason, count: self.found.update({reason: count}))

    def write(self, *lines: str) -> Counter[str]:
        """Add lines, read, and return what was counted so far."""
        with self.path.open("a") as file:
            file.writelines(lines)
        self.log.read()
        return self.found


@pytest.fixture
def watched(tmp_path: Path) -> Watched:
    return Watched(tmp_path / "mosquitto.log")


def test_each_reason_is_told_apart_and_the_ordinary_is_none(watched: Watched) -> None:
    assert watched.write(ORDINARY, SCAN) == {}
    found = watched.write(NO_CERTIFICATE, NOT_TLS, NOT_TLS_EITHER, STRANGER, GARBAGE, STRANGER)
    assert found == {"certificate": 1, "tls": 2, "authorisation": 2, "protocol": 1}


def test_what_an_access_rule_denies_is_counted_and_what_a_topic_says_is_not(
    watched: Watched,
) -> None:
    assert watched.write(*LIES) == {}
    assert watched.write(DENIED, *DENIED_BY_DATE) == {"denied": 5}


def test_what_was_counted_is_not_counted_again(watched: Watched) -> None:
    watched.write(STRANGER)
    assert watched.write() == watched.write() == {"authorisation": 1}


def test_half_a_line_is_counted_once_it_is_whole(watched: Watched) -> None:
    assert watched.write(STRANGER[:30]) == {}
    assert watched.write(STRANGER[30:]) == {"authorisation": 1}


def test_a_log_that_is_rotated_or_emptied_is_read_from_its_beginning(watched: Watched) -> None:
    watched.path.rename(watched.path.with_suffix(".1"))
    watched.log.read()  # there is none for now
    assert watched.write(STRANGER) == {"authorisation": 1}
    watched.path.write_text("")
    watched.log.read()
    assert watched.write(GARBAGE) == {"authorisation": 1, "protocol": 1}


def test_a_flood_of_lines_costs_a_reading_no_more_than_its_bound(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(broker_log, "READ_BYTES", 10 * len(STRANGER))
    assert watched.write(*[STRANGER] * 1000) == {"authorisation": 9}  # the first may be half of one
    assert watched.write("x" * 10_000) == {"authorisation": 9}
    assert len(watched.log._unfinished) <= broker_log.READ_BYTES


def test_a_log_that_cannot_be_read_is_told_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"broker_log = '.*gone.log' cannot be read \(No such"):
        BrokerLog(tmp_path / "gone.log", lambda _reason, _count: None)


def test_a_log_that_no_monitor_shows_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cloud.toml"
    path.write_text(
        'run = "r"\nbroker = "mqtt://localhost"\nout = "o"\nclients = 1\nbroker_log = "b.log"\n'
    )
    with pytest.raises(InputError, match="there is no monitor to show them"):
        load_service(path)
