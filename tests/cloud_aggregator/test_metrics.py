"""The metrics of a run: what each event changes, and that nobody can make them grow."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cloud_aggregator.metrics import CODES, CountedNetwork, Metrics
from messaging.memory import MemoryNetwork
from tests.cloud_aggregator.conftest import Clock, Events, Stage, Teacher, settings_of

DASHBOARD = Path(__file__).parents[2] / "deploy" / "grafana" / "pwff.json"
ROUND = {"stage": "instruction", "round": 1, "accepted": 2, "clients": 3, "wall_seconds": 7.0}


def samples(metrics: Metrics) -> dict[str, float]:
    """Return every sample of the page as a scraper reads it, by name and labels."""
    return {
        sample.name + json.dumps(sample.labels, sort_keys=True): sample.value
        for family in text_string_to_metric_families(metrics.page().decode())
        for sample in family.samples
    }


def value(metrics: Metrics, name: str, **labels: str) -> float:
    return samples(metrics)[name + json.dumps(labels, sort_keys=True)]


def states(metrics: Metrics) -> dict[str, float]:
    names = ("online", "training", "uploaded", "gone")
    return {name: value(metrics, "pwff_clients", state=name) for name in names}


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def metrics(clock: Clock) -> Metrics:
    return Metrics("trial", "pwff", clock)


def hello(metrics: Metrics, *clients: str, online: bool = True) -> None:
    for client in clients:
        metrics("hello", client=client, online=online, profile="p", lora_count=12)


def task(metrics: Metrics, work: str, round_: int, *clients: str) -> None:
    metrics("task", work=work, stage="instruction", round=round_, clients=list(clients))


def update(metrics: Metrics, client: str, verdict: str = "accepted", size: int = 100) -> None:
    metrics("update", client=client, round=1, verdict=verdict, train_loss=1.0, bytes=size)


def test_a_device_goes_from_state_to_state_through_a_round(metrics: Metrics) -> None:
    hello(metrics, "a", "b", "c")
    assert states(metrics) == {"online": 3, "training": 0, "uploaded": 0, "gone": 0}
    task(metrics, "train", 1, "a", "b")
    assert states(metrics) == {"online": 1, "training": 2, "uploaded": 0, "gone": 0}
    update(metrics, "a")
    assert states(metrics) == {"online": 1, "training": 1, "uploaded": 1, "gone": 0}
    hello(metrics, "b", online=False)
    assert states(metrics) == {"online": 1, "training": 0, "uploaded": 1, "gone": 1}
    hello(metrics, "b")  # it is still asked
    assert states(metrics) == {"online": 1, "training": 1, "uploaded": 1, "gone": 0}
    task(metrics, "evaluate", 1, "a", "b", "c")
    assert states(metrics) == {"online": 3, "training": 0, "uploaded": 0, "gone": 0}


def test_a_device_that_fell_silent_is_gone_until_it_says_hello(metrics: Metrics) -> None:
    hello(metrics, "a")
    metrics("gone", client="a", round=1)
    task(metrics, "train", 1, "a")  # in emulation it is asked all the same
    assert states(metrics)["gone"] == 1
    hello(metrics, "a")
    assert states(metrics) == {"online": 0, "training": 1, "uploaded": 0, "gone": 0}


def test_one_that_is_asked_in_anothers_place_trains_and_the_others_go_on(
    metrics: Metrics,
) -> None:
    hello(metrics, "a", "b", "c")
    task(metrics, "train", 1, "a", "b")
    hello(metrics, "b", online=False)
    metrics("task", work="train", stage="instruction", round=1, clients=["c"], more=True)
    assert states(metrics) == {"online": 0, "training": 2, "uploaded": 0, "gone": 1}


def test_a_stranger_that_never_said_hello_is_no_client(metrics: Metrics) -> None:
    metrics("gone", client="nobody")
    hello(metrics, "nobody", online=False)
    task(metrics, "train", 1, "nobody")
    assert states(metrics) == {"online": 0, "training": 0, "uploaded": 0, "gone": 0}


def test_updates_are_counted_by_verdict_and_their_bytes_together(metrics: Metrics) -> None:
    update(metrics, "a", size=100)
    update(metrics, "b", size=50)
    update(metrics, "c", "late", size=7)
    assert value(metrics, "pwff_updates_total", verdict="accepted") == 2
    assert value(metrics, "pwff_updates_total", verdict="late") == 1
    metrics("stale", client="d", round=0, staleness=1)
    assert value(metrics, "pwff_updates_total", verdict="stale") == 1
    assert value(metrics, "pwff_update_bytes_total") == 157


def test_an_upload_lasts_from_its_first_grant_to_the_update(metrics: Metrics, clock: Clock) -> None:
    task(metrics, "train", 1, "a", "b")
    clock.now = 10.0
    metrics("granted", client="a", round=1)
    clock.now = 13.0
    metrics("granted", client="a", round=1)  # handed on and granted again
    clock.now = 14.0
    update(metrics, "a")
    update(metrics, "b")  # taken from an earlier process: never granted here
    assert value(metrics, "pwff_upload_duration_seconds_count") == 1
    assert value(metrics, "pwff_upload_duration_seconds_sum") == 4.0
    assert value(metrics, "pwff_upload_duration_seconds_bucket", le="2.5") == 0
    assert value(metrics, "pwff_upload_duration_seconds_bucket", le="5.0") == 1


def test_a_round_shows_its_duration_figures_and_what_came_again(metrics: Metrics) -> None:
    metrics("round", **ROUND, retransmitted_bytes=30, eval_loss=2.5, eval_accuracy=0.25)
    metrics("round", **{**ROUND, "round": 2, "wall_seconds": 3.0, "taken_back": "kl"})
    stage = {"stage": "instruction"}
    assert value(metrics, "pwff_rounds_total", outcome="kept", **stage) == 1
    assert value(metrics, "pwff_rounds_total", outcome="taken-back", **stage) == 1
    assert value(metrics, "pwff_round_duration_seconds_sum", **stage) == 10.0
    assert value(metrics, "pwff_retransmitted_bytes_total") == 30
    assert value(metrics, "pwff_eval_loss", **stage) == 2.5
    assert value(metrics, "pwff_eval_accuracy", **stage) == 0.25
    assert value(metrics, "pwff_round_accepted") == 2
    assert value(metrics, "pwff_round_clients") == 3


def test_no_device_makes_the_number_of_series_grow(metrics: Metrics) -> None:
    hello(metrics, "a")
    before = len(samples(metrics))
    for i in range(50):
        metrics("refused", client=f"c{i}", code=f"made-up-{i}", reason="x")
        hello(metrics, f"c{i}")
        update(metrics, f"c{i}")
    assert len(samples(metrics)) == before
    assert value(metrics, "pwff_rejects_total", code="other") == 50


def test_every_code_that_the_sources_refuse_with_has_a_series_of_its_own() -> None:
    root = Path(__file__).parents[2]
    codes: set[str] = set()
    for package in ("messaging", "cloud_aggregator"):
        for path in (root / package).rglob("*.py"):
            refusing = r'(?:ProtocolError\(\s*|fault = )"([a-z-]+)"'
            codes |= set(re.findall(refusing, path.read_text()))
    assert len(codes) > 10
    assert codes <= CODES


def test_a_run_has_a_registry_of_its_own(metrics: Metrics) -> None:
    other = Metrics("trial", "pwff")
    update(other, "a")
    assert value(metrics, "pwff_updates_total", verdict="accepted") == 0


def test_a_queue_is_asked_whenever_the_page_is(metrics: Metrics) -> None:
    waiting = [1]
    metrics.watch_queue("inbox", lambda: len(waiting))
    assert value(metrics, "pwff_queue_length", queue="inbox") == 1
    waiting.append(2)
    assert value(metrics, "pwff_queue_length", queue="inbox") == 2


def test_payloads_are_counted_both_ways_and_still_arrive(metrics: Metrics) -> None:
    heard: list[bytes] = []
    hub = MemoryNetwork()
    counted = CountedNetwork(hub, metrics).open(
        client_id="cloud",
        filters=["up/#"],
        deliver=lambda _topic, payload: heard.append(payload),
        connected=lambda: None,
    )
    device = hub.open(
        client_id="a", filters=["down/#"], deliver=lambda _t, p: heard.append(p), connected=list
    )
    counted.start()
    device.start()
    device.publish("up/a", b'{"kind"}')
    device.publish("up/a", b"PWFF12345")
    counted.publish("down/a", b"Ssealed")
    assert heard == [b'{"kind"}', b"PWFF12345", b"Ssealed"]
    read = {
        (d, k): value(metrics, "pwff_traffic_bytes_total", direction=d, kind=k)
        for d in ("up", "down")
        for k in ("data", "control")
    }
    assert read == {
        ("up", "control"): 8,
        ("up", "data"): 9,
        ("down", "control"): 7,
        ("down", "data"): 0,
    }
    assert value(metrics, "pwff_connections_total") == 1


def test_a_whole_run_ends_in_numbers_that_its_record_has(stage: Stage, clock: Clock) -> None:
    metrics, events = Metrics("trial", "pwff", clock), Events()
    events.on = lambda event, fields: metrics(event, **fields)
    stage.host(*(Teacher(name) for name in ("a", "b", "c")))
    record = stage.aggregator(settings_of(), events=events).run()
    assert len(record.rounds) == 2
    assert value(metrics, "pwff_rounds_total", stage="instruction", outcome="kept") == 2
    sent = sum(c.upload_bytes for r in record.rounds for c in r.clients)
    # the record counts the chunks' headers too, 64 bytes or more an update
    assert 0 < value(metrics, "pwff_update_bytes_total") <= sent - 6 * 64
    assert value(metrics, "pwff_updates_total", verdict="taken") == 6
    assert sum(states(metrics).values()) == 3


def test_every_metric_on_the_dashboard_is_exported(metrics: Metrics) -> None:
    exported = {name.partition("{")[0] for name in samples(metrics)}
    metrics.watch_queue("inbox", lambda: 0)
    metrics("round", **ROUND, eval_loss=1.0, eval_accuracy=0.5)
    exported |= {name.partition("{")[0] for name in samples(metrics)}
    dashboard = json.loads(DASHBOARD.read_text())
    queries = [t["expr"] for panel in dashboard["panels"] for t in panel["targets"]]
    queries += [
        v["query"]["query"] for v in dashboard["templating"]["list"] if v["type"] == "query"
    ]
    asked = {n for query in queries for n in re.findall(r"\b(?:pwff|process)_[a-z_]+", query)}
    assert len(asked) >= 15
    assert asked <= exported


def test_the_dashboard_shows_every_metric_of_the_run(metrics: Metrics) -> None:
    text = DASHBOARD.read_text()
    families = text_string_to_metric_families(metrics.page().decode())
    own = {f.name for f in families if f.name.startswith("pwff_") and f.type != "info"}
    missing = {n for n in own if not n.endswith("_created") and n not in text}
    assert not missing
