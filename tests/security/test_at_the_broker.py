"""Ways in that a broker closes: what an intruder is told, and that nothing reached the run."""

from __future__ import annotations

from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cloud_aggregator.metrics import Metrics
from messaging import topics
from messaging.access import BrokerAccess
from messaging.broker_rules import AGGREGATOR
from messaging.certificates import Pair, make_server
from messaging.errors import BrokerUnavailableError
from messaging.mqtt import MqttNetwork
from tests.cloud_aggregator.conftest import LIMIT, RUN, join
from tests.security.conftest import INSIDER, MALLORY, Mosquitto, Site, access_of

pytestmark = pytest.mark.broker


def knock(url: str, access: BrokerAccess, seconds: float = LIMIT) -> str:
    """Try to connect; return why that failed, as soon as it has."""
    with pytest.raises(BrokerUnavailableError) as told:
        MqttNetwork(url, access).require(seconds)
    return str(told.value)


def turned_away(broker: Mosquitto, metrics: Metrics) -> set[str]:
    """Stop the broker; return why the metrics say that it turned somebody away."""
    broker.stop()  # then its log is whole
    return set(refusals(metrics))


def refusals(metrics: Metrics) -> dict[str, float]:
    """Return how often the metrics say that the broker turned somebody away, by reason."""
    return {
        sample.labels["reason"]: sample.value
        for family in text_string_to_metric_families(metrics.page().decode())
        for sample in family.samples
        if sample.name == "pwff_broker_refusals_total" and sample.value
    }


@pytest.fixture
def metrics(broker: Mosquitto) -> Metrics:
    """Return metrics that count by the broker's log."""
    metrics = Metrics(RUN, "pwff")
    metrics.watch_broker(broker.log)
    return metrics


def test_nobody_without_a_certificate_is_let_in(
    broker: Mosquitto, papers: Path, metrics: Metrics
) -> None:
    said = knock(broker.url, BrokerAccess(ca=papers / "ca" / "ca.pem"))
    assert "give a certificate that it trusts" in said
    assert turned_away(broker, metrics) == {"certificate"}
    assert "peer did not return a certificate" in broker.log.read_text()


def test_nobody_with_a_certificate_of_another_authority_is_let_in(
    broker: Mosquitto, papers: Path, other_papers: Path, metrics: Metrics
) -> None:
    theirs = access_of(other_papers, "a")
    said = knock(broker.url, theirs.model_copy(update={"ca": papers / "ca" / "ca.pem"}))
    assert "give a certificate that it trusts" in said
    assert turned_away(broker, metrics) == {"certificate"}
    assert "certificate" in broker.log.read_text()


def test_nobody_without_tls_is_let_in(broker: Mosquitto, metrics: Metrics) -> None:
    url = broker.url.replace("mqtts", "mqtt")
    assert "no MQTT broker answered" in knock(url, BrokerAccess(), seconds=0.5)
    assert turned_away(broker, metrics) == {"tls"}


def test_a_broker_of_another_authority_is_not_spoken_to(
    broker: Mosquitto, papers: Path, other_papers: Path
) -> None:
    mine = access_of(papers, "a")
    said = knock(broker.url, mine.model_copy(update={"ca": other_papers / "ca" / "ca.pem"}))
    assert "its certificate is not trusted" in said


def test_a_broker_with_a_certificate_of_another_name_is_not_spoken_to(
    broker: Mosquitto, papers: Path
) -> None:
    authority = Pair(
        (papers / "ca" / "ca.pem").read_bytes(), (papers / "ca" / "ca.key").read_bytes()
    )
    elsewhere = make_server(authority, "broker", ["elsewhere.example"], days=1)
    (broker.folder / "broker.pem").write_bytes(elsewhere.certificate)
    (broker.folder / "broker.key").write_bytes(elsewhere.key)
    broker.stop()
    broker.start()
    said = knock(broker.url, access_of(papers, "a"))
    assert "its certificate is not trusted: Hostname mismatch" in said


def test_a_device_reads_and_writes_its_own_topics_alone(site: Site) -> None:
    """Mallory has a certificate, and tries a's topics, both ways, and the manifest's."""
    site.metrics.watch_broker(site.broker.log)
    _, thread = site.aggregator()
    mallory = site.peer(MALLORY, "pwff/#")
    insider = site.peer(INSIDER, "pwff/#")
    places = [
        topics.state(RUN, "a"),
        topics.control(RUN, "a"),
        topics.down(RUN, "a"),
        topics.data(RUN, "a", "0" * 64),
        topics.manifest(RUN),
        topics.down(RUN, MALLORY),
    ]
    for place in places:
        mallory.say(place, b"from mallory")
    mallory.say(topics.control(RUN, MALLORY), b"from mallory")  # its own, and the last
    topic, _ = insider.wait_for("#", lambda payload: payload == b"from mallory")
    assert topic == topics.control(RUN, MALLORY)
    assert refusals(site.metrics) == {"denied": len(places)}
    for client in ("a", "b"):
        site.device(client)
    join(thread)
    assert site.record.rounds[0].accepted == ["a", "b"]
    site.refused("mac", client=MALLORY)
    heard = {mallory.heard.get()[0] for _ in range(mallory.heard.qsize())}
    assert heard == {topics.manifest(RUN)}  # the one thing that everybody may read


def test_nobody_evicts_another_by_taking_its_client_id(site: Site) -> None:
    _, thread = site.aggregator()
    for client in ("a", "b"):
        site.device(client)
    thief = MqttNetwork(site.broker.url, access_of(site.papers, MALLORY)).open(
        client_id=f"pwff-{RUN}-aggregator",
        filters=[],
        deliver=lambda *_: None,
        connected=lambda: None,
    )
    thief.start()
    join(thread)
    thief.close()
    assert site.record.status == "done"
    assert f"as {AGGREGATOR} " in site.broker.log.read_text()
    assert f"as pwff-{RUN}-aggregator" not in site.broker.log.read_text()
