"""What is said of how updates counted: nothing of a plain mean, every exception by its figures."""

from __future__ import annotations

import io

from rich.console import Console

from cloud_aggregator.closing import closing_lines
from cloud_aggregator.counting_words import counting_lines
from cloud_aggregator.privacy import PrivacyRecord
from cloud_aggregator.progress import ProgressView
from cloud_aggregator.records import GlobalRound, Observed, RoundRecord, RunRecord, StaleEntry
from cloud_aggregator.reports import build_report
from tests.cloud_aggregator.conftest import record_of

SPENT = PrivacyRecord(
    clip_norm=1.0,
    noise_multiplier=0.8,
    delta=1e-5,
    expected_clients=8,
    rounds=3,
    epsilon=9.876,
    repeatable_noise=False,
)


def a_round(number: int, **changes: object) -> RoundRecord:
    """Return a round in which nothing special was."""
    fields: dict[str, object] = {
        "stage": "instruction",
        "round": number,
        "accepted": ["a"],
        "virtual_seconds": 1.0,
        "clients": [],
        "global_": GlobalRound(),
        "observed": Observed(),
    }
    return RoundRecord.model_validate({**fields, **changes})


def stale(staleness: int, share: float) -> StaleEntry:
    """Return a late update that counted by that share."""
    return StaleEntry(id="b", round=1, staleness=staleness, share=share, examples=1)


def a_run(*rounds: RoundRecord, **changes: object) -> RunRecord:
    """Return a run of these rounds."""
    return record_of(rounds=list(rounds), status="done", **changes)


def test_nothing_is_said_of_a_plain_mean() -> None:
    assert counting_lines(a_run(a_round(1))) == []


def test_late_updates_are_counted_with_their_mean_share() -> None:
    run = a_run(
        a_round(1),
        a_round(2, stale=[stale(1, 0.7)]),
        a_round(3, stale=[stale(2, 0.5)], stale_dropped=1),
        aggregation="fedbuff",
    )
    assert counting_lines(run) == [
        "Updates counted by fedbuff.",
        "2 late updates counted in a later round, by 0.60 of their weight on average.",
        "1 late update had become too old and did not count.",
    ]
    page = build_report([("run", run)])
    assert "1 of 0 and 1 of earlier rounds" in page
    assert "by 0.60 of their weight" in page


def test_epsilon_stands_at_the_end_and_on_the_page() -> None:
    run = a_run(a_round(1), privacy=SPENT)
    (line,) = counting_lines(run)
    assert "epsilon 9.88 at delta 1e-05 after 3 rounds" in line
    assert line in closing_lines(run)
    assert "epsilon 9.88 at delta 1e-05, of each client" in build_report([("run", run)])


def test_noise_that_can_be_repeated_is_said_to_hide_nothing() -> None:
    run = a_run(privacy=SPENT.model_copy(update={"repeatable_noise": True}))
    assert counting_lines(run)[-1].endswith("it hides nothing from who knows the seed.")


def test_a_round_that_changed_nothing_says_why() -> None:
    run = a_run(a_round(1, unchanged="'krum' takes 5 updates, and 3 came"), aggregation="krum")
    assert "Round 1 changed nothing: 'krum' takes 5 updates, and 3 came." in counting_lines(run)


def test_a_person_sees_late_updates_epsilon_and_who_was_replaced() -> None:
    out = io.StringIO()
    view = ProgressView(Console(file=out, width=200), rounds=2)
    view("replaced", client="a", round=1, by="c")
    figures = dict.fromkeys(GlobalRound.model_fields)
    view(
        "round", stage="instruction", round=1, accepted=2, clients=3, taken_back="", stale=1,
        epsilon=1.234, waited_seconds=90.0, upload_bytes=0,
        virtual_seconds=1.0, wall_seconds=1.0, **figures,
    )  # fmt: skip
    assert "'a' vanished; 'c' is asked in its place" in out.getvalue()
    assert (
        "2 of 3 clients and 1 late, epsilon 1.23 after 90 s without enough devices, "
        in out.getvalue()
    )
